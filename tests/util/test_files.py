"""Files that are whole or not there."""

import threading
import time

import pytest

from rcm_jax.util.files import check_new_folder, check_writable, new_folder, write_text, write_whole


def test_a_file_is_replaced_as_a_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old and longer")
    write_text(path, "neu: ä")
    assert path.read_text(encoding="utf-8") == "neu: ä"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "x")
    assert (tmp_path / "a" / "b.txt").read_text() == "x"


# --- folders


@pytest.mark.smoke
def test_a_new_folder_is_there_whole_with_the_usual_permissions(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_that_fails_is_removed_even_while_a_thread_goes_on_writing(tmp_path, error):
    def write_on(folder):
        for i in range(20):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / str(i)).write_text("late")
            time.sleep(0.02)

    with pytest.raises(error), new_folder(tmp_path / "new") as folder:
        thread = threading.Thread(target=write_on, args=(folder / "deep",))
        thread.start()
        raise error
    thread.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://host/x", r"ftp://host/x: ftp:// is no object store that is known here"),
        ("{tmp}/file/x", r"file/x cannot be made: .*file is no folder that can be written to"),
        ("{tmp}/file", r"file is there and not an empty folder: choose another"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path, path, message):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=message):
        check_new_folder(path.format(tmp=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_to_is_told_before(tmp_path):
    check_writable(tmp_path / "new" / "a.png")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(IsADirectoryError, match="is a folder: name a file"):
        check_writable(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        check_writable(tmp_path / "file" / "a.png")

"""Files that are whole or not there."""

import errno
import os
import socket
import struct
import threading
import time
import zipfile

import pytest

from rcm_jax.util.files import (
    brief,
    check_new_folder,
    check_writable,
    listed,
    new_folder,
    read_json,
    reading,
    regular,
    write_text,
    write_whole,
    writing,
)


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


# --- what is damaged, made to do harm, or no file


FAULTS = [
    RecursionError("deep"), StopIteration(), IndexError("3"), KeyError("x"), OverflowError(), struct.error("short"),
    zipfile.BadZipFile("bad"), MemoryError(), TypeError(), AttributeError(), EOFError(), AssertionError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), OSError(errno.EINVAL, "Invalid argument"), ValueError("x\ny"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_whatever_a_file_makes_its_reader_raise_is_one_line_that_names_it(fault):
    with pytest.raises(ValueError, match=r"^a/b is no x: [^\n]+; y$") as caught, reading("a/b", "is no x", "; y"):
        raise fault
    assert type(caught.value) is ValueError
    once = pytest.raises(ValueError, match=r"^a/b is no x: [^\n]+$")
    with once, reading("a/b", "is none"), reading("a/b", "is no x"):
        raise fault


def test_errors_of_the_system_stay_and_name_the_file_and_what_is_long_is_cut():
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: 'a/b'$"), reading("a/b", "is no x"):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(FileNotFoundError, match=r"'c'$"), reading("a/b", "is no x"):
        raise FileNotFoundError(errno.ENOENT, "No such file", "c")
    with pytest.raises(ValueError, match=r"x… \(100,000 characters\)$"), reading("a/b", "is no x"):
        raise ValueError("x" * 100_000)
    assert brief("a\n\x1b\ud800é") == r"a\n\x1b\ud800é"
    assert listed(range(12), 10) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2 more" and listed([]) == ""


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path, kind in (("fifo", "a FIFO"), ("socket", "a socket"), ("/dev/zero", "a device"), (".", "a folder")):
        for read in (regular, read_json):
            with pytest.raises(ValueError, match=f"^{tmp_path / path} is {kind}, not a file$"):
                read(tmp_path / path)
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none'"):
        regular(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("[1]")
    assert regular(str(tmp_path / "link")) == tmp_path / "link" and read_json(tmp_path / "link") == [1]


def test_json_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"a\.json is no JSON: it has 1,099,511,627,776 bytes, and may have 10"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOSPC, "No space left on device", "/elsewhere/temporary"),
        RuntimeError("write() failed: No space left on device; writing x"),
        ValueError('RESOURCE_EXHAUSTED: writing "x"\nFailed: No space left on device [os_error_code=28]'),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file_once(tmp_path, error):
    def fail(temporary=None):
        raise error

    line = rf"^\[Errno 28\] No space left on device: '{tmp_path}/a'$"
    with pytest.raises(OSError, match=line), writing(tmp_path / "a"):
        fail()
    with pytest.raises(OSError, match=line):
        write_whole(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())


def test_errors_in_a_new_folder_name_the_file_where_it_was_to_be(tmp_path):
    def fail(error, inside=""):
        with new_folder(tmp_path / "a") as temporary:
            if inside:
                error.filename = str(temporary / inside)
            raise error

    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{tmp_path}/a/b/c'$"):
        fail(OSError(errno.ENOSPC, "No space left on device", ""), "b/c")
    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{tmp_path}/a'$"):
        fail(RuntimeError("No space left on device"))
    with pytest.raises(FileNotFoundError, match="'else'"):
        fail(FileNotFoundError(errno.ENOENT, "No such file", "else"))
    assert not list(tmp_path.iterdir())

"""Files and folders of an object store: whole or not there, copied once, mirrored."""

import sys
import threading

import fsspec
import pytest

from rcm_jax.util import files, mirror
from rcm_jax.util.files import (
    as_path,
    check_new_folder,
    check_writable,
    local,
    new_folder,
    stored,
    write_text,
    write_whole,
)
from rcm_jax.util.mirror import Mirror
from tests.stores import contents


@pytest.fixture(scope="module")
def bucket(s3):
    return s3("files")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of copies, empty."""
    monkeypatch.setenv("RCM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_path_is_that_of_a_store_also_when_pathlib_has_taken_a_slash(bucket):
    for given in (f"{bucket}/a/b", as_path(f"{bucket}/a/b"), "s3:/files/a/b"):
        assert str(as_path(given)) == "s3://files/a/b" and stored(as_path(given))
    for given in ("a/b", "/a/s3:/b", "C:/a"):
        assert not stored(as_path(given))


@pytest.mark.parametrize(
    ("path", "message"),
    [("ftp://host/x", r"ftp:// is no object store .* gs:// and s3:// are"), ("s3://", "must name a bucket")],
)
def test_a_path_of_no_store_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        as_path(path)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gcsfs is not installed: pip install 'rcm-jax\[gcs\]'"):
        as_path("gs://missing/x")


def test_a_store_that_cannot_be_reached_is_an_error_in_one_line(monkeypatch):
    class Silent:
        def exists(self, path):
            raise RuntimeError("no credentials")

    monkeypatch.setattr(fsspec, "filesystem", lambda name: Silent())
    with pytest.raises(OSError, match=r"^s3://unseen cannot be reached: RuntimeError: no credentials$"):
        as_path("s3://unseen/x")


def test_a_file_is_uploaded_when_it_is_whole(bucket):
    write_text(f"{bucket}/file/a.json", "neu: ä")
    assert contents(f"{bucket}/file") == {"a.json": "neu: ä".encode()}

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(f"{bucket}/file/a.json", fail)
    assert contents(f"{bucket}/file") == {"a.json": "neu: ä".encode()}


def test_whether_a_file_can_be_written_is_tried_without_a_trace(bucket):
    check_writable(f"{bucket}/new/a.png")
    assert contents(f"{bucket}/new") == {}
    with pytest.raises(OSError, match=r"^s3://there-is-no-such-bucket/.*a.png.* cannot be written: .* does not exist"):
        check_writable("s3://there-is-no-such-bucket/a.png")


def test_a_folder_is_uploaded_with_its_mark_last(bucket, monkeypatch):
    order, upload = [], files.upload
    monkeypatch.setattr(files, "upload", lambda source, path: (order.append(path.name), upload(source, path)))
    with new_folder(f"{bucket}/whole") as folder:
        for name in ("config.json", "z"):
            (folder / name).write_text(name)
        (folder / "deep").mkdir()
        (folder / "deep" / "x").write_text("x")
        assert contents(f"{bucket}/whole") == {}
    assert contents(f"{bucket}/whole") == {"config.json": b"config.json", "z": b"z", "deep/x": b"x"}
    assert order[-1] == "config.json"
    with pytest.raises(ValueError, match="is there and not an empty folder"):
        check_new_folder(f"{bucket}/whole")


def test_a_folder_whose_upload_fails_is_removed(bucket, monkeypatch):
    upload = files.upload

    def fail_at_the_mark(source, path):
        if path.name == "config.json":
            assert contents(f"{bucket}/half") == {"a": b"a"}
            raise OSError("the network is gone")
        upload(source, path)

    monkeypatch.setattr(files, "upload", fail_at_the_mark)
    with pytest.raises(OSError, match="network is gone"), new_folder(f"{bucket}/half") as folder:
        (folder / "a").write_text("a")
        (folder / "config.json").write_text("{}")
    assert contents(f"{bucket}/half") == {}
    check_new_folder(f"{bucket}/half")


# --- copies


def test_a_local_path_is_its_own_copy(tmp_path):
    assert local(str(tmp_path)) == tmp_path


def test_a_file_is_copied_once_and_again_when_it_has_changed(bucket, cache):
    write_text(f"{bucket}/copy/a.txt", "one")
    first = local(f"{bucket}/copy/a.txt")
    assert first.name == "a.txt" and first.read_text() == "one" and first.is_relative_to(cache)
    first.write_text("seen")  # were it copied again, this would be gone
    assert local(f"{bucket}/copy/a.txt").read_text() == "seen"
    write_text(f"{bucket}/copy/a.txt", "three")
    assert local(f"{bucket}/copy/a.txt").read_text() == "three" and first.read_text() == "seen"
    with pytest.raises(FileNotFoundError, match=r"copy/b.txt: no such file or folder"):
        local(f"{bucket}/copy/b.txt")


def test_a_folder_is_copied_with_all_that_is_in_it(bucket, cache):
    for name in ("tokenizer.json", "deep/x.txt"):
        write_text(f"{bucket}/folder/{name}", name)
    copy = local(f"{bucket}/folder")
    assert copy.name == "folder"
    assert {str(p.relative_to(copy)): p.read_text() for p in copy.rglob("*") if p.is_file()} == {
        "tokenizer.json": "tokenizer.json",
        "deep/x.txt": "deep/x.txt",
    }
    assert local(f"{bucket}/folder") == copy


def test_a_copy_that_fails_is_not_there_and_several_at_once_are_one(bucket, cache, monkeypatch):
    write_text(f"{bucket}/many/a.txt", "x")
    store = fsspec.filesystem("s3")
    get, calls = store.get_file, []

    def once(name, target):
        calls.append(name)
        get(name, target)
        if len(calls) == 1:
            raise OSError("the network is gone")

    monkeypatch.setattr(store, "get_file", once)
    with pytest.raises(OSError, match="network is gone"):
        local(f"{bucket}/many/a.txt")
    assert not list(cache.rglob("*a.txt*"))
    found = []
    threads = [threading.Thread(target=lambda: found.append(local(f"{bucket}/many/a.txt"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and len(calls) == 2


# --- a folder that is mirrored


def test_of_a_local_folder_the_mirror_is_that_folder(tmp_path):
    here = Mirror(tmp_path / "a")
    assert here.here == tmp_path / "a" and not here.here.exists()
    here.close()


def test_a_mirror_begins_with_what_is_there_and_uploads_what_has_changed(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY", 0.05)
    write_text(f"{bucket}/run/lines", "one\n")
    write_text(f"{bucket}/run/other", "x")
    mirrored = Mirror(f"{bucket}/run", ("lines", "missing"))
    assert [path.name for path in mirrored.here.iterdir()] == ["lines"]
    with (mirrored.here / "lines").open("a") as file:
        file.write("two\n")
    for _ in range(100):
        if contents(f"{bucket}/run")["lines"] == b"one\ntwo\n":
            break
        threading.Event().wait(0.05)
    (mirrored.here / "deep").mkdir()
    (mirrored.here / "deep" / "last").write_text("y")
    mirrored.close()
    assert contents(f"{bucket}/run") == {"lines": b"one\ntwo\n", "other": b"x", "deep/last": b"y"}
    assert not mirrored.here.exists()


def test_a_mirror_that_cannot_upload_keeps_its_files_and_says_where(bucket, monkeypatch, caplog):
    mirrored = Mirror(f"{bucket}/lost")
    (mirrored.here / "a").write_text("a")
    monkeypatch.setattr(mirror, "upload", lambda source, path: (_ for _ in ()).throw(OSError("gone")))
    mirrored.close()
    assert (mirrored.here / "a").read_text() == "a" and str(mirrored.here) in caplog.text

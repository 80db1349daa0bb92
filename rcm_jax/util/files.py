"""Files that are either whole or not there, on this machine and in object stores (gs://, s3://)."""

import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fsspec.config
from etils import epath

from rcm_jax.util.extras import require

os.environ.setdefault("EPATH_USE_TF", "no")  # epath would leave s3:// to TensorFlow wherever that is installed
STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # by scheme: the package that knows it, and our extra
MOST_JSON = 100_000_000  # bytes, as safetensors allows its headers
MOST_AXES = 32  # of an array in a file
SPECIAL = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def as_path(path: str | os.PathLike) -> Any:
    """A path that the user gave: pathlib's, or etils' with the same methods for an object store.

    ValueError for a scheme that is not in STORES or whose package is missing; OSError where the store does not answer.
    """
    scheme, slash, rest = os.fspath(path).partition(":/")
    if not slash or len(scheme) < 2 or "/" in scheme:
        return pathlib.Path(path)
    if scheme not in STORES:
        known = " and ".join(f"{name}://" for name in STORES)
        raise ValueError(f"{path}: {scheme}:// is no object store that is known here; {known} are")
    bucket = rest.strip("/").partition("/")[0]
    if not bucket:
        raise ValueError(f"{path} must name a bucket: {scheme}://BUCKET/…")
    _store(scheme, bucket)
    return epath.Path(f"{scheme}://{rest.lstrip('/')}")  # pathlib makes one slash of two


def stored(path: str | os.PathLike) -> bool:
    """Whether what `as_path` made lies in an object store."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> Any:
    """The same from the root, as libraries want it that do not know where this process stands."""
    place = as_path(path)
    return place if stored(place) else place.absolute()  # etils would look for it here


@functools.cache
def _store(scheme: str, bucket: str) -> Any:
    """The file system of a scheme, which answers for that bucket."""
    package, extra = STORES[scheme]
    require(package, extra, f"{scheme}://")
    logging.getLogger(package).setLevel(logging.CRITICAL)  # it raises what it logs, and gcsfs logs all of a traceback
    # TensorStore and other processes write what a listing that is kept would not have.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    try:
        store = fsspec.filesystem(scheme)
        with contextlib.suppress(PermissionError):  # some may see only a part of it
            store.exists(f"{bucket}/config.json")
        return store
    except (ValueError, OSError):
        raise
    except Exception as error:  # each package has its own
        raise OSError(f"{scheme}://{bucket} cannot be reached: {type(error).__name__}: {error}") from None


def store_of(path) -> tuple[Any, str]:
    """(fsspec's file system, name in it) of a path in an object store."""
    scheme, _, name = os.fspath(as_path(path)).partition("://")
    return _store(scheme, name.partition("/")[0]), name


def cache_folder() -> pathlib.Path:
    """Where copies of objects are kept on this machine: RCM_CACHE, else ~/.cache/rcm_jax."""
    return pathlib.Path(os.environ.get("RCM_CACHE") or "~/.cache/rcm_jax").expanduser()


def local(path: str | os.PathLike) -> pathlib.Path:
    """A file or folder where programs of this machine can open it: itself or, of an object store, a copy in the cache.

    A copy is made once for all processes, whole or not at all, and anew when an object has changed. FileNotFoundError
    for what is not there.
    """
    place = as_path(path)
    if not stored(place):
        return place
    store, name = store_of(place)
    files = store.find(name, detail=True)
    if not files:
        raise FileNotFoundError(f"{place}: no such file or folder")
    folder = cache_folder() / hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / place.name
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.exists() and name in files:
            write_whole(copy, lambda temporary: store.get_file(name, str(temporary)))
        elif not copy.exists():
            with new_folder(copy) as temporary:
                store.get(name.rstrip("/") + "/", f"{temporary}/", recursive=True)
    return copy


def size(path) -> int:
    """The bytes of a file that `as_path` named."""
    found = path.stat()
    return found.length if stored(path) else found.st_size


# --- reading what may be damaged, or made to do harm


def regular(path: str | os.PathLike) -> Any:
    """As `as_path`; ValueError for what is there and no file: to open a FIFO would wait for whoever writes to it."""
    place = as_path(path)
    if not stored(place) and not stat.S_ISREG(mode := place.stat().st_mode):
        raise ValueError(f"{place} is {SPECIAL.get(stat.S_IFMT(mode), 'something else')}, not a file")
    return place


def brief(value, most: int = 200) -> str:
    """What a file says, as it can stand in an error: cut, and with escapes for what cannot be printed."""
    text = str(value)
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:most])
    return shown if len(text) <= most else f"{shown}… ({len(text):,} characters)"


def listed(values: Iterable, most: int = 10, between: str = ", ") -> str:
    """The first of many, each `brief`, and how many more there are."""
    values = list(values)
    more = [f"{len(values) - most:,} more"] if len(values) > most else []
    return between.join([*map(brief, values[:most]), *more])


@contextlib.contextmanager
def reading(path, problem: str, advice: str = "") -> Iterator[None]:
    """Whatever a damaged or hostile file makes its reader raise, as one ValueError: PATH PROBLEM: why, and advice.

    Errors of the system stay what they are, and name the file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a place before the begin of a file
            if error.errno and error.filename is None:
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise
        if isinstance(error, ValueError) and str(error).startswith((f"{path} ", f"{path}: ")):  # it names the file
            raise
        why = brief(error, 1000)
        if type(error) is not ValueError:
            why = f"{type(error).__name__}: {why}" if why else type(error).__name__
        raise ValueError(f"{path} {problem}: {why}{advice}") from None


def read_json(path: str | os.PathLike, problem: str = "is no JSON") -> Any:
    """What a JSON file holds; ValueError that says so of what is none, or too large."""
    with reading(path, problem):
        place = regular(path)
        if size(place) > MOST_JSON:
            raise ValueError(f"it has {size(place):,} bytes, and may have {MOST_JSON:,}")
        return parse_json(place.read_bytes())


def parse_json(data: bytes) -> Any:
    """Of UTF-8; ValueError where a key is there twice, RecursionError where too much is in each other."""
    return json.loads(data.decode(), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"named twice: {listed(sorted(name for name, count in counts.items() if count > 1))}")
    return found


# --- writing


@contextlib.contextmanager
def writing(path) -> Iterator[None]:
    """Errors of the system while a file is written name that file, not a temporary one; so do those of a full disk,
    which libraries tell in many words of their own."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) and error.errno else _full(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def _full(error: Exception) -> int | None:
    """The number of an error that tells of a full disk, or of a quota."""
    return next((number for number in (errno.ENOSPC, errno.EDQUOT) if os.strerror(number) in str(error)), None)


def write_whole(path: str | os.PathLike, write: Callable[[pathlib.Path], object]) -> None:
    """Calls write(temporary path), then renames or uploads: `path` is the old file or the whole new one."""
    place = as_path(path)
    if stored(place):
        with tempfile.TemporaryDirectory() as folder:
            write(temporary := pathlib.Path(folder, place.name))
            upload(temporary, place)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        with writing(place):
            write(temporary)
            os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def upload(source: pathlib.Path, path) -> None:
    """A file to an object store, where it is seen when it is whole; OSError that names it."""
    store, name = store_of(path)
    try:
        store.put_file(str(source), name)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text so that `path` is the old file or the whole new one."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_writable(path: str | os.PathLike, overwrite: bool = True) -> None:
    """OSError unless a file can be written there, in the place of one that is there if `overwrite`; the folders that it
    needs are made."""
    place = as_path(path)
    if place.is_dir():
        raise IsADirectoryError(f"{place} is a folder: name a file")
    if not overwrite and place.exists():
        raise FileExistsError(f"{place} is there: choose another name, or say --overwrite")
    if stored(place):
        probe = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        write_text(probe, "")
        probe.unlink()
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place.parent):
        pass


def empty(place) -> bool:
    """Whether nothing is at a path, or a folder with nothing in it (in a store, but for an object of its own name)."""
    return not place.exists() or (place.is_dir() and all(child == place for child in place.iterdir()))


def check_new_folder(path: str | os.PathLike) -> None:
    """ValueError unless `path` does not exist or is an empty folder, and can be written to; OSError of a store."""
    place = as_path(path)
    if not stored(place) and os.path.ismount(place := place.resolve()):
        raise ValueError(f"{place} is a mount point, which cannot be renamed to: choose a folder in it")
    if not empty(place):
        raise ValueError(f"{place} is there and not an empty folder: choose another")
    if stored(place):
        check_writable(place / "config.json")
        return
    parent = next(parent for parent in place.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"{place} cannot be made: {parent} is no folder that can be written to")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, last: str = "config.json") -> Iterator[pathlib.Path]:
    """A temporary folder to fill; at the end it becomes `path`, by a rename or an upload, on any failure it is removed.

    last: the file that is uploaded last, by which readers know that a folder of a store is whole.
    """
    check_new_folder(path)
    place = as_path(path)
    if stored(place):
        with tempfile.TemporaryDirectory() as folder, emptied_on_failure(place):
            yield pathlib.Path(folder)
            files = [file for file in sorted(pathlib.Path(folder).rglob("*")) if file.is_file()]
            for file in sorted(files, key=lambda file: file == pathlib.Path(folder, last)):
                upload(file, place / file.relative_to(folder).as_posix())
        return
    place = place.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        os.replace(temporary, place)
    except Exception as error:
        where = getattr(error, "filename", None) or (temporary if _full(error) else "")
        if str(where).startswith(str(temporary)):
            with writing(place / os.path.relpath(where, temporary)):  # the file will be sought where it was to be
                raise
        raise
    finally:
        if temporary.exists():
            _remove(temporary)


@contextlib.contextmanager
def emptied_on_failure(path) -> Iterator[None]:
    """What lies in a folder of a store, which was empty, is removed if what is inside fails."""
    try:
        yield
    except BaseException:
        store, name = store_of(path)
        with contextlib.suppress(Exception):  # the failure is told, not that of tidying up
            store.rm(store.find(name))
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder for good: threads of an interrupted writer may fill it again for a moment."""
    deadline, quiet = time.monotonic() + 60, 0
    while quiet < 5 and time.monotonic() < deadline:
        quiet = 0 if folder.exists() else quiet + 1
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)

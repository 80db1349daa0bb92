"""Files that are either whole or not there."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath


def as_path(path: str | os.PathLike) -> Any:
    """A path that the user gave: pathlib's, or etils' with the same methods for an object store (gs://, s3://, …)."""
    return epath.Path(path) if "://" in os.fspath(path) else pathlib.Path(path)


def write_whole(path: str | os.PathLike, write: Callable[[pathlib.Path], object]) -> None:
    """Calls write(temporary path beside `path`), then renames: `path` is the old file or the whole new one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text so that `path` is the old file or the whole new one."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_writable(path: str | os.PathLike) -> None:
    """OSError unless a file can be written there; the folders that it needs are made."""
    path = pathlib.Path(path)
    check_local(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def check_local(path: str | os.PathLike) -> None:
    """ValueError for an object store, where nothing can be written so far."""
    path = pathlib.Path(path)
    if path.parts and path.parts[0].endswith(":"):
        raise ValueError(f"{path}: only folders of this machine's file systems can be written so far")


def check_new_folder(path: str | os.PathLike) -> None:
    """ValueError unless `path` does not exist or is an empty folder, and can be renamed to."""
    check_local(path)
    path = pathlib.Path(path).resolve()
    if os.path.ismount(path):
        raise ValueError(f"{path} is a mount point, which cannot be renamed to: choose a folder in it")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there and not an empty folder: choose another")
    parent = next(parent for parent in path.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"{path} cannot be made: {parent} is no folder that can be written to")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path` to fill; at the end it is renamed to `path`, on any failure it is removed."""
    check_new_folder(path)
    path = pathlib.Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.exists():
            _remove(temporary)


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

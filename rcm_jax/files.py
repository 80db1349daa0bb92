"""Files that are either whole or not there."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator


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


def check_new_folder(path: str | os.PathLike) -> None:
    """ValueError unless `path` does not exist or is an empty folder, and can be renamed to."""
    path = pathlib.Path(path).resolve()
    if os.path.ismount(path):
        raise ValueError(f"{path} is a mount point, which cannot be renamed to: choose a folder in it")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there and not an empty folder: choose another")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path` to fill; at the end it is renamed to `path`, on any failure it is removed."""
    check_new_folder(path)
    path = pathlib.Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

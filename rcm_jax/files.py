"""Files that are either whole or not there."""

import os
import pathlib
from collections.abc import Callable


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

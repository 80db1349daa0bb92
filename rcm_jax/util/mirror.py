"""A folder of an object store that is written on this machine: stores append to no file, and answer late."""

import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Sequence

from absl import logging

from rcm_jax.util.files import as_path, stored, upload

EVERY = 30  # seconds between uploads


class Mirror:
    """`here` is a folder of this machine to write to. Of a local folder it is that folder itself; of one in a store a
    temporary one, of which a thread uploads what has changed, again and again, and for the last time when it is closed.

    brought: names of files that it begins with, if they are there. An upload that fails is tried again; if the last one
    does, a warning says where the files are.
    """

    def __init__(self, folder: str | os.PathLike, brought: Sequence[str] = ()):
        self.there = self.here = as_path(folder)
        self.thread = None
        if not stored(self.there):
            return
        self.here = pathlib.Path(tempfile.mkdtemp(prefix="rcm_jax."))
        for name in brought:
            if (self.there / name).exists():
                (self.here / name).write_bytes((self.there / name).read_bytes())
        self.sent: dict[pathlib.Path, tuple[int, int]] = {}  # (size, time) of what was uploaded
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._keep_sending, daemon=True)
        self.thread.start()

    def _keep_sending(self) -> None:
        while not self.closed.wait(EVERY):
            self._send()

    def _send(self) -> bool:
        """Uploads what has changed; whether all went well."""
        try:
            for file in sorted(self.here.rglob("*")):
                seen = file.stat().st_size, file.stat().st_mtime_ns
                if file.is_file() and self.sent.get(file) != seen:
                    upload(file, self.there / file.relative_to(self.here).as_posix())
                    self.sent[file] = seen
            return True
        except Exception as error:  # of the network: training need not end
            logging.warning("%s: not uploaded (%s: %s)", self.there, type(error).__name__, error)
            return False

    def close(self) -> None:
        """Uploads the rest, and removes the temporary folder."""
        if self.thread is None:
            return
        self.closed.set()
        self.thread.join()
        if self._send():
            shutil.rmtree(self.here, ignore_errors=True)
        else:
            logging.warning("what %s lacks is in %s", self.there, self.here)

"""A training that stands still: says what it waits for, and ends."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

HUNG = 4  # exit status


class Watch:
    """What a training is doing now, and since when."""

    def __init__(self):
        self.at("the start")

    def at(self, what: str) -> None:
        """Something new begins."""
        self.what, self.since = what, time.monotonic()


@contextlib.contextmanager
def watched(limit: float, end: Callable[[int], object] = os._exit) -> Iterator[Watch]:
    """A Watch; when nothing new began for `limit` seconds (0: never mind), a line on stderr says what was waited for,
    with the stacks of all threads, and the process ends."""
    watch, done = Watch(), threading.Event()

    def look():
        while not done.wait(min(10.0, limit / 4)):
            if time.monotonic() - watch.since > limit:
                print(
                    f"error: process {jax.process_index()} of {jax.process_count()} stands still: {watch.what} takes "
                    f"more than {limit:g} s (train.hang_after). Stacks of its threads follow; the same command goes on "
                    "from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                with contextlib.suppress(ValueError, OSError, AttributeError):  # a stderr that is no file
                    faulthandler.dump_traceback(sys.stderr)
                end(HUNG)
                return

    thread = threading.Thread(target=look, daemon=True)
    if limit:
        thread.start()
    try:
        yield watch
    finally:
        done.set()

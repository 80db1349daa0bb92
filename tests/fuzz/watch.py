"""A reader on a file, watched: what it raises, what it runs, and how much time and memory it takes."""

import sys
import time
import tracemalloc
from collections.abc import Callable

RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect"}
called: list[str] = []
watching = [False]


def canary(*_) -> None:
    """What hostile files name."""
    called.append("canary")


def _hear(event, _) -> None:
    if watching[0] and event in RUNS:
        called.append(event)


sys.addaudithook(_hear)


def watched(read: Callable[[], object], path, size: int) -> bool:
    """Whether a file of so many bytes was read. AssertionError where it raised anything but a line that names the file
    (ValueError or OSError), ran something, or took more than is in proportion to it."""
    called.clear()
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    watching[0] = True
    try:
        read()
        error = None
    except (ValueError, OSError) as caught:
        error = caught
    finally:
        watching[0] = False
    seconds, memory = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
    assert not called, called
    assert seconds < 2 + 200e-6 * size, f"{seconds:.1f} s for {size} bytes"
    assert memory < 3e6 + 400 * size, f"{memory:,} bytes for {size}"
    if error is not None:
        line = str(error)
        assert str(path) in line and "\n" not in line and len(line) < 5000, f"{type(error).__name__}: {line:.1000}"
    return error is None

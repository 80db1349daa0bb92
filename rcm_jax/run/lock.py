"""One training at a time in a workdir: a lock that a dead process does not keep.

DIR/lock.json says who trains there, and counts up as long as it lives. On the same machine the process itself is looked
for; of another machine the count must move.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rcm_jax.parallel import distributed
from rcm_jax.train.console import say
from rcm_jax.util.files import as_path, write_text

NAME = "lock.json"
BEAT, DEAD = 10.0, 40.0  # seconds between two counts; without one, after which its process is dead
SETTLED = 1.0  # seconds in which two that take over a dead one's lock have seen each other


@contextlib.contextmanager
def held(folder) -> Iterator[None]:
    """Inside, no other run trains in a workdir. ValueError, in every process, if one does. The first process holds it.

    If another run takes over all the same, because this one stood still for too long, this process ends at once.
    """
    path, ours = as_path(folder) / NAME, _identity()
    distributed.by_first(lambda: _take(path, ours))
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ours, done, _leave), daemon=True)
    if distributed.first():
        beating.start()
    try:
        yield
    finally:
        done.set()
        if distributed.first():
            beating.join()
            if _token(_read(path)) == ours["token"]:
                path.unlink(missing_ok=True)


def _identity() -> dict:
    """Who this process is. place: the machine and its process numbers, as they are since it started; "": unknown."""
    pid, place, born = os.getpid(), "", ""
    with contextlib.suppress(OSError):  # no Linux
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place, born = f"{boot} {os.readlink('/proc/self/ns/pid')}", _born(pid)
    return {
        "host": socket.gethostname(), "pid": pid, "place": place, "born": born, "token": secrets.token_hex(8),
        "count": 0,
    }  # fmt: skip


def _born(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; "": there is none."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _read(path) -> dict | None:
    """What the lock says; None: there is none, {}: nothing that can be understood."""
    try:
        there = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return there if isinstance(there, dict) else {}


def _token(there: dict | None) -> object:
    return there.get("token") if there else None


def _take(path, ours: dict) -> None:
    there = _read(path)
    if there is not None and _alive(path, there):
        raise ValueError(
            f"{path.parent} is being trained in by process {there.get('pid')} on {there.get('host')}: stop that run, "
            "or choose another --workdir"
        )
    write_text(path, json.dumps(ours))
    if there is not None:
        time.sleep(SETTLED)
    if _token(_read(path)) != ours["token"]:
        raise ValueError(f"{path.parent}: another run has begun at the same moment: choose another --workdir")


def _alive(path, there: dict) -> bool:
    """Whether the process that wrote a lock is still there."""
    if there.get("place") and there["place"] == _identity()["place"]:
        return bool(there.get("born")) and _born(there.get("pid", 0)) == there["born"]
    say(f"{path} is of process {there.get('pid')} on {there.get('host')}: waiting {DEAD:.0f} s for a sign of life")
    until = time.monotonic() + DEAD
    while time.monotonic() < until:
        time.sleep(min(1.0, DEAD / 10))
        now = _read(path)
        if now != there:
            return now is not None
    return False


def _beat(path, ours: dict, done: threading.Event, leave: Callable[[str], None]) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):  # a store that does not answer now may do so later
            there = _read(path)
            if there and _token(there) != ours["token"]:
                leave(f"process {there.get('pid')} on {there.get('host')} has taken over {path.parent}")
                return
            ours = ours | {"count": ours["count"] + 1}
            write_text(path, json.dumps(ours))


def _leave(reason: str) -> None:
    print(f"error: {reason}: this run ends without saving", file=sys.stderr, flush=True)
    os._exit(2)

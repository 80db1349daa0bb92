"""Several processes: how they meet, what each of them reads, and that the first alone speaks and writes.

Every process runs the same program on the same config; jax.devices() are those of all. Parameters and checkpoints are
sharded over them as over the devices of one process.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from rcm_jax.parallel.sharding import batch_sharding

HEARTBEAT = 120  # seconds of silence after which a process counts as dead; a host may stall so long in a save


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    heartbeat: int = HEARTBEAT,
) -> None:
    """Joins the other processes, before anything of JAX is used. Without arguments the environment of SLURM, Open MPI,
    Kubernetes, GKE or a Cloud TPU VM says where they are.

    coordinator: host:port of process 0, free there; processes: how many; process: which this is; heartbeat: seconds of
    silence after which one counts as dead, and all others end. ValueError if some of the three are missing, or the
    environment says nothing; RuntimeError if the others do not come.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"{' and '.join(missing)} is missing: give --coordinator, --processes and --process, or none")
    if process is not None and processes is not None and not 0 <= process < processes:
        raise ValueError(f"--process={process} must be from 0 to {processes - 1}, as --processes={processes}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=heartbeat)
    except ValueError as error:
        raise ValueError(f"no cluster is known by the environment ({error}): give --coordinator and the rest") from None
    if not first():
        logging.disable(logging.WARNING)  # what the first says for all


def several() -> bool:
    """Whether there is more than this process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process writes files, metrics and what is shown on the console."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns when all processes are here."""
    if several():
        multihost_utils.sync_global_devices(name)


def told_by_first(word: str) -> str:
    """What the first process says, in all of them; all must call it."""
    return _told_by(0, word) if several() else word


def told_by_any(word: str) -> str:
    """What one of the processes that have something to say says, in all of them; "" if none has. All must call it."""
    if not several():
        return word
    speak = np.ravel(multihost_utils.process_allgather(np.asarray(bool(word))))
    return _told_by(int(np.argmax(speak)), word) if speak.any() else ""


def _told_by(process: int, word: str) -> str:
    source, text = jax.process_index() == process, np.frombuffer(word.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text)), is_source=source))
    buffer = np.zeros(length, np.uint8)
    if source:
        buffer[:] = text
    return bytes(multihost_utils.broadcast_one_to_all(buffer, is_source=source)).decode() if length else ""


def by_first(work: Callable[[], object]) -> None:
    """The first process alone works, and all hear its verdict: its ValueError or OSError is an error in all of them."""
    refusal = None
    if first():
        try:
            work()
        except (ValueError, OSError) as error:
            refusal = error
    if word := told_by_first(str(refusal or "")):
        raise refusal or ValueError(word)


def agree(own: Mapping[str, str]) -> None:
    """ValueError in every process unless all have the same words of the same names; all must call it."""
    if not several():
        return
    firsts = json.loads(told_by_first(json.dumps(own)))
    differing = [name for name in {**firsts, **own} if firsts.get(name) != own.get(name)]
    others = np.flatnonzero(multihost_utils.process_allgather(np.array(bool(differing))))
    if differing:
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        shown = "; ".join(f"{name} is {firsts.get(name)} there, {own.get(name)} here" for name in differing[:5])
        raise ValueError(f"process {jax.process_index()} was started otherwise than process 0: {shown}{more}")
    if others.size:
        named = ", ".join(map(str, others[:5])) + (" …" if others.size > 5 else "")
        raise ValueError(f"other processes ({named}) were started otherwise than process 0; their own errors say how")


def local_rows(batch_size: int, mesh) -> np.ndarray:
    """The rows of a global batch that the devices of this process hold, rising."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places]))


def global_batch(rows, batch_size: int, mesh):
    """The global batch of which this process has those local_rows: a pytree of [local, ...] to one of [b, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:])), rows)


def on_host(tree):
    """The whole of small arrays, in numpy, in every process; all must call it."""
    return multihost_utils.process_allgather(tree, tiled=True) if several() else jax.device_get(tree)


def leave(error: Exception) -> None:
    """Ends this process at once, with a line, because another is gone: waiting for it at exit would take minutes."""
    reason = str(error).splitlines()[0]
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} lost the others ({reason}); "
        "start all again with the same command: they go on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)

"""One of two processes that keep checkpoints together: python -m tests.train.two_processes PORT PROCESS WORKDIR"""

import sys

import jax
import numpy as np

from rcm_jax.parallel import distributed
from rcm_jax.train import checkpoint
from rcm_jax.train.rotation import Rotation


def main(port: str, process: int, workdir: str) -> None:
    """Saves three checkpoints; then the second process alone finds the last one damaged."""
    distributed.initialize(f"127.0.0.1:{port}", 2, process)
    from tests.train.test_checkpoint_damage import ABSTRACT, Data, make_state  # which use devices

    with Rotation(workdir, ABSTRACT, keep=2, asynchronous=True) as kept:
        for step in (2, 4, 6):
            kept.save(make_state(step), Data(step))
        kept.finish(make_state(6), Data(6))
        print("kept", kept.steps, flush=True)
    read = checkpoint.ocp.PyTreeCheckpointHandler.restore

    def restore(handler, folder, *args, **kwargs):
        if process == 1 and "checkpoints/6" in str(folder):
            raise OSError("a bad sector")
        return read(handler, folder, *args, **kwargs)

    checkpoint.ocp.PyTreeCheckpointHandler.restore = restore
    try:
        checkpoint.restore_item(workdir, "ema", ABSTRACT.ema)
    except ValueError as error:
        print("refused", str(error).split(" in ")[0], "a bad sector" in str(error), flush=True)
    with Rotation(workdir, ABSTRACT, keep=2) as kept:
        restored = kept.restore(Data())
        same = jax.tree.map(lambda a, b: np.array_equal(local(a), local(b)), restored, make_state(4))
        print("restored", int(restored.step), all(jax.tree.leaves(same)), kept.steps, flush=True)


def local(x):
    """What this process has of an array."""
    return [np.asarray(shard.data) for shard in x.addressable_shards]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])

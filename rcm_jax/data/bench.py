"""How fast examples come from a disk, and how much memory that takes: the pipeline of training, with nobody training.

python -m rcm_jax.data.bench                      a set of Wan 1.3B's shapes, made for it and removed
python -m rcm_jax.data.bench --path=SET --shape=20,60,104,16

Prints examples and MB in a second, and by how much the process grew. Read a set that is larger than the memory, or the
system's cache is measured.
"""

import argparse
import itertools
import pathlib
import resource
import tempfile
import time

import ml_dtypes
import numpy as np

from rcm_jax import data
from rcm_jax.data import LatentsConfig
from rcm_jax.data.dataset import batches
from rcm_jax.data.latents import write

SHAPE, TEXT = (20, 60, 104, 16), (512, 4096)  # of Wan 1.3B


def peak() -> float:
    """GiB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make_set(folder, count: int) -> None:
    """Noise, x0 in float32 and text in bfloat16, as a built set of Wan's has them."""
    noise = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    text = np.zeros(TEXT, ml_dtypes.bfloat16)
    write(
        folder, ({"x0": noise + np.float32(i), "text": text} for i in range(count)), {"text": text}, shard_bytes=2**29
    )


def measure(path, shape, batch: int, count: int) -> str:
    """What `count` batches took, after four that fill the pipeline."""
    dataset = data.load(LatentsConfig(str(path), tuple(shape)))
    first = dataset.first
    size = sum(leaf.nbytes for leaf in (first["x0"], *first["cond"].values()))
    before, stream = peak(), batches(dataset.train, batch, seed=0)
    for _ in itertools.islice(stream, 4):
        pass
    started = time.perf_counter()
    for _ in itertools.islice(stream, count):
        pass
    rate = batch * count / (time.perf_counter() - started)
    return (
        f"{len(dataset.train)} examples of {size / 1e6:.1f} MB, batches of {batch} ({batch * size / 2**30:.2f} GiB): "
        f"{rate:.1f} examples/s, {rate * size / 1e6:.0f} MB/s; memory grew by {peak() - before:.2f} GiB"
    )


def main():
    """Measures."""
    parser = argparse.ArgumentParser(description="The pipeline of training, with nobody training.")
    parser.add_argument("--path", default="", help="a set of latents; one is made if not given")
    parser.add_argument("--shape", default=",".join(map(str, SHAPE)), help="of its x0")
    parser.add_argument("--batch", type=int, default=8, help="examples of a batch that one host reads")
    parser.add_argument("--count", type=int, default=40, help="batches")
    parser.add_argument("--examples", type=int, default=256, help="of the set that is made, 12 MB each")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.path or pathlib.Path(folder) / "set"
        if not given.path:
            make_set(path, given.examples)
        print(measure(path, [int(n) for n in given.shape.split(",")], given.batch, given.count))


if __name__ == "__main__":
    main()

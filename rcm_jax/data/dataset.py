"""What a data set gives the rest, and the stream of training batches whose position is part of the checkpoint."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

# How samples are shown: images in a grid, a row for each class; points in the plane; latents, which take a decoder.
VIEWS = ("grid", "scatter", "video")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples {"x0": [n, ...] of unit variance, "cond": {name: [n, ...]}}, in memory or read when they are asked for.

    The first are dicts of arrays; the others have len() and give the batch of examples[rows], rows [b] of int.
    """

    train: Any
    test: Any | None
    uncond: Any  # the conditions that guidance replaces, without the leading axis: null class, negative prompt
    num_classes: int | None  # None: not of classes
    view: str  # how samples are shown; VIEWS
    to_image: Callable | None = None  # of a grid: x0 [n, ...] -> numpy images in [0, 1]
    velocity: Callable | None = None  # F(params, x, t, cond) of the data themselves, where it is known; ignores params

    def __post_init__(self):
        if self.view not in VIEWS or (self.view == "grid") != (self.to_image is not None):
            raise ValueError(
                f"view {self.view!r} must be one of {', '.join(VIEWS)}; a grid, and no other, has to_image"
            )

    @property
    def first(self) -> dict:
        """The first example as a batch of one."""
        return random_access(self.train)[np.arange(1)]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.first["x0"].shape[1:]


class Examples:
    """Random access to a pytree of arrays [n, ...], as grain wants it."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(jax.tree.leaves(self.arrays)[0])

    def __getitem__(self, i):
        return jax.tree.map(lambda a: a[i], self.arrays)


def random_access(examples):
    """Examples that have len() and take rows, from either kind of a Dataset."""
    return Examples(examples) if isinstance(examples, Mapping) else examples


def batches(
    examples, batch_size: int, seed: int, rows: np.ndarray | slice = slice(None), leave_out: Sequence[int] = ()
) -> grain.DatasetIterator:
    """Endless shuffled batches [batch_size, ...]; get_state and set_state of the iterator are its position.

    Each has besides "index" [batch_size], int: where all of its examples stand in the data, those of other processes
    included. rows: those of every batch that are read, the others being for other processes. The position is that of
    them all. leave_out: examples in whose place the next ones stand; the order of the others stays as it is.

    Every epoch is a new permutation, and batches run over epoch borders: no example is dropped. In memory are
    indices and four batches ahead, however many examples there are.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} must be at least 1")
    # One thread is enough to index arrays; a disk is read for four batches at a time. The order is the same.
    threads = 1 if isinstance(examples, Mapping) else 4
    source = random_access(examples)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size)
    instead = replacements(leave_out, len(source))

    def read(batch):  # whole batches are gathered at once: one indexing per array, not one per example
        index = np.array([instead.get(i, i) for i in np.asarray(batch).tolist()])
        return source[index[rows]] | {"index": index}

    return iter(order.map(read).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)))


def replacements(leave_out: Sequence[int], count: int) -> dict[int, int]:
    """{example left out: the next one that is not}; ValueError for one that is not there, or if none is left."""
    gone = set(leave_out)
    if strange := sorted(i for i in gone if not 0 <= i < count):
        raise ValueError(f"train.leave_out names example {strange[0]}, but the data have {count}, from 0")
    if len(gone) == count:
        raise ValueError(f"train.leave_out names all {count} examples of the data")
    return {i: next(k % count for k in itertools.count(i + 1) if k % count not in gone) for i in gone}

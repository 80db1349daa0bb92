"""What a data set gives the rest, and the stream of training batches whose position is part of the checkpoint."""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples, train and test: {"x0": [n, ...] of unit variance, "cond": {name: [n, ...]}}."""

    train: Any
    test: Any
    uncond: Any  # a condition without the leading axis: null class, negative prompt
    num_classes: int
    to_image: Callable  # x0 [n, ...] -> numpy images in [0, 1]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.train["x0"].shape[1:]


class Examples:
    """Random access to a pytree of arrays [n, ...], as grain wants it."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(jax.tree.leaves(self.arrays)[0])

    def __getitem__(self, i):
        return jax.tree.map(lambda a: a[i], self.arrays)


def batches(arrays, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled batches [batch_size, ...]; get_state and set_state of the iterator are its position.

    Every epoch is a new permutation, and batches run over epoch borders: no example is dropped.
    """
    examples = Examples(arrays)
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} must be at least 1")
    order = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat().batch(batch_size)
    # Whole batches are gathered at once: one indexing per array, not one per example.
    stream = order.map(lambda rows: examples[np.asarray(rows)])
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

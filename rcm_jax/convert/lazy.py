"""Tensors that are still in their files."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor still in its file: `np.asarray` reads it, anew each time. It stands in for an array in mappings."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("a tensor in a file cannot be an array without being read; leave copy=False out")
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

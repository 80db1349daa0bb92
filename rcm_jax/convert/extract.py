"""The low-rank adapter that comes nearest to the difference of two networks, kernel by kernel, by singular vectors."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import scipy.linalg

from rcm_jax.convert import table
from rcm_jax.util.extras import require

DENSE = 1024  # the smaller side of kernels up to which all singular values are computed


class Extracted(NamedTuple):
    """A [r, in] and B [out, r], float32, of one kernel of one layer, as files of adapters have them.

    size and left: Frobenius norms of the difference, and of what B·A leaves of it.
    """

    module: str
    entry: table.Entry
    down: np.ndarray
    up: np.ndarray
    size: float
    left: float


def extract(
    base: Mapping, tuned: Mapping, modules: Mapping[str, table.Entry], rank: int, wanted: Callable[[str], bool]
) -> Iterator[Extracted]:
    """One by one, those of modules (convert.adapters.modules_of) whose paths in our parameters are wanted.

    base, tuned: {module + ".weight": array [out, in]}. A kernel with a side below the rank has that side as its rank.
    """
    for module, entry in modules.items():
        if wanted(entry.rule.ours.removesuffix("/kernel")):
            name = f"{module}.weight"
            change = np.asarray(tuned[name]).astype(np.float64) - np.asarray(base[name]).astype(np.float64)
            yield Extracted(module, entry, *nearest(change, min(rank, *change.shape)))


def nearest(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(A [r, in], B [out, r], ‖change‖, ‖change − B·A‖) of a matrix [out, in]; both take the roots of singular values.

    Exact up to DENSE, else by scikit-learn's randomised method (arXiv 0909.4061), in float32.
    """
    if min(change.shape) <= max(DENSE, rank):
        u, s, v = scipy.linalg.svd(change, full_matrices=False)
    else:
        extmath = require("sklearn.utils.extmath", "demo", "singular vectors of large matrices")
        u, s, v = extmath.randomized_svd(change.astype(np.float32), rank, n_oversamples=16, n_iter=4, random_state=0)
    root = np.sqrt(s[:rank])
    down, up = (root[:, None] * v[:rank]).astype(np.float32), (u[:, :rank] * root).astype(np.float32)
    left = np.linalg.norm(change - up.astype(np.float64) @ down.astype(np.float64))
    return down, up, float(np.linalg.norm(change)), float(left)

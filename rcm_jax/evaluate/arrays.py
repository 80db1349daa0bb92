"""Checked inputs for the statistics, and Euclidean distances in blocks. Everything here is numpy float64."""

from collections.abc import Iterator

import numpy as np
from scipy.spatial.distance import cdist

from rcm_jax.data.dataset import random_access

BLOCK = 1 << 22  # distances held at once (32 MiB)
PRODUCTS = 1 << 30  # differences; for more of them squares are multiplied out, a hundred times as fast
MOST = 50_000  # examples that are brought to memory


def as_samples(name: str, x, *, at_least: int = 1) -> np.ndarray:
    """x as float64 [n, f]; ValueError (naming `name`) unless it is 2-D, finite and has `at_least` samples."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} has shape {x.shape}, expected [samples, features]; reshape images to [n, h*w*c]")
    if len(x) < at_least:
        raise ValueError(f"{name} has {len(x)} sample(s), at least {at_least} are needed; draw more samples")
    require_finite(name, x)
    return x


def as_labels(name: str, labels, n: int) -> np.ndarray:
    """labels as an integer array [n]; ValueError on another shape or on fractions."""
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"{name} has shape {labels.shape}, expected ({n},): one integer for each of the {n} samples")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} has dtype {labels.dtype}, expected integers; use argmax on one-hot labels")
    return labels


def as_images(name: str, images) -> np.ndarray:
    """images as float32 [n, h, w, c]; ValueError unless 4-D, not empty and finite."""
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{name} has shape {images.shape}, expected [n, h, w, c] with n >= 1, channels last")
    require_finite(name, images)
    return images


def flat(images: np.ndarray) -> np.ndarray:
    """[n, ...] → [n, f]."""
    return images.reshape(len(images), -1)


def labelled(examples) -> tuple[np.ndarray, np.ndarray]:
    """(x0 [n, ...], labels [n]) of the training or held-out examples of a Dataset: of those that are read when they are
    asked for MOST, evenly spaced; of others all."""
    source = random_access(examples)
    count = len(source) if source is not examples else min(len(source), MOST)
    batch = source[np.arange(count) * len(source) // count]
    return batch["x0"], batch["cond"]["label"]


def require_finite(name: str, x: np.ndarray) -> None:
    """ValueError that counts the samples (first axis) holding NaN or infinite values, if there are any."""
    bad = ~np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{name}: {bad.sum()} of {len(x)} samples hold NaN or infinite values (the first: {bad.argmax()}); "
            "the network or the sampler diverged: find out where, or drop these samples before measuring"
        )


def distance_blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Euclidean distances between all rows of a [n, f] and b [m, f]: pairs (rows of a, distances [rows, m]).

    Differences are formed before they are squared, so equal rows are at distance exactly 0. Of sets that have more than
    PRODUCTS of them ‖a‖² + ‖b‖² − 2ab is taken: exact to about 1e-8 of the largest norm.
    """
    step, large = max(1, BLOCK // len(b)), len(a) * b.size > PRODUCTS
    squares = np.einsum("nf,nf->n", b, b) if large else None
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        if large:
            near = np.einsum("nf,nf->n", a[rows], a[rows])[:, None] + squares - 2 * (a[rows] @ b.T)
            yield rows, np.sqrt(np.maximum(near, 0))
        else:
            yield rows, cdist(a[rows], b)

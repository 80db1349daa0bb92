"""How different samples of one class are: the first thing a mode-seeking loss loses."""

import numpy as np

from rcm_jax.evaluate.arrays import as_labels, as_samples, distance_blocks


def within_class_distance(samples, labels) -> float:
    """Mean Euclidean distance between two different samples [n, f] of one class (labels [n]), averaged over classes.

    All pairs count, in float64; every class weighs the same. Divide by the teacher's value to see what distillation
    kept: 1 is all of it, 0 a single image per class.

    Raises:
      ValueError: wrong shapes, labels that are not integers, a class with one sample, NaN or infinite values.
    """
    samples = as_samples("samples", samples)
    labels = as_labels("labels", labels, len(samples))
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"class {classes[counts.argmin()]} has one sample, a distance needs two; draw at least 2 samples of each "
            f"of the {len(classes)} classes"
        )
    return float(np.mean([_mean_distance(samples[labels == label]) for label in classes]))


def _mean_distance(x: np.ndarray) -> float:
    """Mean distance over the n (n − 1) ordered pairs of different rows."""
    return sum(distance.sum() for _, distance in distance_blocks(x, x)) / (len(x) * (len(x) - 1))

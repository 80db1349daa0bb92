"""Precision, recall, density and coverage: fidelity and diversity from balls around nearest neighbours."""

import numpy as np

from rcm_jax.evaluate.arrays import as_samples, distance_blocks


def neighbour_metrics(real, generated, k: int = 5) -> dict[str, float]:
    """{"precision", "recall", "density", "coverage"} of generated [m, f] against real [n, f], by exact counting.

    Each point's ball reaches to its k-th nearest neighbour in its own set, the point itself not counted.
    precision: share of generated points in the ball (<=) of at least one real point; recall: the same with the
    roles exchanged (Kynkäänniemi et al., 1904.06991). density: real balls (<) around a generated point, divided by k,
    on average (may exceed 1); coverage: share of real balls (<) that hold a generated point (Naeem et al.,
    2002.09797). Computed in float64, O(nm f), in blocks.

    Raises:
      ValueError: not [samples, features], different f, k < 1, fewer than k + 1 points in a set, NaN or infinity.
    """
    real, generated = as_samples("real", real), as_samples("generated", generated)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real has {real.shape[1]} features and generated has {generated.shape[1]}; use the same feature extractor"
        )
    real_radii, generated_radii = neighbour_radii(real, k), neighbour_radii(generated, k)
    precise = np.zeros(len(generated), bool)
    recalled = dense = covered = 0
    for rows, distance in distance_blocks(real, generated):
        radii = real_radii[rows, None]
        precise |= (distance <= radii).any(axis=0)
        recalled += np.count_nonzero((distance <= generated_radii).any(axis=1))
        inside = distance < radii
        dense += np.count_nonzero(inside)
        covered += np.count_nonzero(inside.any(axis=1))
    metrics = {
        "precision": precise.mean(),
        "recall": recalled / len(real),
        "density": dense / (k * len(generated)),
        "coverage": covered / len(real),
    }
    return {name: float(value) for name, value in metrics.items()}


def neighbour_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Distance [n] of every row of x [n, f] to its k-th nearest other row; ValueError unless 1 <= k < n."""
    if not 1 <= k < len(x):
        raise ValueError(
            f"the distance to neighbour k = {k} needs k >= 1 and at least {k + 1} samples, got {len(x)}; "
            f"draw more samples or lower k"
        )
    # Place 0 of every sorted row is the point itself, at distance 0.
    return np.concatenate([np.partition(distance, k, axis=1)[:, k] for _, distance in distance_blocks(x, x)])

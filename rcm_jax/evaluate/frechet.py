"""Fréchet distance between two sets of samples, without a covariance matrix or its square root."""

from typing import NamedTuple

import numpy as np

from rcm_jax.evaluate.arrays import as_samples


class Gaussian(NamedTuple):
    """mean [f] and factor [k, f], float64: the covariance is factorᵀ·factor."""

    mean: np.ndarray
    factor: np.ndarray


def frechet_distance(a, b) -> float:
    """Squared 2-Wasserstein distance between the Gaussians fitted to a [n, f] and b [m, f] (Heusel et al., 1706.08500).

    With mu and S the means and covariances (divisor n − 1), this is ‖mu_a − mu_b‖² + tr(S_a + S_b − 2 (S_a S_b)^½).
    Let R_a, R_b [k, f] be factors of the covariances, S = RᵀR, from a QR decomposition of the centred samples.
    The trace of the square root is the nuclear norm of R_a R_bᵀ = U diag(s) Vᵀ, and the covariance part equals
    ‖R_a − UVᵀ R_b‖² (orthogonal Procrustes problem). Taken in this form it is a sum of squares: nothing is squared
    before it is factored, nothing cancels, and singular covariances (fewer samples than features) do no harm.

    Cost O((n + m) f k + k³) in float64, where k is f, or the larger number of samples if that is less (large images).
    The estimate is biased upwards for few samples: compare rows of equal n only.

    Raises:
      ValueError: not [samples, features], different f, fewer than 2 samples, NaN or infinite values.
    """
    return distance_of(fitted("a", a), fitted("b", b))


def fitted(name: str, x) -> Gaussian:
    """To samples x [n, f]; ValueError, naming `name`, as for frechet_distance."""
    x = as_samples(name, x, at_least=2)
    mean = x.mean(0)
    return Gaussian(mean, np.asarray(np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r")))


def of_moments(mean, covariance) -> Gaussian:
    """From a mean [f] and a covariance [f, f] alone: less exact, by 1e-6 or so, where that is nearly singular.

    ValueError unless they are of these shapes, finite, and the covariance symmetric.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not np.isfinite(covariance).all():
        raise ValueError(f"a mean {mean.shape} and a covariance {covariance.shape} must be [f] and [f, f], and finite")
    if not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-6 * np.abs(covariance).max()):
        raise ValueError(f"a covariance {covariance.shape} must be symmetric")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return Gaussian(mean, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)


def distance_of(a: Gaussian, b: Gaussian) -> float:
    """The distance of frechet_distance; ValueError for different f."""
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"a has {len(a.mean)} features and b has {len(b.mean)}; use the same feature extractor or image size for "
            "both"
        )
    k = max(len(a.factor), len(b.factor))
    r_a, r_b = (np.pad(g.factor, ((0, k - len(g.factor)), (0, 0))) for g in (a, b))
    u, _, vh = np.linalg.svd(r_a @ r_b.T)
    return float(np.sum((a.mean - b.mean) ** 2) + np.sum((r_a - u @ (vh @ r_b)) ** 2))

"""Fréchet distance between two sets of samples, without a covariance matrix or its square root."""

import numpy as np

from rcm_jax.evaluate.arrays import as_samples


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
    a, b = as_samples("a", a, at_least=2), as_samples("b", b, at_least=2)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"a has {a.shape[1]} features and b has {b.shape[1]}; use the same feature extractor or image size for both"
        )
    k = min(a.shape[1], max(len(a), len(b)))
    r_a, r_b = _covariance_factor(a, k), _covariance_factor(b, k)
    u, _, vh = np.linalg.svd(r_a @ r_b.T)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.sum((r_a - u @ (vh @ r_b)) ** 2))


def _covariance_factor(x: np.ndarray, k: int) -> np.ndarray:
    """R [k, f] with RᵀR = cov(x); rows that fewer than k samples leave over are zero."""
    r = np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r")
    return np.pad(r, ((0, k - len(r)), (0, 0)))

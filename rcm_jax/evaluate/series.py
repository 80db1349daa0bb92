"""Curves as report.png and the page draw them: (step, value) pairs, their moving average, their scale."""

import math

import numpy as np


def pairs(label: str, series) -> np.ndarray:
    """A series as float64 [k, 2]."""
    points = np.asarray(series, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"curve {label!r} has shape {points.shape}, expected [k, 2]: k >= 1 pairs (step, value)")
    return points


def smooth(points: np.ndarray) -> np.ndarray:
    """Moving average of the values of points [k, 2] over 1/30 of the curve; values that are not finite stay out."""
    values = points[:, 1]
    window = np.ones(1 + 2 * (len(values) // 60))
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0), window, "same")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(finite, total / np.convolve(finite, window, "same"), math.nan)


def logarithmic(values: np.ndarray) -> bool:
    """Whether they take a logarithmic scale: they are positive, and span a factor of 20."""
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > 20 * values.min())

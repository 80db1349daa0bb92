"""Averages of a student's parameters: power EMA (EDM2, arXiv 2312.02696), EMA with a half-life (EDM), and power EMAs of
other widths made afterwards from snapshots of those that were tracked (EDM2, section 3)."""

from collections.abc import Iterable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rcm_jax.train.state import TrainState
from rcm_jax.util.ranges import Count, Positive, below, config

Std = Annotated[float, below(0.001, 0.28)]  # relative, of a power EMA; the paper has 0.05, the official code 0.1


@config(kw_only=True)
class Averaged:
    """The part of a method's config that says how its student is averaged. Counts are updates of the student.

    By a power EMA of relative width ema_std or, if ema_half_life is set, an EMA with that half-life instead.
    """

    ema_std: Std = 0.05
    ema_half_life: Count | None = None  # images
    ema_ramp: Positive | None = None  # the half-life is at most this part of the images so far
    ema_tracks: tuple[Std, ...] = ()  # widths of further power EMAs, kept beside for reconstruction

    def __post_init__(self):
        if len(set(self.widths)) < len(self.widths):
            raise ValueError(f"EMA widths {', '.join(map(str, self.widths))}: one is there twice")
        if self.ema_ramp is not None and self.ema_half_life is None:
            raise ValueError(f"ema_ramp {self.ema_ramp} is a part of the images, and needs ema_half_life")

    @property
    def widths(self) -> tuple[float, ...]:
        """Of all power EMAs."""
        return (() if self.ema_half_life else (self.ema_std,)) + self.ema_tracks

    def powers(self, state: TrainState) -> dict:
        """All power EMAs of a state, by their widths."""
        trees = (() if self.ema_half_life else (state.ema,)) + (state.tracks or ())
        return dict(zip(self.widths, trees, strict=True))

    def averages(self, state: TrainState, params, batch_size: int, applied) -> dict:
        """{"ema", "tracks"} after the update of state.student to params; as they were if it was not applied."""

        def follow(tree, share):
            return optax.incremental_update(params, tree, jnp.where(applied, share, 0.0))

        def power(std):
            return power_ema_share(state.student.updates, power_ema_exponent(std))

        share = power(self.ema_std)
        if self.ema_half_life:
            images = (state.student.updates + 1.0) * batch_size
            share = half_life_share(images, batch_size, self.ema_half_life, self.ema_ramp)
        tracks = zip(self.ema_tracks, state.tracks or (), strict=True)
        return {"ema": follow(state.ema, share), "tracks": tuple(follow(t, power(std)) for std, t in tracks) or None}


def power_ema_exponent(std: float) -> float:
    """gamma, the largest real root of [1, 7, 16 − s⁻², 12 − s⁻²] for relative width s (EDM2, arXiv 2312.02696)."""
    if not 0 < std < 0.28:
        raise ValueError(f"EMA width {std} must be above 0 and below 0.28 (the paper has 0.05, the official code 0.1)")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(np.max(roots.real[np.abs(roots.imag) < 1e-9]))


def power_ema_share(n, gamma: float):
    """1 − beta_n, what the n-th update of the network gives, n = 0, 1, …; exact in float32 also where it is small."""
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / (jnp.asarray(n, float) + 1)))


def power_ema_beta(n, gamma: float):
    """beta_n = (1 − 1/(n+1))^(gamma+1) for the n-th update of the network, n = 0, 1, …; beta_0 = 0."""
    return 1 - power_ema_share(n, gamma)


def half_life_share(images, batch_size: int, half_life: float, ramp: float | None = None):
    """1 − beta, beta = 2^(−batch_size/h), h = min(half_life, ramp·images), for an update that makes it `images` so far.

    The ramp is that of EDM2's code. EDM's own counts the images before the update: there the first has beta = 0.
    """
    h = half_life if ramp is None else jnp.minimum(half_life, ramp * images)
    return -jnp.expm1(-np.log(2) * batch_size / h)


def response(time, count: float, std: float):
    """The weight of the parameters at a time (in updates, or any unit) in a power EMA of `count`: its integral is 1."""
    gamma = power_ema_exponent(std)
    return np.where(time <= count, (gamma + 1) / count * (np.minimum(time, count) / count) ** gamma, 0.0)


def correlation(counts, stds, other_counts, other_stds) -> np.ndarray:
    """Integrals of products of responses, [k, m] float64, for power EMAs of (counts [k], stds [k]) and of m others."""
    s, t = np.asarray(counts, float)[:, None], np.asarray(other_counts, float)
    a, b = np.array([*map(power_ema_exponent, stds)])[:, None], np.array([*map(power_ema_exponent, other_stds)])
    first, last = np.minimum(s, t), np.maximum(s, t)
    return (a + 1) * (b + 1) / (a + b + 1) * (first / s) ** a * (first / t) ** b / last


def coefficients(counts, stds, count: float, std: float) -> tuple[np.ndarray, float]:
    """([k] float64, error): the power EMA of width std at `count` updates as a sum of k that were tracked.

    The response nearest to the wanted one in L2, scaled to the integral 1 as in EDM2's code; error is its distance from
    the wanted one, relative to the norm of that.
    """
    between, wanted = correlation(counts, stds, counts, stds), correlation([count], [std], [count], [std])[0, 0]
    to_wanted = correlation(counts, stds, [count], [std])[:, 0]
    solved = np.linalg.solve(between, to_wanted)
    solved = solved / np.sum(solved)
    left = solved @ between @ solved - 2 * solved @ to_wanted + wanted
    return solved, float(np.sqrt(max(left / wanted, 0.0)))


def combined(weights, trees: Iterable):
    """The sum of weights [k] times k trees, in numpy arrays of their dtypes; one of the trees is held at a time."""
    total = None
    for weight, tree in zip(map(float, weights), trees, strict=True):
        if total is None:
            total = jax.tree.map(lambda x, w=weight: np.asarray(x) * w, tree)
        else:
            total = jax.tree.map(lambda t, x, w=weight: np.add(t, np.asarray(x) * w, out=t), total, tree)
    return total

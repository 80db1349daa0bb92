"""Backward simulation: the student's own few-step samples, on which DMD and the fake score are trained.

Source: rCM, section 4 (after DMD2). Noise and times are inputs: a rollout is a pure function that recorded draws test.
"""

import math

import jax
import jax.numpy as jnp

from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.trigflow import Array, Batch


def random_times(key, distribution, max_steps: int, batch: int, within=trigflow.WHOLE) -> Array:
    """[max_steps, b] times: the last of a range of noise, pi/2 of all, then t_{n+1} = min(draw of p_D, t_n)."""
    draws = distribution.sample(key, (max_steps - 1, batch), within)
    return non_increasing(draws, trigflow.time_of(within[1]))


def fixed_times(mid_times, batch: int, first: float = math.pi / 2) -> Array:
    """[1 + len(mid_times), b] times: the first, then the given mid times."""
    draws = jnp.broadcast_to(jnp.asarray(mid_times, jnp.float32)[:, None], (len(mid_times), batch))
    return non_increasing(draws, first)


def non_increasing(draws: Array, first: float = math.pi / 2) -> Array:
    """Put the first time before draws [n, b] and take running minima: [n + 1, b]."""
    start = jnp.full_like(draws, first, shape=(1, *draws.shape[1:]))
    return jax.lax.cummin(jnp.concatenate([start, draws]), axis=0)


def rollout(F: denoiser.Velocity, params, noise: Array, times: Array, n, cond) -> Batch:
    """n student steps from pure noise; only the last one carries a gradient.

    noise [max_steps, b, ...]: noise[0] is x at times[0], noise[k] what is added back before step k.
    times [max_steps, b], non-increasing; n in 1..max_steps may be traced: one program serves every length.
    Returns x0 [b, ...], differentiable in params through the last f only.
    """
    frozen = jax.lax.stop_gradient(params)

    def step(k, x):
        x0 = denoiser.denoise(F, frozen, x, times[k], cond)
        return trigflow.diffuse(x0, noise[k + 1], times[k + 1])

    x = jax.lax.fori_loop(0, n - 1, step, noise[0])
    return denoiser.denoise(F, params, jax.lax.stop_gradient(x), times[n - 1], cond)

"""Backward simulation: the student's own few-step samples, on which DMD and the fake score are trained.

Source: rCM, section 4 (after DMD2). Noise and times are inputs: a rollout is a pure function that recorded draws test.
"""

import jax
import jax.numpy as jnp

from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.trigflow import Array, Batch


def random_times(key, distribution, max_steps: int, batch: int) -> Array:
    """[max_steps, b] times: pi/2, then t_{n+1} = min(draw of p_D, t_n)."""
    draws = distribution.sample(key, (max_steps - 1, batch))
    return non_increasing(draws)


def fixed_times(mid_times, batch: int) -> Array:
    """[1 + len(mid_times), b] times: pi/2, then the given mid times."""
    return non_increasing(jnp.broadcast_to(jnp.asarray(mid_times, jnp.float32)[:, None], (len(mid_times), batch)))


def non_increasing(draws: Array) -> Array:
    """Put pi/2 before draws [n, b] and take running minima: [n + 1, b]."""
    first = jnp.full_like(draws, jnp.pi / 2, shape=(1, *draws.shape[1:]))
    return jax.lax.cummin(jnp.concatenate([first, draws]), axis=0)


def rollout(F: denoiser.Velocity, params, noise: Array, times: Array, n, cond) -> Batch:
    """n student steps from pure noise; only the last one carries a gradient.

    noise [max_steps, b, ...]: noise[0] is x at pi/2, noise[k] what is added back before step k.
    times [max_steps, b], non-increasing; n in 1..max_steps may be traced: one program serves every length.
    Returns x0 [b, ...], differentiable in params through the last f only.
    """
    frozen = jax.lax.stop_gradient(params)

    def step(k, x):
        x0 = denoiser.denoise(F, frozen, x, times[k], cond)
        return trigflow.diffuse(x0, noise[k + 1], times[k + 1])

    x = jax.lax.fori_loop(0, n - 1, step, noise[0])
    return denoiser.denoise(F, params, jax.lax.stop_gradient(x), times[n - 1], cond)

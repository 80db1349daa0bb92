"""Samplers: few steps for students, the PF-ODE for teachers. Noise is an input, keyed per sample by `unit_noise`."""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax import denoiser, trigflow


def unit_noise(key, sample_ids, shape):
    """Unit noise [len(sample_ids), *shape], one key per sample: the same for any batch size or device count."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(sample_ids, jnp.uint32))
    return jax.vmap(lambda sample_key: jax.random.normal(sample_key, shape))(keys)


def student_times(sigma_max: float, mid_times) -> np.ndarray:
    """[1 + len(mid_times)] decreasing times of the few-step sampler: arctan(sigma_max), then mid_times."""
    times = np.array([np.arctan(sigma_max), *mid_times], np.float32)
    if np.any(np.diff(times) >= 0) or times[-1] <= 0:
        raise ValueError(
            f"few-step times must fall from arctan(sigma_max) = {times[0]:.4f} and stay above 0, got {times.tolist()}"
        )
    return times


def few_step(F: denoiser.Velocity, params, noise, times, cond):
    """Few-step sampling (rCM, algorithm 2): x ← cos(t')·f(x, t) + sin(t')·noise.

    noise [k, b, ...], times [k] decreasing from arctan(sigma_max); returns x0 [b, ...].
    """
    batch = noise.shape[1]

    def step(x, inputs):
        t, u, fresh = inputs
        x0 = denoiser.denoise(F, params, x, jnp.full((batch,), t), cond)
        return trigflow.diffuse(x0, fresh, jnp.full((batch,), u)), None

    # After the last step u = 0: x is x0 and the noise counts nothing.
    following = jnp.append(times[1:], 0.0)
    fresh = jnp.concatenate([noise[1:], jnp.zeros_like(noise[:1])])
    x0, _ = jax.lax.scan(step, noise[0], (jnp.asarray(times), following, fresh))
    return x0


def ode_times(steps: int, sigma_max: float, shift: float) -> np.ndarray:
    """[steps + 1] decreasing times from arctan(sigma_max) to 0, uniform in rectified-flow time before the shift k:
    sigma → k·sigma, so tan t = k·u/(1−u)."""
    u_max = sigma_max / (shift + sigma_max)
    u = np.linspace(u_max, 0, steps + 1)
    return np.arctan2(shift * u, 1 - u).astype(np.float32)


def euler(F: denoiser.Velocity, params, noise, times, cond):
    """Euler (DDIM) solution of the PF-ODE: noise [b, ...] at times[0], down times [steps + 1]; returns x [b, ...]."""
    batch = noise.shape[0]

    def step(x, interval):
        t, u = (jnp.full((batch,), time) for time in interval)
        return trigflow.euler(x, F(params, x, t, cond), t, u), None

    times = jnp.asarray(times)
    x, _ = jax.lax.scan(step, noise, (times[:-1], times[1:]))
    return x

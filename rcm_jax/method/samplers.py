"""Samplers: few steps for students, the PF-ODE for teachers. Noise is an input, keyed per sample by `unit_noise`."""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.trigflow import Array, Batch, Range

START = "start"  # a condition that no network has: x0 from which a network for less noise goes on


def unit_noise(key, sample_ids, shape) -> Batch:
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


def within(times, noise_range: Range) -> np.ndarray:
    """Of the times [k] at which a sampler calls a network, those in its range of noise, for which tau >= the lower end
    and < the upper one. ValueError if there are none."""
    times = np.asarray(times)
    if noise_range == trigflow.WHOLE:
        return times
    low, high = (trigflow.time_of(tau) if tau < 1 else np.inf for tau in noise_range)
    inside = times[(times >= low) & (times < high)]
    if not inside.size:
        raise ValueError(f"no time of {np.round(times, 4).tolist()} is in the range of noise {list(noise_range)}")
    return inside


def started(noise: Batch, time, cond: dict) -> tuple[Batch, dict]:
    """(what a sampler starts from, the conditions of its network): noise or, with the condition START, data x0 [b, ...]
    noised to a time."""
    if START not in cond:
        return noise, cond
    rest = {name: value for name, value in cond.items() if name != START}
    return trigflow.diffuse(cond[START], noise, jnp.full(noise.shape[:1], time)), rest


def few_step(F: denoiser.Velocity, params, noise: Array, times, cond) -> Batch:
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
    """[steps + 1] decreasing times from arctan(sigma_max) to 0, float32, uniform in rectified-flow time before the
    shift k: sigma → k·sigma, so tan t = k·u/(1−u). sigma_max = inf starts at pi/2."""
    if not (steps >= 1 and sigma_max > 0 and 0 < shift < np.inf):
        raise ValueError(
            "ODE times need steps >= 1, sigma_max > 0 and a finite shift > 0, "
            f"got steps = {steps}, sigma_max = {sigma_max}, shift = {shift}"
        )
    u = np.linspace(1 / (1 + shift / sigma_max), 0, steps + 1)
    return np.arctan2(shift * u, 1 - u).astype(np.float32)


def edm_times(steps: int, sigma_max: float, sigma_min: float, rho: float) -> np.ndarray:
    """[steps + 1] decreasing times, float32: noise levels from sigma_max to sigma_min, uniform in sigma^(1/rho) (EDM,
    arXiv 2206.00364, equation 5), and 0. Noise levels are tan t: EDM's, divided by the deviation of its data."""
    if not (steps >= 2 and 0 < sigma_min < sigma_max < np.inf and rho > 0):
        raise ValueError(
            "EDM's times need steps >= 2, 0 < sigma_min < sigma_max < inf and rho > 0, "
            f"got steps = {steps}, sigma_min = {sigma_min}, sigma_max = {sigma_max}, rho = {rho}"
        )
    levels = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    return np.append(np.arctan(levels), 0).astype(np.float32)


def euler(F: denoiser.Velocity, params, noise: Batch, times, cond) -> Batch:
    """Euler (DDIM) solution of the PF-ODE: noise [b, ...] at times[0], down times [steps + 1]; returns x [b, ...]."""
    batch = noise.shape[0]

    def step(x, interval):
        t, u = (jnp.full((batch,), time) for time in interval)
        return trigflow.euler(x, F(params, x, t, cond), t, u), None

    times = jnp.asarray(times)
    x, _ = jax.lax.scan(step, noise, (times[:-1], times[1:]))
    return x


def unipc_coefficients(times) -> np.ndarray:
    """The numbers of `unipc`: [steps, 7] float64, row i for times[i]: (c, c0, c1, c2) of the corrector that ends there,
    which multiply the corrected x_{i−1} and m_i, m_{i−1}, m_{i−2}, and (p, p0, p1) of the predictor that starts there,
    which multiply the corrected x_i and m_i, m_{i−1}. times: as for `unipc`; ValueError if they do not fall.

    With lambda = −log tan t, the data prediction m and the interval t -> u of length h in lambda, the PF-ODE reads
        x_u = (sin u/sin t)·x_t + cos u·int_0^h e^(z−h)·m(z) dz,    int_0^h e^(z−h)·(1, z/h, (z/h)²) dz = E·(1, b1, b2),
        E = 1 − e^−h,  b1 = 1/E − 1/h,  b2 = 1/E − 2·b1/h.
    The corrector puts the parabola through m_{i−2}, m_{i−1}, m_i for m(z); the predictor the line through m_{i−1}, m_i,
    with 1/2 for b1, as the B2(h) variant has it. The first interval has no earlier one and the last is of
    lower order: a constant predicts, a line with 1/2 for b1 corrects. g, the ratio of h to the interval before, is 0
    there, and also after an infinite interval, where it is the limit; e^−h = tan u/tan t is 0 at both ends.
    """
    times = np.asarray(times, np.float64)
    if len(times) < 2 or not np.all(np.diff(times) < 0) or times[0] > np.float32(np.pi / 2) or times[-1] < 0:
        raise ValueError(f"the times of UniPC must fall, from pi/2 or less to 0 or more, got {times.tolist()}")
    t, u = times[:-1], times[1:]
    # pi/2 in floating point is just off, float32's beyond it: sigma > 1e8 counts as infinite.
    cot = np.where(np.cos(t) > 1e-8, np.cos(t) / np.sin(t), 0)
    with np.errstate(divide="ignore"):
        h = -np.log(np.tan(u) * cot)
    E = -np.expm1(-h)
    b1 = 1 / E - 1 / h
    b2 = 1 / E - 2 * b1 / h
    g = np.zeros_like(h)
    g[1:-1] = h[1:-1] / h[:-2]

    c2 = -(b1 - b2) * g**2 / (1 + g)
    c0 = b1 - (b1 - b2) * g / (1 + g)
    c0[0] = 1 / 2
    scale, weight = np.sin(u) / np.sin(t), np.cos(u) * E
    correct = np.stack([scale, *weight * [c0, 1 - c0 - c2, c2]], axis=1)
    predict = np.stack([scale, *weight * [1 + g / 2, -g / 2]], axis=1)
    # The start needs no correction; the end is not corrected, for want of a network call there.
    return np.concatenate([np.vstack([[1, 0, 0, 0], correct[:-1]]), predict], axis=1)


def unipc(F: denoiser.Velocity, params, noise: Batch, times, cond) -> Batch:
    """UniPC (arXiv 2302.04867) solution of the PF-ODE: order 2, B2(h), data prediction, one call per step.

    noise [b, ...] at times[0], down times [steps + 1], which are concrete and may begin at pi/2 and end at 0; returns x
    [b, ...]. The formulas do not change under x → k(t)·x: these are the states of the rectified-flow sampler of
    NVlabs/rcm and Wan2.1, scaled. The network sees predicted states only; what it says there corrects them.
    """
    batch = noise.shape[0]

    def step(state, inputs):
        x, corrected, m1, m2 = state
        t, (c, c0, c1, c2, p, p0, p1) = inputs
        m0 = denoiser.denoise(F, params, x, jnp.full((batch,), t), cond)
        corrected = c * corrected + c0 * m0 + c1 * m1 + c2 * m2
        x = p * corrected + p0 * m0 + p1 * m1
        return (x, corrected, m0, m1), None

    zero = jnp.zeros_like(noise)
    table = jnp.asarray(unipc_coefficients(times), noise.dtype)
    (x, *_), _ = jax.lax.scan(step, (noise, noise, zero, zero), (jnp.asarray(times)[:-1], table))
    return x


def heun(F: denoiser.Velocity, params, noise: Batch, times, cond) -> Batch:
    """Heun's solution of the PF-ODE in the noise level (EDM, algorithm 1, without churn): two calls a step, one in the
    last. sCM calls it DPM-Solver-2S.

    noise [b, ...] at times[0] < pi/2, down times [steps + 1], which are concrete; returns x [b, ...]. With the noise
    eps = s·x + c·F and sigma = tan t, a step from t to u takes x/cos t along the mean of eps at t and, as Euler finds
    it, at u: x_u = cos u·(f + (sigma_u + sigma_t)/2·eps_t + (sigma_u − sigma_t)/2·eps_u).
    """
    batch, exact = noise.shape[0], np.asarray(times, np.float64)
    if len(exact) < 2 or not np.all(np.diff(exact) < 0) or np.tan(exact[0]) < 0 or np.tan(exact[0]) > 1e6:
        raise ValueError(f"the times of Heun must fall from below pi/2 (sigma_max is finite), got {exact.tolist()}")

    def parts(x, t):  # (f, eps)
        value, t = F(params, x, jnp.full((batch,), t), cond), trigflow.expand(jnp.full((batch,), t), x)
        return jnp.cos(t) * x - jnp.sin(t) * value, jnp.sin(t) * x + jnp.cos(t) * value

    def step(x, inputs):
        t, u, (near, far) = inputs
        f, eps = parts(x, t)
        _, eps_u = parts(jnp.cos(u) * f + jnp.sin(u) * eps, u)
        return jnp.cos(u) * f + near * eps + far * eps_u, None

    t, u = exact[:-2], exact[1:-1]
    weights = np.cos(u) * (np.tan(u) + np.tan(t)) / 2, np.cos(u) * (np.tan(u) - np.tan(t)) / 2
    inputs = [jnp.asarray(a, noise.dtype) for a in (t, u, *weights)]
    x, _ = jax.lax.scan(step, noise, (inputs[0], inputs[1], (inputs[2], inputs[3])))
    last = jnp.asarray(exact[-2:], noise.dtype)
    f, eps = parts(x, last[0])
    return jnp.cos(last[1]) * f + jnp.sin(last[1]) * eps


SOLVERS = {"euler": euler, "unipc": unipc, "heun": heun}

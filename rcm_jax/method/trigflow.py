"""TrigFlow: the time, noise and update formulas of the method. Numbered equations, no state.

Convention: data have unit variance, c = cos t, s = sin t, t in [0, pi/2], shape [b]. Noise level sigma = tan t.
Sources: sCM (arXiv 2410.11081, section 3), rCM (arXiv 2510.08431, section 3). Arrays x0, x, eps, F are [b, ...].
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rcm_jax.util.ranges import Shift, between, config

Array = jax.Array
Batch = Float[Array, "b ..."]  # samples, noise, velocities
Times = Float[Array, " b"]  # or any other number for each sample
Range = tuple[float, ...]  # of noise: its first and last rectified-flow time
WHOLE: Range = (0.0, 1.0)


def expand(t: Array, x: Array) -> Array:
    """t [b] -> [b, 1, ..., 1] with as many axes as x [b, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def diffuse(x0: Batch, eps: Batch, t: Times) -> Batch:
    """(1) x_t = c·x0 + s·eps: clean x0 and unit noise eps at times t."""
    t = expand(t, x0)
    return jnp.cos(t) * x0 + jnp.sin(t) * eps


def target(x0: Batch, eps: Batch, t: Times) -> Batch:
    """The derivative of (1) in t: c·eps − s·x0, what F is regressed on."""
    t = expand(t, x0)
    return jnp.cos(t) * eps - jnp.sin(t) * x0


def denoise(x: Batch, F: Batch, t: Times) -> Batch:
    """(2) f(x, t) = c·x − s·F: the clean sample that F predicts at x, t."""
    t = expand(t, x)
    return jnp.cos(t) * x - jnp.sin(t) * F


def euler(x: Batch, F: Batch, t: Times, u: Times) -> Batch:
    """(2) One Euler (DDIM) step of the PF-ODE dx/dt = F, exact for constant F along the circle: t -> u."""
    h = expand(u - t, x)
    return jnp.cos(h) * x + jnp.sin(h) * F


def rectified_flow_time(t: Array) -> Array:
    """(3) tau = s/(c+s), the rectified-flow time of equal signal-to-noise ratio."""
    return jnp.sin(t) / (jnp.cos(t) + jnp.sin(t))


def time_of(tau: float) -> float:
    """The time t of a rectified-flow time tau in [0, 1]: the inverse of `rectified_flow_time`, of numbers."""
    return math.atan2(tau, 1 - tau)


def to_rectified_flow(x: Batch, t: Times) -> tuple[Batch, Times]:
    """(3) (x_rf, tau) of equal signal-to-noise ratio: x_rf = x/(c+s), tau = s/(c+s)."""
    return x / expand(jnp.cos(t) + jnp.sin(t), x), rectified_flow_time(t)


def from_rectified_flow(x: Batch, v: Batch, t: Times) -> Batch:
    """(3) F = ((c−s)·x + v)/(c+s) from the rectified-flow velocity v = eps − x0; well conditioned for every t."""
    t = expand(t, x)
    c, s = jnp.cos(t), jnp.sin(t)
    return ((c - s) * x + v) / (c + s)


def rectified_flow_velocity(x: Batch, F: Batch, t: Times) -> Batch:
    """(3) v = (c+s)·F − (c−s)·x: the inverse of `from_rectified_flow`."""
    t = expand(t, x)
    c, s = jnp.cos(t), jnp.sin(t)
    return (c + s) * F - (c - s) * x


@config
class LogNormal:
    """log tan t ~ N(mean, std²): p_G of the paper, and of the sCM and EDM papers."""

    mean: Annotated[float, between(-20, 20)]
    std: Annotated[float, between(1e-3, 20)]

    def sample(self, key, shape, within: Range = WHOLE) -> Array:
        """Times in (0, pi/2), float32, of the given shape; within: cut to that range of noise."""
        if within == WHOLE:
            return self.from_normal(jax.random.normal(key, shape))
        low, high = self._normals(within)
        return self.from_normal(jax.random.truncated_normal(key, low, high, shape))

    def share(self, within: Range) -> float:
        """Of the times, those in a range of noise."""
        low, high = (math.erfc(-z / math.sqrt(2)) / 2 for z in self._normals(within))
        return high - low

    def _normals(self, within) -> list[float]:
        levels = (tau / (1 - tau) if tau < 1 else math.inf for tau in within)
        return [((math.log(level) if level else -math.inf) - self.mean) / self.std for level in levels]

    def from_normal(self, z) -> Array:
        """Times at the standard normals z."""
        return jnp.arctan(jnp.exp(self.mean + self.std * z))


@config
class ShiftedUniform:
    """Rectified-flow time uniform in [0, 1), then shifted: tan t = shift·u/(1−u); p_D of the paper has shift 5."""

    shift: Shift

    def sample(self, key, shape, within: Range = WHOLE) -> Array:
        """Times in [0, pi/2), float32, of the given shape; within: cut to that range of noise."""
        low, high = self.uniforms(within)
        return self.from_uniform(jax.random.uniform(key, shape, minval=low, maxval=high))

    def share(self, within: Range) -> float:
        """Of the times, those in a range of noise."""
        low, high = self.uniforms(within)
        return high - low

    def uniforms(self, within: Range) -> list[float]:
        """The uniforms of the ends of a range of noise."""
        return [tau / (self.shift - (self.shift - 1) * tau) for tau in within]

    def from_uniform(self, u) -> Array:
        """Times at the uniforms u in [0, 1]; u = 1 gives exactly pi/2 (no 1/(1−u))."""
        return jnp.arctan2(self.shift * u, 1 - u)


TimeDistribution = LogNormal | ShiftedUniform
TIMES = {"log_normal": LogNormal, "shifted_uniform": ShiftedUniform}


def one_of_times(default: TimeDistribution):
    """A field of a config: a distribution of times, by its name in TIMES."""
    return dataclasses.field(default=default, metadata={"kinds": TIMES})

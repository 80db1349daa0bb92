"""Consistency in discrete time, between points of the teacher's trajectory: the forward divergence without a jvp."""

import itertools
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.denoiser import Velocity
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives.common import Given, Objective, Term, sum_squares
from rcm_jax.method.trigflow import Array, Batch, Range, Times
from rcm_jax.util.ranges import Few, Positive, Shift, between, config


@config
class DcmConfig(Objective):
    """The student's x0 at t against its own after `skip` of `steps` teacher steps."""

    steps: Annotated[int, between(2, 1_000_000)] = 48
    skip: Few = 1
    shift: Shift = 5.0  # of the grid, uniform in rectified-flow time before the shift
    scale: Positive = 100.0

    label = "dCM"

    def __post_init__(self):
        if self.skip >= self.steps:
            raise ValueError(f"skip {self.skip} must be below steps, {self.steps}")

    def check_within(self, within: Range) -> None:
        """ValueError where less than the steps of one loss is in a range of noise."""
        self._grid(within)

    def _grid(self, within: Range) -> tuple[float, float]:
        """(the highest place on the grid, how far a loss may start below it)."""
        low, high = trigflow.ShiftedUniform(self.shift).uniforms(within)
        if (free := high - low - self.skip / self.steps) <= 0:
            raise ValueError(
                f"skip {self.skip} of {self.steps} steps do not fit in noise_range {list(within)}, which has "
                f"{(high - low) * self.steps:.2f} of them: set steps higher"
            )
        return high, free

    def times(self, u: Times, within: Range = trigflow.WHOLE) -> Array:
        """[skip + 1, b] falling times in a range of noise, a step of the grid apart, from u, uniform in [0, 1): they
        start anywhere."""
        k, (high, free) = jnp.arange(self.skip + 1)[:, None], self._grid(within)
        return trigflow.ShiftedUniform(self.shift).from_uniform(high - u * free - k / self.steps)

    def term(self, given: Given) -> Term:
        """The loss on the batch."""
        keys = named_keys(given.key, "time", "noise")
        x0 = given.batch["x0"]
        times = self.times(jax.random.uniform(keys["time"], x0.shape[:1]), given.within)
        x_t = trigflow.diffuse(x0, jax.random.normal(keys["noise"], x0.shape), times[0])
        values, metrics = loss(given.F.student, given.student, x_t, times, given.batch["cond"], given.teacher_F)
        return Term(values, metrics, times[0])


def loss(F: Velocity, params, x_t: Batch, times: Array, cond, teacher_F) -> tuple[Times, dict[str, Times]]:
    """‖f(x_t, times[0]) − sg[f(x_u, times[-1])]‖², x_u by Euler steps of the teacher, and metrics [b].

    x_t at times[0]; times [k, b] decreasing; teacher_F(x, t) -> [b, ...], guided. The steps are straight in t,
    x − (t − u)·F_T, as in the official code, not along the circle of (2): they agree as the interval shrinks.
    """
    x = x_t
    for t, u in itertools.pairwise(times):
        x = x - trigflow.expand(t - u, x) * teacher_F(x, t)
    target = denoiser.denoise(F, stop_gradient(params), x, times[-1], cond)
    values = sum_squares(denoiser.denoise(F, params, x_t, times[0], cond) - stop_gradient(target))
    finite = jnp.isfinite(values)
    values = jnp.where(finite, values, 0.0)
    return values, {"loss": values, "nonfinite": 1.0 - finite}

"""What to watch while a consistency model trains: see docs/stability.md for what a healthy run looks like."""

import math

import jax
import jax.numpy as jnp

from rcm_jax.method import trigflow
from rcm_jax.method.objectives.common import Given, sum_squares
from rcm_jax.method.objectives.scm import ScmConfig, jvp_derivative

BUCKETS = 4  # of equal width in t, from 0 to pi/2
WATCHED = ("tangent_norm", "residual", "nonfinite")
PROBED = (0.2, 0.6, 1.0, 1.4)  # times, of a narrower range of noise moved into it
STEP = 2e-4  # of the central difference: Wan's time features turn by up to 1000 radians per unit of t


def by_time(metrics: dict, t) -> dict:
    """{name/t0 … t3: (sum, count)} of the watched metrics [b] in equal parts of [0, pi/2], for times t [b]."""
    bucket = jnp.clip(jnp.floor(t / (jnp.pi / 2) * BUCKETS), 0, BUCKETS - 1)
    inside = {f"t{k}": bucket == k for k in range(BUCKETS)}
    return {
        f"{name}/{part}": (jnp.sum(jnp.where(mask, metrics[name], 0.0)), jnp.sum(mask))
        for name in WATCHED
        if name in metrics
        for part, mask in inside.items()
    }


def probe(config: ScmConfig, given: Given) -> dict:
    """{"probe/jvp_error/t=…": ‖jvp − difference‖/‖jvp‖} of the student's F along the PF-ODE, all [].

    The difference is a central one, of second order. What is small and steady is well; what grows says that the
    derivative, or the network's own smoothness in t, is going. For float32: in bfloat16 the difference is all rounding.
    """
    x0, cond = given.batch["x0"], given.batch["cond"]
    eps = jax.random.normal(given.key, x0.shape)

    def error(time):
        t = jnp.full(x0.shape[:1], time)
        x_t = trigflow.diffuse(x0, eps, t)
        F_teacher = config.direction(given, x0, eps, x_t, t)
        _, dF = jvp_derivative(given.F.student, given.student, x_t, t, cond, F_teacher)
        later, earlier = (
            given.F.student(given.student, trigflow.euler(x_t, F_teacher, t, u), u, cond) for u in (t + STEP, t - STEP)
        )
        difference = jnp.cos(time) * jnp.sin(time) * (later - earlier) / (2 * jnp.sin(STEP))
        return jnp.sqrt(jnp.sum(sum_squares(dF - difference)) / jnp.sum(sum_squares(dF)))

    times = PROBED
    if given.within != trigflow.WHOLE:
        low, high = map(trigflow.time_of, given.within)
        times = tuple(round(low + (high - low) * time / (math.pi / 2), 3) for time in PROBED)
    errors = jax.lax.map(error, jnp.array(times))  # one after another: one body, one batch in memory
    return {f"probe/jvp_error/t={time}": errors[i] for i, time in enumerate(times)}

"""Consistency in continuous time (sCM, arXiv 2410.11081; rCM, arXiv 2510.08431), the forward divergence."""

import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from rcm_jax.method import trigflow
from rcm_jax.method.denoiser import Velocity
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives.common import LIMITS, Given, Objective, Term, regression, sum_squares
from rcm_jax.method.trigflow import Batch, Times
from rcm_jax.util.ranges import Positive, among, config

STEP = 1e-4  # h of the finite differences, in t


@config
class ScmConfig(Objective):
    """sCM if it follows the teacher, sCT if it follows the data."""

    time: trigflow.TimeDistribution = trigflow.one_of_times(trigflow.LogNormal(-0.8, 1.6))  # p_G
    scale: Positive = 100.0
    follows: Annotated[str, among(lambda: FOLLOWED)] = "teacher"  # whose dx/dt is in (4) and (5)
    derivative: Annotated[str, among(lambda: DERIVATIVES)] = "jvp"  # of F along dx/dt
    warmup_form: Annotated[str, among(lambda: WARMUP_FORMS)] = "paper"  # where r stands in (5)
    limit: Annotated[str, among(LIMITS)] = "norm"  # what keeps the tangent small
    tangent_constant: Positive = 0.1  # c of g/(‖g‖ + c); papers of data of deviation sigma_d count it times sigma_d

    has_tangent = True

    @property
    def needs_teacher(self) -> bool:
        return self.follows == "teacher"

    @property
    def label(self) -> str:
        return "sCM" if self.needs_teacher else "sCT"

    def direction(self, given: Given, x0, eps, x_t, t):
        """dx/dt at x_t: what (4) goes along, and F_T of (5)."""
        return FOLLOWED[self.follows](given, x0, eps, x_t, t)

    def term(self, given: Given) -> Term:
        """(4)–(6) on the batch, at times of p_G."""
        keys = named_keys(given.key, "time", "noise")
        x0, cond = given.batch["x0"], given.batch["cond"]
        t = self.time.sample(keys["time"], x0.shape[:1], given.within)
        eps = jax.random.normal(keys["noise"], x0.shape)
        x_t = trigflow.diffuse(x0, eps, t)
        F_T = self.direction(given, x0, eps, x_t, t)
        values, metrics = loss(
            given.F.student, given.student, x_t, t, cond, F_T,
            r=given.r, warmup_form=self.warmup_form, derivative=self.derivative, limit=self.limit,
            constant=self.tangent_constant,
        )  # fmt: skip
        return Term(values, metrics, t)


# Whose trajectory the student follows: (given, x0, eps, x_t, t) -> dx/dt [b, ...]
FOLLOWED: dict[str, Callable] = {
    "teacher": lambda given, x0, eps, x_t, t: given.teacher_F(x_t, t),
    "data": lambda given, x0, eps, x_t, t: trigflow.target(x0, eps, t),
}


def loss(
    F: Velocity, params, x_t: Batch, t: Times, cond, F_teacher: Batch, *,
    r, warmup_form: str = "paper", derivative: str = "jvp", limit: str = "norm", constant: float = 0.1,
) -> tuple[Times, dict[str, Times]]:  # fmt: skip
    """(4)–(6) ‖F − sg[F] − sg[g]‖² with a limited tangent g, and metrics [b].

    r in [0, 1] is the tangent warm-up (may be traced). The metric "residual" is the root mean square of c·df/dt along
    F_teacher: 0 for a perfect consistency function of a teacher.
    """
    F_theta, dF = DERIVATIVES[derivative](F, params, x_t, t, cond, F_teacher)
    F_fixed, dF = stop_gradient((F_theta, dF))
    g = tangent(x_t, t, F_fixed, dF, F_teacher, r=r, warmup_form=warmup_form)
    c_df = tangent(x_t, t, F_fixed, dF, F_teacher, r=1.0, warmup_form=warmup_form)
    return regression(F_theta, F_fixed, g, limit, constant=constant, metrics={
        "teacher_gap": jnp.sqrt(sum_squares(F_fixed - F_teacher)),
        "residual": jnp.sqrt(sum_squares(c_df) / x_t[0].size),
    })  # fmt: skip


def jvp_derivative(F: Velocity, params, x_t, t, cond, F_teacher):
    """(4) (F, dF) by one jax.jvp along (c·s·F_T, c·s): dF [b, ...] carries the factor c·s, here and below."""
    cs = jnp.cos(t) * jnp.sin(t)
    return jax.jvp(lambda x, t: F(params, x, t, cond), (x_t, t), (trigflow.expand(cs, x_t) * F_teacher, cs))


def semi_derivative(F: Velocity, params, x_t, t, cond, F_teacher):
    """jvp in x alone, a finite difference in t: for networks whose time embedding has no usable derivative."""
    cs = trigflow.expand(jnp.cos(t) * jnp.sin(t), x_t)
    F_theta, dF = jax.jvp(lambda x: F(params, x, t, cond), (x_t,), (cs * F_teacher,))
    earlier = F(stop_gradient(params), x_t, t - STEP, cond)
    return F_theta, dF + cs * backward_difference(F_theta, earlier)


def discrete_derivative(F: Velocity, params, x_t, t, cond, F_teacher):
    """A finite difference along the PF-ODE: no forward mode at all."""
    cs = trigflow.expand(jnp.cos(t) * jnp.sin(t), x_t)
    F_theta = F(params, x_t, t, cond)
    earlier = F(stop_gradient(params), trigflow.euler(x_t, F_teacher, t, t - STEP), t - STEP, cond)
    return F_theta, cs * backward_difference(F_theta, earlier)


def backward_difference(F, earlier):
    """(cos h·F(t) − F(t − h))/sin h, as the official code has it: dF/dt to first order in h."""
    return (math.cos(STEP) * F - earlier) / math.sin(STEP)


DERIVATIVES = {"jvp": jvp_derivative, "semi": semi_derivative, "discrete": discrete_derivative}
WARMUP_FORMS = ("paper", "code", "scm")


def tangent(x_t, t, F, dF, F_teacher, *, r, warmup_form: str):
    """(5) g = −c·sqrt(1 − r²s²)·(F − F_T) − (r·c·s·x_t + r·dF), before normalisation; dF already carries c·s.

    warmup_form "paper" multiplies the whole second part by r, "code" (official HEAD) only c·s·x_t; "scm", of the sCM
    paper, is "paper" with c² in the place of c·sqrt(1 − r²s²). All are equal at r = 1.
    """
    if warmup_form not in WARMUP_FORMS:
        raise ValueError(f"warmup_form {warmup_form!r} is none of {', '.join(WARMUP_FORMS)}")
    t = trigflow.expand(t, x_t)
    c, s = jnp.cos(t), jnp.sin(t)
    r_jvp = 1.0 if warmup_form == "code" else r
    # sqrt(1 − r²s²) written without cancellation at r = 1, t near pi/2, where it is c
    root = c if warmup_form == "scm" else jnp.sqrt(c**2 + (1 - r**2) * s**2)
    return -c * root * (F - F_teacher) - (r * c * s * x_t + r_jvp * dF)

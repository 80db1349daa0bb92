"""Continuous-time consistency in the velocity of rectified flow (NVlabs/rcm since June 2026, use_rf_scm).

With tau the rectified-flow time, x_rf = (1 − tau)·x0 + tau·eps and v the velocity of a network, as in (3):
(5') g = −(v − v_T) − r·tau·dv/dtau, the derivative along (v_T, 1), limited as in (6);   loss ‖v − sg[v] − sg[g]‖².
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from rcm_jax.method import trigflow
from rcm_jax.method.denoiser import Velocity
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives.common import Given, Objective, Term, regression, sum_squares
from rcm_jax.method.trigflow import Batch, Times
from rcm_jax.util.ranges import Positive, config


@config
class RfScmConfig(Objective):
    """sCM without the preconditioning of TrigFlow; it always follows the teacher."""

    time: trigflow.TimeDistribution = trigflow.one_of_times(trigflow.LogNormal(-0.8, 1.6))  # p_G
    scale: Positive = 100.0

    label = "RF sCM"
    has_tangent = True

    def term(self, given: Given) -> Term:
        """(5') on the batch, at times of p_G."""
        keys = named_keys(given.key, "time", "noise")
        x0, cond = given.batch["x0"], given.batch["cond"]
        t = self.time.sample(keys["time"], x0.shape[:1], given.within)
        x_t = trigflow.diffuse(x0, jax.random.normal(keys["noise"], x0.shape), t)
        values, metrics = loss(given.F.student, given.student, x_t, t, cond, given.teacher_F(x_t, t), r=given.r)
        return Term(values, metrics, t)


def loss(F: Velocity, params, x_t: Batch, t: Times, cond, F_teacher: Batch, *, r) -> tuple[Times, dict[str, Times]]:
    """(5') and (6) at x_t of (1), and metrics [b]; F and F_teacher are the velocities of TrigFlow.

    dt/dtau = (c+s)², and tau = s/(c+s): the derivative along tau·(v_T, 1) in (x_rf, tau) is that along s·(c+s)·(F_T, 1)
    in (x, t). So nothing is lost where 1 − tau is small.
    """

    def velocity(x, t):
        return trigflow.rectified_flow_velocity(x, F(params, x, t, cond), t)

    speed = jnp.sin(t) * (jnp.cos(t) + jnp.sin(t))
    v, dv = jax.jvp(velocity, (x_t, t), (trigflow.expand(speed, x_t) * F_teacher, speed))
    v_fixed, dv = stop_gradient((v, dv))
    v_teacher = trigflow.rectified_flow_velocity(x_t, F_teacher, t)
    return regression(v, v_fixed, -(v_fixed - v_teacher) - r * dv, metrics={
        "teacher_gap": jnp.sqrt(sum_squares(v_fixed - v_teacher)),
        "residual": jnp.sqrt(sum_squares(v_fixed - v_teacher + dv) / x_t[0].size),
    })  # fmt: skip

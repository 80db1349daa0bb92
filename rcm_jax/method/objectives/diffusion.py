"""Regression on the velocity of the diffusion: how a teacher is pretrained, and a fake score is kept up to date."""

import jax
import jax.numpy as jnp

from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives.common import Given, Objective, Term, sum_squares
from rcm_jax.method.trigflow import Batch, Times
from rcm_jax.util.ranges import Probability, config


@config
class DiffusionConfig(Objective):
    """TrigFlow (flow matching) pretraining; conditions are dropped for guidance. A mean over dimensions, not a sum."""

    time: trigflow.TimeDistribution = trigflow.one_of_times(trigflow.LogNormal(-0.8, 1.6))
    drop_condition: Probability = 0.1  # with this probability a condition is replaced by the one of guidance

    scale = 1.0
    label = "diffusion"
    needs_teacher = False
    averages = True

    def term(self, given: Given) -> Term:
        """(8) on the batch."""
        keys = named_keys(given.key, "time", "noise", "drop")
        x0, cond = given.batch["x0"], given.batch["cond"]
        t = self.time.sample(keys["time"], x0.shape[:1], given.within)
        eps = jax.random.normal(keys["noise"], x0.shape)
        drop = jax.random.bernoulli(keys["drop"], self.drop_condition, x0.shape[:1])
        without = denoiser.without(cond, given.teacher.uncond)
        cond = jax.tree.map(lambda c, u: jnp.where(trigflow.expand(drop, c), u, c), cond, without)
        values = loss(given.F.student(given.student, trigflow.diffuse(x0, eps, t), t, cond), x0, eps, t)
        return Term(values / x0[0].size, {"loss": values, "nonfinite": 1.0 - jnp.isfinite(values)}, t)


def loss(F: Batch, x0: Batch, eps: Batch, t: Times) -> Times:
    """(8) ‖F − (c·eps − s·x0)‖². Equals ‖x0 − f‖²/s² without the division."""
    return sum_squares(F - trigflow.target(x0, eps, t))

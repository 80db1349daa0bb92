"""Distribution matching (DMD2, arXiv 2405.14867), the reverse divergence, on the student's own rollouts."""

import itertools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from rcm_jax.method import trigflow
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives import diffusion
from rcm_jax.method.objectives.common import Given, Matching, Term, sum_squares
from rcm_jax.method.rollout import fixed_times, random_times, rollout
from rcm_jax.method.trigflow import Batch, Range, Times
from rcm_jax.util.ranges import Positive, Time, among, between, config

LENGTHS = ("drawn", "cycled")


@config
class DmdConfig(Matching):
    """DMD on rollouts of 1 to max_rollout steps; its critic keeps the fake score a score of the student's samples."""

    time: trigflow.TimeDistribution = trigflow.one_of_times(trigflow.ShiftedUniform(5.0))  # p_D, of mid times, too
    scale: Positive = 1.0  # lambda = this over the consistency's; grows like sqrt(2e6/D) for small D
    # One student step in so many iterations; were it 1, the fake score would never be trained.
    update_freq: Annotated[int, between(2, 10_000)] = 5
    max_rollout: Annotated[int, between(1, 32)] = 4
    rollout_length: Annotated[str, among(LENGTHS)] = "drawn"  # uniformly; "cycled": with the updates, as official
    mid_times: tuple[Time, ...] = ()  # of the rollout, max_rollout − 1 falling times; empty: random

    label = "DMD"

    def __post_init__(self):
        if self.mid_times:
            falling = (math.pi / 2, *self.mid_times, 0.0)
            falls = all(t > u for t, u in itertools.pairwise(falling))
            if len(self.mid_times) != self.max_rollout - 1 or not falls:
                raise ValueError(
                    f"mid_times must be max_rollout − 1 = {self.max_rollout - 1} times that fall between pi/2 and 0, "
                    f"got {list(self.mid_times)}; or none, for random ones"
                )

    def check_within(self, within: Range) -> None:
        """Also for mid times that are not in it."""
        super().check_within(within)
        low, high = map(trigflow.time_of, within)
        if bad := [time for time in self.mid_times if not low <= time < high]:
            raise ValueError(f"mid_times has {bad[0]}, but noise_range is from {low:.4f} to {high:.4f} in these times")

    def term(self, given: Given) -> Term:
        """(7) at the student's own rollout; the gradient passes through the last f of the rollout."""
        keys, cond = named_keys(given.key, "rollout", "time", "noise"), given.batch["cond"]
        x0 = self.rollout(given, keys["rollout"])
        t = self.time.sample(keys["time"], x0.shape[:1], given.within)
        x_t = trigflow.diffuse(stop_gradient(x0), jax.random.normal(keys["noise"], x0.shape), t)
        F_teacher = given.teacher_F(x_t, t)
        F_fake = given.F.fake_score(given.fake_score, x_t, t, cond)
        return Term(*loss(x0, x_t, t, F_teacher, F_fake), t)

    def critic(self, given: Given) -> Term:
        """(8) of the fake score on the student's rollout."""
        keys = named_keys(given.key, "rollout", "time", "noise")
        x0 = stop_gradient(self.rollout(given, keys["rollout"]))
        t = self.time.sample(keys["time"], x0.shape[:1], given.within)
        eps = jax.random.normal(keys["noise"], x0.shape)
        F = given.F.fake_score(given.fake_score, trigflow.diffuse(x0, eps, t), t, given.batch["cond"])
        values = diffusion.loss(F, x0, eps, t)
        return Term(values, {"loss": values, "nonfinite": 1.0 - jnp.isfinite(values)}, t)

    def rollout(self, given: Given, key) -> Batch:
        """A rollout of n steps (n traced) on the conditions of the batch, from noise or, if the networks are not for so
        much of it, from noised data."""
        keys, x0 = named_keys(key, "length", "times", "noise"), given.batch["x0"]
        first = trigflow.time_of(given.within[1])
        if self.rollout_length == "cycled":
            n = given.count % self.max_rollout + 1
        else:
            n = jax.random.randint(keys["length"], (), 1, self.max_rollout + 1)
        if self.mid_times:
            times = fixed_times(self.mid_times, len(x0), first)
        else:
            times = random_times(keys["times"], self.time, self.max_rollout, len(x0), given.within)
        noise = jax.random.normal(keys["noise"], (self.max_rollout, *x0.shape))
        if given.within[1] < 1:  # the network for less noise goes on from what another has made of it
            noise = noise.at[0].set(trigflow.diffuse(x0, noise[0], times[0]))
        return rollout(given.F.student, given.student, noise, times, n, given.batch["cond"])


def loss(x0: Batch, x_t: Batch, t: Times, F_teacher: Batch, F_fake: Batch) -> tuple[Times, dict[str, Times]]:
    """(7) ‖x0 − sg[x0 − (f_fake − f_T)/w]‖², w = max(mean|x0 − f_T|, 1e-5) per sample, and metrics [b].

    x0 is the student's sample (carries the gradient), x_t its diffusion to t, F_teacher (guided) and F_fake at
    (x_t, t). The gradient in x0 is 2·(f_fake − f_T)/w. A sample that is not finite, or whose gradient would not be,
    contributes 0 and has 1 in the metric "nonfinite".
    """
    f_teacher = trigflow.denoise(x_t, F_teacher, t)
    f_fake = trigflow.denoise(x_t, F_fake, t)
    weight = jnp.maximum(jnp.mean(jnp.abs(x0 - f_teacher), axis=tuple(range(1, x0.ndim))), 1e-5)
    target = stop_gradient(x0 - (f_fake - f_teacher) / trigflow.expand(weight, x0))
    finite = jnp.isfinite(sum_squares(target))
    # Masked before it is squared: what is 0 there has no gradient, where 0·NaN would be one.
    values = sum_squares(jnp.where(trigflow.expand(finite, x0), x0 - target, 0.0))
    watched = jnp.where(finite, stop_gradient(weight), 0.0)
    return values, {"loss": values, "weight": watched, "nonfinite": 1.0 - finite}

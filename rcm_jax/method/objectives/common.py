"""What every objective is: settings, and one function from what a step is given to a loss for each sample."""

import abc
from typing import Any, NamedTuple

import jax.numpy as jnp

from rcm_jax.method import trigflow
from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.trigflow import WHOLE, Array, Batch, Range, Times

LEAST_SHARE = 0.01  # of the times that a distribution has, in the range of noise to which it is cut


class Given(NamedTuple):
    """All that an objective may use. The gradient is that of `student` or, in a critic's loss, of `fake_score`."""

    F: Velocities
    student: Any  # parameters
    fake_score: Any  # parameters; None: there is none
    teacher: Any  # its parameters as .params, the conditions that guidance replaces as .uncond
    batch: dict  # {"x0": [b, ...] of unit variance, "cond": {name: [b, ...]}}
    key: Array
    r: Any = 1.0  # tangent warm-up, in [0, 1]
    count: Any = 0  # updates so far of the network that is trained
    within: Range = WHOLE  # the range of noise for which the networks are

    def teacher_F(self, x, t):
        """F_T(x, t) [b, ...], guided."""
        return self.F.teacher(self.teacher.params, x, t, (self.batch["cond"], self.teacher.uncond))


class Term(NamedTuple):
    """What an objective answers: the loss, numbers to watch {name: [b]}, and the times at which it was taken."""

    loss: Times
    metrics: dict[str, Array]
    time: Times


class Objective(abc.ABC):
    """A loss of the student. Subclasses are frozen dataclasses of its settings; a sum of losses is weighted by `scale`.

    label: what the field calls it. needs_teacher: whether it asks F_T. has_tangent: whether r counts. averages: whether
    it is a mean over the numbers of a sample, not their sum.
    """

    scale: float
    label: str
    needs_teacher: bool = True
    has_tangent: bool = False
    averages: bool = False

    def check_within(self, within: Range) -> None:
        """ValueError for settings that do not fit a range of noise: times that are hardly ever in it."""
        time = getattr(self, "time", None)
        if time is not None and (share := time.share(within)) < LEAST_SHARE:
            raise ValueError(
                f"{share:.2g} of the times of {self.label}, {time}, are in noise_range {list(within)}: choose times of "
                f"which {LEAST_SHARE:g} or more are there"
            )

    @abc.abstractmethod
    def term(self, given: Given) -> Term:
        """The loss on a batch, at times and noise drawn from given.key."""


class Matching(Objective):
    """A loss on the student's own samples, with a fake score that is kept a score of them.

    update_freq: one student step in so many iterations, the others are the critic's. max_rollout: steps of a sample.
    """

    update_freq: int
    max_rollout: int

    @abc.abstractmethod
    def critic(self, given: Given) -> Term:
        """The loss of the fake score, whose gradient is that of given.fake_score."""


def sum_squares(x: Batch) -> Times:
    """‖x‖² per sample."""
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


# (6); clipping to [−1, 1], the alternative of the sCM paper (section 4.1); and nothing: (g, its norm, c) -> g
LIMITS = {
    "norm": lambda g, norm, c: g / (norm + c),
    "clip": lambda g, norm, c: jnp.clip(g, -1.0, 1.0),
    "none": lambda g, norm, c: g,
}


def regression(
    F: Batch, F_fixed: Batch, g: Batch, limit: str = "norm", metrics: dict | None = None, constant: float = 0.1
) -> tuple[Times, dict[str, Times]]:
    """(6) ‖F − sg[F] − g‖² with g limited, and metrics [b]; F_fixed = sg[F], no gradient passes through g.

    constant: c of g/(‖g‖ + c), for g in our units, those of data of unit variance.

    A sample whose F or g is not finite contributes 0, has 1 in the metric "nonfinite", and 0 in the others.
    """
    norm = jnp.sqrt(sum_squares(g))
    finite = jnp.isfinite(norm) & jnp.isfinite(sum_squares(F_fixed))
    # Masked before it meets F: 0·NaN in the backward pass would take the whole batch along.
    g = jnp.where(trigflow.expand(finite, g), LIMITS[limit](g, trigflow.expand(norm, g), constant), 0.0)
    values = jnp.where(finite, sum_squares(F - F_fixed - g), 0.0)
    watched = {"tangent_norm": norm} | (metrics or {})
    watched = {name: jnp.where(finite, value, 0.0) for name, value in watched.items()}
    return values, {"loss": values, "nonfinite": 1.0 - finite} | watched

"""What every objective is: settings, and one function from what a step is given to a loss for each sample."""

import abc
from typing import Any, NamedTuple

import jax.numpy as jnp

from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.trigflow import Array, Batch, Times


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

    label: what the field calls it. needs_teacher: whether it asks F_T. has_tangent: whether r counts.
    """

    scale: float
    label: str
    needs_teacher: bool = True
    has_tangent: bool = False

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


def check_scale(scale: float) -> None:
    """ValueError unless the loss counts."""
    if not scale > 0:
        raise ValueError(f"scale {scale} must be above 0: to leave the loss out, set its group to None")


def check_known(config, **tables) -> None:
    """ValueError unless each named setting is a key of its table."""
    for name, known in tables.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} {getattr(config, name)!r} is none of {', '.join(known)}")


def sum_squares(x: Batch) -> Times:
    """‖x‖² per sample."""
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))

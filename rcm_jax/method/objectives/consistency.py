"""The consistency side of a method, the forward divergence: continuous (sCM, sCT) or in discrete time (dCM).

A term is a function (config, velocities, params, teacher, batch, keys, r) -> (loss [b], times [b], metrics), with keys
"time" and "noise" and the tangent warm-up r.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rcm_jax.method import trigflow
from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.objectives import losses
from rcm_jax.train.optimizer import OptimizerConfig

TimeDistribution = trigflow.LogNormal | trigflow.ShiftedUniform


@dataclasses.dataclass(frozen=True)
class ScmConfig:
    """Continuous-time consistency (arXiv 2410.11081): sCM if it follows the teacher, sCT if it follows the data."""

    time: TimeDistribution  # p_G
    scale: float = 100.0
    velocity: str = "teacher"  # dx/dt of (4) and F_T of (5): the guided teacher's, or "data": c·eps − s·x0
    derivative: str = "jvp"  # of F along dx/dt; losses.DERIVATIVES
    warmup_form: str = "paper"
    limit: str = "norm"  # what keeps the tangent small; losses.LIMITS
    weighting: OptimizerConfig | None = None  # trains the adaptive weighting; None: there is none

    def __post_init__(self):
        for name, known in (
            ("velocity", VELOCITIES),
            ("derivative", losses.DERIVATIVES),
            ("warmup_form", losses.WARMUP_FORMS),
            ("limit", losses.LIMITS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        check_scale(self.scale)

    @property
    def needs_teacher(self) -> bool:
        return self.velocity == "teacher"

    @property
    def name(self) -> str:
        return "sCM" if self.needs_teacher else "sCT"


@dataclasses.dataclass(frozen=True)
class DcmConfig:
    """Consistency in discrete time: the student's x0 at t against its own after `skip` of `steps` teacher steps."""

    steps: int = 48
    skip: int = 1
    shift: float = 5.0  # of the grid, uniform in rectified-flow time before the shift
    scale: float = 100.0
    weighting: OptimizerConfig | None = None

    def __post_init__(self):
        if not 1 <= self.skip < self.steps:
            raise ValueError(f"skip {self.skip} must be at least 1 and below steps, {self.steps}")
        check_scale(self.scale)

    needs_teacher = True
    name = "dCM"

    def times(self, u):
        """[skip + 1, b] falling times, a step of the grid apart, from u [b], uniform in [0, 1): they start anywhere."""
        k = jnp.arange(self.skip + 1)[:, None]
        return trigflow.ShiftedUniform(self.shift).from_uniform(1 - u * (1 - self.skip / self.steps) - k / self.steps)


def check_scale(scale: float) -> None:
    """ValueError unless the loss counts."""
    if not scale > 0:
        raise ValueError(f"scale {scale} must be above 0: to leave the loss out, set its group to None")


def scm(config: ScmConfig, velocities: Velocities, params, teacher, batch, keys, r):
    """(4)–(6) on the batch, at times of p_G."""
    x0, cond = batch["x0"], batch["cond"]
    t = config.time.sample(keys["time"], x0.shape[:1])
    eps = jax.random.normal(keys["noise"], x0.shape)
    x_t = trigflow.diffuse(x0, eps, t)
    F_T = VELOCITIES[config.velocity](velocities, teacher, x0, eps, x_t, t, cond)
    loss, metrics = losses.scm(
        velocities.student, params, x_t, t, cond, F_T,
        r=r, warmup_form=config.warmup_form, derivative=config.derivative, limit=config.limit,
    )  # fmt: skip
    return loss, t, metrics


# What (4) and (5) take for dx/dt: (velocities, teacher, x0, eps, x_t, t, cond) -> [b, ...]
VELOCITIES: dict[str, Callable] = {
    "teacher": lambda velocities, teacher, x0, eps, x_t, t, cond: velocities.teacher(
        teacher.params, x_t, t, (cond, teacher.uncond)
    ),
    "data": lambda velocities, teacher, x0, eps, x_t, t, cond: trigflow.velocity(x0, eps, t),
}


def dcm(config: DcmConfig, velocities: Velocities, params, teacher, batch, keys, r):
    """Discrete-time consistency on the batch; there is no tangent, so r counts nothing."""
    x0, cond = batch["x0"], batch["cond"]
    times = config.times(jax.random.uniform(keys["time"], x0.shape[:1]))
    x_t = trigflow.diffuse(x0, jax.random.normal(keys["noise"], x0.shape), times[0])

    def teacher_F(x, t):
        return velocities.teacher(teacher.params, x, t, (cond, teacher.uncond))

    loss, metrics = losses.dcm(velocities.student, params, x_t, times, cond, teacher_F)
    return loss, times[0], metrics


TERMS = {ScmConfig: ("scm", scm), DcmConfig: ("dcm", dcm)}  # with the name that its metrics begin with

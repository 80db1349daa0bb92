"""Training methods: what a step does. The trainer runs any method; it knows nothing of losses.

A method is a table of phases. Each phase is a pure function (state, teacher, batch, key) -> (state, metrics), compiled
on its own: a lax.cond would hold the buffers of all of them. batch = {"x0": [b, ...], "cond": {name: [b, ...]}}.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rcm_jax import denoiser, losses, trigflow
from rcm_jax.optimizer import OptimizerConfig, ema_update, make_optimizer, power_ema_beta, power_ema_exponent
from rcm_jax.rollout import random_times, rollout
from rcm_jax.train_state import Teacher, TrainState, make_learner

TimeDistribution = trigflow.LogNormal | trigflow.ShiftedUniform


class Method(NamedTuple):
    """What the trainer runs: init(params) -> TrainState, phase(step) -> name (on the host), steps[name]."""

    init: Callable
    phase: Callable[[int], str]
    steps: dict[str, Callable]


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Pretraining of a teacher: TrigFlow regression, labels dropped for guidance, power EMA."""

    time: TimeDistribution
    optimizer: OptimizerConfig
    drop_condition: float = 0.1
    ema_std: float = 0.05

    def __post_init__(self):
        power_ema_exponent(self.ema_std)
        if not 0 <= self.drop_condition <= 1:
            raise ValueError(f"drop_condition {self.drop_condition} must be a probability")


@dataclasses.dataclass(frozen=True)
class RcmConfig:
    """rCM (arXiv 2510.08431): scm_scale·sCM + dmd_scale·DMD for the student, a fake score trained in between."""

    scm_time: TimeDistribution  # p_G
    dmd_time: TimeDistribution  # p_D, of the score time and of the rollout
    student: OptimizerConfig
    fake_score: OptimizerConfig
    guidance: float
    scm_scale: float = 100.0
    dmd_scale: float = 1.0  # lambda = dmd_scale/scm_scale; grows like sqrt(2e6/D) for small D
    update_freq: int = 5  # one student step in so many iterations
    warmup: int = 0  # H: iterations of sCM alone, while r grows to 1
    warmup_form: str = "paper"
    max_rollout: int = 4
    ema_std: float = 0.05

    def __post_init__(self):
        power_ema_exponent(self.ema_std)
        if self.warmup_form not in losses.WARMUP_FORMS:
            raise ValueError(f"warmup_form {self.warmup_form!r} is none of {', '.join(losses.WARMUP_FORMS)}")
        if self.update_freq < 1 or self.max_rollout < 1 or self.warmup < 0:
            raise ValueError(
                f"update_freq {self.update_freq} and max_rollout {self.max_rollout} must be at least 1, "
                f"warmup {self.warmup} at least 0"
            )


class Velocities(NamedTuple):
    """F(params, x, t, cond) of each network; the teacher's takes (cond, uncond) and applies the guidance."""

    student: denoiser.Velocity
    teacher: denoiser.Velocity
    fake_score: denoiser.Velocity


def diffusion_method(config: DiffusionConfig, F: denoiser.Velocity, uncond) -> Method:
    """Pretraining as a method: one phase, state.student is the network, no teacher and no fake score."""
    optimizer = make_optimizer(config.optimizer)
    step = partial(diffusion_step, config, F, optimizer, uncond)
    return Method(partial(_init, optimizer, None), lambda i: "diffusion", {"diffusion": step})


def rcm_method(config: RcmConfig, velocities: Velocities) -> Method:
    """Distillation as a method: warmup (sCM alone), student (sCM + DMD) and critic (fake score) phases."""
    student, fake_score = make_optimizer(config.student), make_optimizer(config.fake_score)
    scm_alone = partial(student_step, config, velocities, student, with_dmd=False)
    if not config.dmd_scale:  # nothing needs a fake score
        steps = {"warmup": scm_alone, "student": scm_alone}
        return Method(partial(_init, student, None), partial(rcm_phase, config), steps)
    steps = {
        "warmup": scm_alone,
        "student": partial(student_step, config, velocities, student, with_dmd=True),
        "critic": partial(critic_step, config, velocities, fake_score),
    }
    return Method(partial(_init, student, fake_score), partial(rcm_phase, config), steps)


def rcm_phase(config: RcmConfig, i: int) -> str:
    """Student if i < H or (i − H) % update_freq == 0, else critic; DMD joins once i > H. Without DMD: no critic."""
    if config.dmd_scale and i >= config.warmup and (i - config.warmup) % config.update_freq:
        return "critic"
    return "student" if i > config.warmup else "warmup"


def student_updates(config: RcmConfig, steps: int) -> int:
    """How many of the first `steps` iterations update the student."""
    after = max(steps - config.warmup, 0)
    return min(steps, config.warmup) + (-(-after // config.update_freq) if config.dmd_scale else after)


def _init(optimizer, fake_optimizer, params) -> TrainState:
    """Every network starts from the same parameters; each leaf is a buffer of its own, so that all can be donated."""
    copy = partial(jax.tree.map, jnp.copy)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=make_learner(copy(params), optimizer),
        ema=copy(params),
        fake_score=None if fake_optimizer is None else make_learner(copy(params), fake_optimizer),
    )


def diffusion_step(config, F, optimizer, uncond, state: TrainState, teacher: None, batch, key):
    """One pretraining step on batch x0 [b, ...]; a condition is replaced by uncond with probability drop_condition."""
    keys = named_keys(key, "time", "noise", "drop")
    x0 = batch["x0"]
    t = config.time.sample(keys["time"], x0.shape[:1])
    eps = jax.random.normal(keys["noise"], x0.shape)
    drop = jax.random.bernoulli(keys["drop"], config.drop_condition, x0.shape[:1])
    cond = batch["cond"]
    cond = jax.tree.map(lambda c, u: jnp.where(trigflow.expand(drop, c), u, c), cond, denoiser.without(cond, uncond))

    def loss(params):
        loss_b, metrics = losses.diffusion(F(params, trigflow.diffuse(x0, eps, t), t, cond), x0, eps, t)
        return jnp.mean(loss_b) / x0[0].size, {f"diffusion/{k}": v for k, v in metrics.items()}

    return _update_student(config, optimizer, state, loss)


def student_step(config, velocities, optimizer, state: TrainState, teacher: Teacher, batch, key, *, with_dmd: bool):
    """One student update: scm_scale·sCM, plus dmd_scale·DMD after the warm-up; then the EMA."""
    keys = named_keys(key, "time", "noise", "dmd")
    x0, cond = batch["x0"], batch["cond"]
    t = config.scm_time.sample(keys["time"], x0.shape[:1])
    x_t = trigflow.diffuse(x0, jax.random.normal(keys["noise"], x0.shape), t)
    F_teacher = velocities.teacher(teacher.params, x_t, t, (cond, teacher.uncond))
    r = jnp.minimum(1.0, state.step / config.warmup) if config.warmup else 1.0

    def loss(params):
        loss_b, scm_metrics = losses.scm(
            velocities.student, params, x_t, t, cond, F_teacher, r=r, warmup_form=config.warmup_form
        )
        loss_b = config.scm_scale * loss_b
        metrics = {f"scm/{k}": v for k, v in scm_metrics.items()}
        if with_dmd:
            dmd_b, dmd_metrics = dmd_loss(config, velocities, params, state, teacher, batch, keys["dmd"])
            loss_b = loss_b + config.dmd_scale * dmd_b
            metrics |= {f"dmd/{k}": v for k, v in dmd_metrics.items()}
        return jnp.mean(loss_b), metrics

    return _update_student(config, optimizer, state, loss)


def dmd_loss(config, velocities, params, state: TrainState, teacher: Teacher, batch, key):
    """(7) at the student's own rollout: (loss [b], metrics); the gradient passes through the last f of the rollout."""
    keys = named_keys(key, "rollout", "time", "noise")
    cond = batch["cond"]
    x0 = draw_rollout(config, velocities.student, params, batch, keys["rollout"])
    t = config.dmd_time.sample(keys["time"], x0.shape[:1])
    x_t = trigflow.diffuse(jax.lax.stop_gradient(x0), jax.random.normal(keys["noise"], x0.shape), t)
    F_teacher = velocities.teacher(teacher.params, x_t, t, (cond, teacher.uncond))
    F_fake = velocities.fake_score(state.fake_score.params, x_t, t, cond)
    return losses.dmd(x0, x_t, t, F_teacher, F_fake)


def critic_step(config, velocities, optimizer, state: TrainState, teacher: Teacher, batch, key):
    """(8) One fake-score update: regression on the student's rollout."""
    keys = named_keys(key, "rollout", "time", "noise")
    x0 = jax.lax.stop_gradient(draw_rollout(config, velocities.student, state.student.params, batch, keys["rollout"]))
    t = config.dmd_time.sample(keys["time"], x0.shape[:1])
    eps = jax.random.normal(keys["noise"], x0.shape)
    x_t = trigflow.diffuse(x0, eps, t)

    def loss(params):
        loss_b, metrics = losses.diffusion(velocities.fake_score(params, x_t, t, batch["cond"]), x0, eps, t)
        return jnp.mean(loss_b), {f"critic/{k}": v for k, v in metrics.items()}

    grads, metrics = jax.grad(loss, has_aux=True)(state.fake_score.params)
    fake_score, norm, applied = state.fake_score.update(grads, optimizer)
    metrics |= {"critic/grad_norm": norm, "critic/skipped": 1.0 - applied}
    return state.replace(step=state.step + 1, fake_score=fake_score), _means(metrics)


def draw_rollout(config, F, params, batch, key):
    """A rollout of n ~ U{1..max_rollout} steps (n traced) at random times, on the conditions of the batch."""
    keys = named_keys(key, "length", "times", "noise")
    shape = batch["x0"].shape
    n = jax.random.randint(keys["length"], (), 1, config.max_rollout + 1)
    times = random_times(keys["times"], config.dmd_time, config.max_rollout, shape[0])
    noise = jax.random.normal(keys["noise"], (config.max_rollout, *shape))
    return rollout(F, params, noise, times, n, batch["cond"])


def _update_student(config, optimizer, state: TrainState, loss):
    """grad of loss(params) -> (scalar, metrics), optimizer, EMA."""
    grads, metrics = jax.grad(loss, has_aux=True)(state.student.params)
    student, norm, applied = state.student.update(grads, optimizer)
    beta = power_ema_beta(state.student.updates, power_ema_exponent(config.ema_std))
    ema = ema_update(state.ema, student.params, jnp.where(applied, beta, 1.0))
    metrics |= {"student/grad_norm": norm, "student/skipped": 1.0 - applied}
    return state.replace(step=state.step + 1, student=student, ema=ema), _means(metrics)


def _means(metrics):
    return jax.tree.map(jnp.mean, metrics)


def named_keys(key, *names) -> dict:
    """One key per name, from one key."""
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))

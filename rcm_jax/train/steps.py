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

from rcm_jax.method import denoiser, trigflow, weighting
from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives import dmd, losses
from rcm_jax.method.objectives.consistency import TERMS, DcmConfig, ScmConfig, TimeDistribution
from rcm_jax.method.objectives.dmd import DmdConfig
from rcm_jax.train import stability
from rcm_jax.train.optimizer import OptimizerConfig, ema_update, make_optimizer, power_ema_beta, power_ema_exponent
from rcm_jax.train.state import Teacher, TrainState, make_learner


class Method(NamedTuple):
    """What the trainer runs: init(params) -> TrainState, phase(step) -> name (on the host), steps[name].

    probe(state, teacher, batch, key) -> metrics, if there is one, looks at the state now and then.
    """

    init: Callable
    phase: Callable[[int], str]
    steps: dict[str, Callable]
    probe: Callable | None = None


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
    """rCM (arXiv 2510.08431), or either half of it: a consistency loss, forward divergence; DMD, reverse divergence."""

    student: OptimizerConfig
    guidance: float
    consistency: ScmConfig | DcmConfig | None
    dmd: DmdConfig | None
    warmup: int = 0  # H: iterations of consistency alone, while r grows to 1
    ema_std: float = 0.05

    def __post_init__(self):
        power_ema_exponent(self.ema_std)
        if self.consistency is None and self.dmd is None:
            raise ValueError("consistency and dmd are both None: there is nothing to train by")
        if self.warmup < 0:
            raise ValueError(f"warmup {self.warmup} must be at least 0")
        if self.warmup and not self.has_both and not isinstance(self.consistency, ScmConfig):
            raise ValueError(f"warmup {self.warmup} has neither a tangent nor DMD to wait for: set it to 0")
        if self.guidance != 1.0 and not self.needs_teacher:
            raise ValueError(f"guidance {self.guidance} is a teacher's, and these losses ask none: set it to 1")

    @property
    def has_both(self) -> bool:
        return self.consistency is not None and self.dmd is not None

    @property
    def name(self) -> str:
        """What the field calls it."""
        names = ([self.consistency.name] if self.consistency else []) + (["DMD"] if self.dmd else [])
        return "rCM" if names == ["sCM", "DMD"] else " + ".join(names)

    @property
    def needs_teacher(self) -> bool:
        """Whether the losses ask a teacher (a student may start from one in any case)."""
        return self.dmd is not None or self.consistency.needs_teacher


def diffusion_method(config: DiffusionConfig, F: denoiser.Velocity, uncond, parts: int = 1) -> Method:
    """Pretraining as a method: one phase, state.student is the network, no teacher and no fake score."""
    optimizer = make_optimizer(config.optimizer)
    step = partial(diffusion_step, config, F, optimizer, uncond, parts)
    return Method(partial(_init, {"student": optimizer}), lambda i: "diffusion", {"diffusion": step})


def rcm_method(config: RcmConfig, velocities: Velocities, parts: int = 1) -> Method:
    """Distillation as a method: warmup (consistency alone), student (all losses) and critic (fake score) phases.

    The gradient of every phase is accumulated over so many parts of the batch.
    """
    optimizers, terms, probe = {"student": make_optimizer(config.student)}, {}, None
    if config.consistency:
        terms["consistency"] = partial(consistency_term, config, velocities)
        if config.consistency.weighting:
            optimizers["weighting"] = make_optimizer(config.consistency.weighting)
        if getattr(config.consistency, "derivative", None) == "jvp":
            probe = partial(probe_step, config, velocities, parts)
    if config.dmd:
        terms["dmd"] = partial(dmd_term, config, velocities)
        optimizers["fake_score"] = make_optimizer(config.dmd.fake_score)
    steps = {"student": partial(student_step, config, optimizers, terms, parts)}
    if config.dmd:
        steps["critic"] = partial(critic_step, config, velocities, optimizers["fake_score"], parts)
    if config.has_both:
        steps["warmup"] = partial(student_step, config, optimizers, {"consistency": terms["consistency"]}, parts)
    return Method(partial(_init, optimizers), partial(rcm_phase, config), steps, probe)


def rcm_phase(config: RcmConfig, i: int) -> str:
    """Student if i < H or (i − H) % update_freq == 0, else critic; DMD joins once i > H. Without DMD: no critic."""
    if config.dmd and i >= config.warmup and (i - config.warmup) % config.dmd.update_freq:
        return "critic"
    return "warmup" if config.has_both and i <= config.warmup else "student"


def student_updates(config: RcmConfig, steps):
    """How many of the first `steps` iterations (an int or an array of it) update the student."""
    after = (steps - config.warmup) * (steps > config.warmup)
    return steps - after + (-(-after // config.dmd.update_freq) if config.dmd else after)


def _init(optimizers: dict, params) -> TrainState:
    """Every network starts from the same parameters; each leaf is a buffer of its own, so that all can be donated."""
    copy = partial(jax.tree.map, jnp.copy)
    start = {"student": params, "fake_score": params, "weighting": weighting.init()}
    learners = {name: make_learner(copy(start[name]), optimizer) for name, optimizer in optimizers.items()}
    return TrainState(step=jnp.zeros((), jnp.int32), ema=copy(params), **learners)


def divided(batch, parts: int):
    """[b, ...] -> [parts, b/parts, ...]: rows i, i + parts, … are one part, so that every device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def accumulated_grad(loss: Callable, params, batch, key, parts: int):
    """(gradient, metrics) of loss(params, batch, key) -> (mean over the batch, metrics), in the memory of one part.

    The mean of those of `parts` parts of the batch, one after another; each draws with a key of its own.
    """
    grad = jax.grad(loss, has_aux=True)
    if parts == 1:
        return grad(params, batch, key)

    def add(total, part):
        grads, metrics = grad(params, part[0], jax.random.fold_in(key, part[1]))
        return jax.tree.map(lambda a, b: a + b / parts, total, grads), metrics

    start = jax.tree.map(jnp.zeros_like, params)
    total, metrics = jax.lax.scan(add, start, (divided(batch, parts), jnp.arange(parts)))
    pairs = {name: jax.tree.map(partial(jnp.sum, axis=0), v) for name, v in metrics.items() if isinstance(v, tuple)}
    return total, metrics | pairs


def diffusion_step(config, F, optimizer, uncond, parts, state: TrainState, teacher: None, batch, key):
    """One pretraining step on batch x0 [b, ...]; a condition is replaced by uncond with probability drop_condition."""

    def loss(params, batch, key):
        keys = named_keys(key, "time", "noise", "drop")
        x0, cond = batch["x0"], batch["cond"]
        t = config.time.sample(keys["time"], x0.shape[:1])
        eps = jax.random.normal(keys["noise"], x0.shape)
        drop = jax.random.bernoulli(keys["drop"], config.drop_condition, x0.shape[:1])
        without = denoiser.without(cond, uncond)
        cond = jax.tree.map(lambda c, u: jnp.where(trigflow.expand(drop, c), u, c), cond, without)
        loss_b, metrics = losses.diffusion(F(params, trigflow.diffuse(x0, eps, t), t, cond), x0, eps, t)
        return jnp.mean(loss_b) / x0[0].size, {f"diffusion/{k}": v for k, v in metrics.items()}

    grads, metrics = accumulated_grad(loss, state.student.params, batch, key, parts)
    return _update_student(config, optimizer, state, grads, metrics)


def student_step(config, optimizers: dict, terms: dict, parts, state: TrainState, teacher: Teacher, batch, key):
    """One student update on the sum of the terms, and one of the adaptive weighting with it; then the EMA."""
    trained = {"student": state.student.params}
    if state.weighting:
        trained["weighting"] = state.weighting.params

    def loss(params, batch, key):
        keys = named_keys(key, "time", "noise", "dmd")
        results = [term(params, state, teacher, batch, keys) for term in terms.values()]
        return jnp.mean(sum(loss_b for loss_b, _ in results)), {k: v for _, m in results for k, v in m.items()}

    grads, metrics = accumulated_grad(loss, trained, batch, key, parts)
    before = state.weighting
    state, metrics = _update_student(config, optimizers["student"], state, grads["student"], metrics)
    if before:
        after, norm, applied = before.update(grads["weighting"], optimizers["weighting"])
        kept = metrics["student/skipped"] == 0  # an update is skipped whole
        state = state.replace(weighting=jax.tree.map(lambda a, b: jnp.where(kept, a, b), after, before))
        metrics |= {"weighting/grad_norm": norm, "weighting/skipped": 1.0 - (kept & applied)}
    return state, metrics


def consistency_term(config: RcmConfig, velocities, params, state: TrainState, teacher, batch, keys):
    """scale·consistency, adaptively weighted if asked for: (loss [b], metrics)."""
    consistency = config.consistency
    name, term = TERMS[type(consistency)]
    r = jnp.minimum(1.0, state.step / config.warmup) if config.warmup else 1.0
    loss_b, t, metrics = term(consistency, velocities, params["student"], teacher, batch, keys, r)
    metrics |= stability.by_time(metrics, t)
    if "weighting" in params:
        size = batch["x0"][0].size
        metrics["log_weight"] = log_weight = weighting.log_weight(params["weighting"], t, size)
        # A sample left out must not raise the weight of its time.
        loss_b = jnp.where(metrics["nonfinite"] > 0, 0.0, losses.adaptive(loss_b, log_weight, size))
    return consistency.scale * loss_b, {f"{name}/{k}": v for k, v in metrics.items()}


def dmd_term(config: RcmConfig, velocities, params, state: TrainState, teacher, batch, keys):
    """scale·DMD: (loss [b], metrics)."""
    count = student_updates(config, state.step)
    loss_b, metrics = dmd.student_loss(
        config.dmd, velocities, params["student"], state.fake_score.params, teacher, batch, keys["dmd"], count
    )
    return config.dmd.scale * loss_b, {f"dmd/{k}": v for k, v in metrics.items()}


def critic_step(config: RcmConfig, velocities, optimizer, parts, state: TrainState, teacher: Teacher, batch, key):
    """(8) One fake-score update: regression on the student's rollout."""
    count = state.step - student_updates(config, state.step)

    def loss(params, batch, key):
        loss_b, metrics = dmd.critic_loss(config.dmd, velocities, state.student.params, params, batch, key, count)
        return jnp.mean(loss_b), {f"critic/{k}": v for k, v in metrics.items()}

    grads, metrics = accumulated_grad(loss, state.fake_score.params, batch, key, parts)
    fake_score, norm, applied = state.fake_score.update(grads, optimizer)
    metrics |= {"critic/grad_norm": norm, "critic/skipped": 1.0 - applied}
    return state.replace(step=state.step + 1, fake_score=fake_score), _means(metrics)


def probe_step(config: RcmConfig, velocities, parts, state: TrainState, teacher: Teacher, batch, key) -> dict:
    """stability.probe, on as much of the batch as the other steps have in memory."""
    part = jax.tree.map(lambda x: x[0], divided(batch, parts))
    return stability.probe(config.consistency, velocities, state, teacher, part, key)


def _update_student(config, optimizer, state: TrainState, grads, metrics):
    """Gradients and metrics of the student's loss -> (state after the optimizer and the EMA, means of the metrics)."""
    student, norm, applied = state.student.update(grads, optimizer)
    beta = power_ema_beta(state.student.updates, power_ema_exponent(config.ema_std))
    ema = ema_update(state.ema, student.params, jnp.where(applied, beta, 1.0))
    metrics |= {"student/grad_norm": norm, "student/skipped": 1.0 - applied}
    return state.replace(step=state.step + 1, student=student, ema=ema), _means(metrics)


def _means(metrics):
    """Means over the batch; pairs (sum, count) stay, for the mean over several steps."""
    return {name: value if isinstance(value, tuple) else jnp.mean(value) for name, value in metrics.items()}

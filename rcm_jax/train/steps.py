"""Training methods: what a step does. The trainer runs any method; a step runs any objective: it sums their losses,
differentiates the sum and updates.

A method is a table of phases. Each phase is a pure function (state, teacher, batch, key) -> (state, metrics), compiled
on its own: a lax.cond would hold the buffers of all of them. batch = {"x0": [b, ...], "cond": {name: [b, ...]}}.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rcm_jax.method import weighting
from rcm_jax.method.denoiser import Velocities, Velocity
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives import (
    CONSISTENCY,
    MATCHING,
    DiffusionConfig,
    DmdConfig,
    Given,
    Matching,
    Objective,
    ScmConfig,
    Term,
)
from rcm_jax.train import stability
from rcm_jax.train.optimizer import OptimizerConfig, make_optimizer, power_ema_beta, power_ema_exponent, schedule
from rcm_jax.train.state import Teacher, TrainState, make_learner


class Method(NamedTuple):
    """What the trainer runs: init(params, fake_score's or None) -> TrainState, phase(step) -> name (on the host),
    steps[name].

    probe(state, teacher, batch, key) -> metrics, if there is one, looks at the state now and then.
    """

    init: Callable
    phase: Callable[[int], str]
    steps: dict[str, Callable]
    probe: Callable | None = None
    open_trips: float = 1.0  # mean trips of the loops of its phases whose length is drawn when they run


@dataclasses.dataclass(frozen=True)
class DiffusionMethod:
    """Pretraining of a teacher: one objective, AdamW, power EMA."""

    objective: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_std: float = 0.05

    def __post_init__(self):
        power_ema_exponent(self.ema_std)


@dataclasses.dataclass(frozen=True)
class RcmConfig:
    """rCM (arXiv 2510.08431), or either half of it: a consistency loss, forward divergence; DMD, reverse divergence."""

    student: OptimizerConfig = OptimizerConfig()
    fake_score: OptimizerConfig | None = OptimizerConfig()
    weighting: OptimizerConfig | None = None  # trains the adaptive weighting of the consistency loss, if there is one
    guidance: float = 1.0  # F_u + w·(F_c − F_u)
    consistency: Objective | None = dataclasses.field(default=ScmConfig(), metadata={"kinds": CONSISTENCY})
    dmd: Matching | None = dataclasses.field(default=DmdConfig(), metadata={"kinds": MATCHING})
    warmup: int = 0  # H: iterations of consistency alone, while r grows to 1
    ema_std: float = 0.05

    def __post_init__(self):
        power_ema_exponent(self.ema_std)
        if self.consistency is None and self.dmd is None:
            raise ValueError("consistency and dmd are both None: there is nothing to train by")
        if (self.dmd is None) != (self.fake_score is None):
            raise ValueError("dmd and fake_score belong together: one trains the other; set both, or both to None")
        if self.weighting and not self.consistency:
            raise ValueError("weighting is of the consistency loss, and consistency is None: set it to None")
        if self.warmup < 0:
            raise ValueError(f"warmup {self.warmup} must be at least 0")
        if self.warmup and not self.has_both and not (self.consistency and self.consistency.has_tangent):
            raise ValueError(f"warmup {self.warmup} has neither a tangent nor DMD to wait for: set it to 0")
        if self.guidance != 1.0 and not self.needs_teacher:
            raise ValueError(f"guidance {self.guidance} is a teacher's, and these losses ask none: set it to 1")

    @property
    def objectives(self) -> dict[str, Objective]:
        """By the names that their metrics begin with."""
        kinds = {cls: name for name, cls in (CONSISTENCY | MATCHING).items()}
        return {kinds[type(o)]: o for o in (self.consistency, self.dmd) if o}

    @property
    def has_both(self) -> bool:
        return self.consistency is not None and self.dmd is not None

    @property
    def name(self) -> str:
        """What the field calls it."""
        names = [objective.label for objective in self.objectives.values()]
        return "rCM" if names == ["sCM", "DMD"] else " + ".join(names)

    @property
    def needs_teacher(self) -> bool:
        """Whether the losses ask a teacher (a student may start from one in any case)."""
        return any(objective.needs_teacher for objective in self.objectives.values())

    @property
    def open_trips(self) -> float:
        """Mean steps of a rollout but the last, which is no loop: N is uniform on 1 to max_rollout."""
        return (self.dmd.max_rollout - 1) / 2 if self.dmd else 1.0


class Setup(NamedTuple):
    """What all phases of a method share. weighted: the objective, if any, that has an adaptive weighting."""

    F: Velocities
    optimizers: dict
    ema_std: float
    parts: int  # of a batch, one after another, over which a gradient is accumulated
    rates: dict[str, Callable]  # learning rates by the count of updates
    r: Callable = lambda step: 1.0  # tangent warm-up at a step
    updates: Callable = lambda step: step  # of the student in so many steps
    weighted: Objective | None = None


def diffusion_method(config: DiffusionMethod, F: Velocity, parts: int = 1) -> Method:
    """Pretraining as a method: one phase, state.student is the network; of the teacher it asks the conditions alone."""
    optimizers = {"student": make_optimizer(config.optimizer)}
    setup = Setup(Velocities(F, F, F), optimizers, config.ema_std, parts, {"student": schedule(config.optimizer)})
    step = partial(student_step, setup, {"diffusion": config.objective})
    return Method(partial(_init, optimizers), lambda i: "diffusion", {"diffusion": step})


def rcm_method(config: RcmConfig, F: Velocities, parts: int = 1) -> Method:
    """Distillation as a method: warmup (consistency alone), student (all losses) and critic (fake score) phases."""
    configs = {"student": config.student, "weighting": config.weighting, "fake_score": config.fake_score}
    optimizers = {name: make_optimizer(c) for name, c in configs.items() if c}
    rates = {name: schedule(c) for name, c in configs.items() if c}
    setup = Setup(
        F, optimizers, config.ema_std, parts, rates, partial(_warmup, config.warmup), partial(student_updates, config),
        config.consistency if config.weighting else None,
    )  # fmt: skip
    steps = {"student": partial(student_step, setup, config.objectives)}
    if config.dmd:
        steps["critic"] = partial(critic_step, setup, config.dmd)
    if config.has_both:
        early = {name: o for name, o in config.objectives.items() if o is config.consistency}
        steps["warmup"] = partial(student_step, setup, early)
    probe = None
    if isinstance(config.consistency, ScmConfig) and config.consistency.derivative == "jvp":
        probe = partial(probe_step, setup, config.consistency)
    return Method(partial(_init, optimizers), partial(rcm_phase, config), steps, probe, config.open_trips)


def _warmup(iterations: int, step):
    """r = min(1, step/H); 1 without a warm-up."""
    return jnp.minimum(1.0, step / iterations) if iterations else 1.0


def rcm_phase(config: RcmConfig, i: int) -> str:
    """Student if i < H or (i − H) % update_freq == 0, else critic; DMD joins once i > H. Without DMD: no critic."""
    if config.dmd and i >= config.warmup and (i - config.warmup) % config.dmd.update_freq:
        return "critic"
    return "warmup" if config.has_both and i <= config.warmup else "student"


def student_updates(config: RcmConfig, steps):
    """How many of the first `steps` iterations (an int or an array of it) update the student."""
    after = (steps - config.warmup) * (steps > config.warmup)
    return steps - after + (-(-after // config.dmd.update_freq) if config.dmd else after)


def _init(optimizers: dict, params, fake_score=None) -> TrainState:
    """Every network starts from the same parameters, the fake score from its own if there are any.

    Each leaf is a buffer of its own, so that all can be donated.
    """
    copy = partial(jax.tree.map, jnp.copy)
    fake_score = params if fake_score is None else fake_score
    start = {"student": params, "fake_score": fake_score, "weighting": weighting.init()}
    learners = {name: make_learner(copy(start[name]), optimizer) for name, optimizer in optimizers.items()}
    return TrainState(step=jnp.zeros((), jnp.int32), ema=copy(params), **learners)


def divided(batch, parts: int):
    """[b, ...] -> [parts, b/parts, ...]: rows i, i + parts, … are one part, so that every device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def joined(values):
    """[parts, b/parts] -> [b]: the inverse of `divided`."""
    return jnp.moveaxis(values, 0, 1).reshape(-1)


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
    return total, {
        name: jax.tree.map(partial(jnp.sum, axis=0), value) if isinstance(value, tuple) else joined(value)
        for name, value in metrics.items()
    }


def student_step(setup: Setup, objectives: dict[str, Objective], state: TrainState, teacher: Teacher, batch, key):
    """One student update on the sum of the objectives, and one of the adaptive weighting with it; then the EMA."""
    trained = {"student": state.student.params}
    if state.weighting:
        trained["weighting"] = state.weighting.params

    def loss(params, batch, key):
        fake_score = state.fake_score.params if state.fake_score else None
        count = setup.updates(state.step)
        total, metrics = 0, {}
        for name, objective in objectives.items():
            # Losses on the data share a step's time and noise; one on the student's samples draws beside them.
            own = named_keys(key, "time", "noise", "samples")["samples"] if isinstance(objective, Matching) else key
            given = Given(setup.F, params["student"], fake_score, teacher, batch, own, setup.r(state.step), count)
            values, theirs = weighed(objective, objective.term(given), setup, params, batch)
            total = total + values
            metrics |= {f"{name}/{k}": v for k, v in theirs.items()}
        return jnp.mean(total), metrics

    grads, metrics = accumulated_grad(loss, trained, batch, key, setup.parts)
    student, norm, applied = state.student.update(grads["student"], setup.optimizers["student"])
    beta = power_ema_beta(state.student.updates, power_ema_exponent(setup.ema_std))
    ema = optax.incremental_update(student.params, state.ema, jnp.where(applied, 1.0 - beta, 0.0))
    metrics |= {"student/grad_norm": norm, "student/skipped": 1.0 - applied}
    metrics["student/learning_rate"] = setup.rates["student"](state.student.updates)
    new = state.replace(step=state.step + 1, student=student, ema=ema)
    if state.weighting:
        after, norm, finite = state.weighting.update(grads["weighting"], setup.optimizers["weighting"])
        kept = applied & finite  # an update is skipped whole
        new = new.replace(weighting=jax.tree.map(lambda a, b: jnp.where(applied, a, b), after, state.weighting))
        metrics |= {"weighting/grad_norm": norm, "weighting/skipped": 1.0 - kept}
    return new, _means(metrics)


def weighed(objective: Objective, term: Term, setup: Setup, params, batch):
    """scale·loss [b], adaptively weighted if asked for, and the metrics, those that are watched by time as well."""
    values, metrics = term.loss, term.metrics | stability.by_time(term.metrics, term.time)
    if objective is setup.weighted:
        size = batch["x0"][0].size
        metrics["log_weight"] = log_weight = weighting.log_weight(params["weighting"], term.time, size)
        # A sample left out must not raise the weight of its time.
        left_out = metrics.get("nonfinite", jnp.zeros_like(values)) > 0
        values = jnp.where(left_out, 0.0, weighting.adaptive(values, log_weight, size))
    return objective.scale * values, metrics


def critic_step(setup: Setup, objective: Matching, state: TrainState, teacher: Teacher, batch, key):
    """One update of the fake score on the student's samples."""
    count = state.step - setup.updates(state.step)

    def loss(params, batch, key):
        term = objective.critic(Given(setup.F, state.student.params, params, teacher, batch, key, count=count))
        return jnp.mean(term.loss), {f"critic/{k}": v for k, v in term.metrics.items()}

    grads, metrics = accumulated_grad(loss, state.fake_score.params, batch, key, setup.parts)
    fake_score, norm, applied = state.fake_score.update(grads, setup.optimizers["fake_score"])
    metrics |= {"critic/grad_norm": norm, "critic/skipped": 1.0 - applied}
    metrics["critic/learning_rate"] = setup.rates["fake_score"](state.fake_score.updates)
    return state.replace(step=state.step + 1, fake_score=fake_score), _means(metrics)


def probe_step(setup: Setup, objective: ScmConfig, state: TrainState, teacher: Teacher, batch, key) -> dict:
    """stability.probe, on as much of the batch as the other steps have in memory."""
    part = jax.tree.map(lambda x: x[0], divided(batch, setup.parts))
    return stability.probe(objective, Given(setup.F, state.student.params, None, teacher, part, key))


def _means(metrics):
    """Means over the batch; pairs (sum, count) stay, for the mean over several steps.

    "nonfinite" [b] says which samples were left out of some loss: they are known by their place in the batch.
    """
    left_out = [value for name, value in metrics.items() if name.endswith("/nonfinite")]
    named = {"nonfinite": functools.reduce(jnp.maximum, left_out)} if left_out else {}
    return named | {name: value if isinstance(value, tuple) else jnp.mean(value) for name, value in metrics.items()}

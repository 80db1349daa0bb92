"""Training methods: what a step does. The trainer runs any method; a step runs any objective: it sums their losses,
differentiates the sum and updates.

A method is a table of phases. Each phase is a pure function (state, teacher, batch, key) -> (state, metrics), compiled
on its own: a lax.cond would hold the buffers of all of them. batch = {"x0": [b, ...], "cond": {name: [b, ...]}}.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rcm_jax.method import denoiser, trigflow, weighting
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
from rcm_jax.train.averages import Averaged
from rcm_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from rcm_jax.train.state import Learner, Teacher, TrainState, finite_groups, make_learner
from rcm_jax.util.ranges import Guidance, Natural, Probability, Share, config


class Method(NamedTuple):
    """What the trainer runs: init(params, fake_score's or None) -> TrainState, phase(step) -> name (on the host),
    steps[name].

    probe(state, teacher, batch, key) -> metrics, if there is one, looks at the state now and then. powers(state) are
    its power EMAs by their widths, of which snapshots can be kept.
    """

    init: Callable
    phase: Callable[[int], str]
    steps: dict[str, Callable]
    probe: Callable | None = None
    powers: Callable[[TrainState], dict] = lambda state: {}
    open_trips: float = 1.0  # mean trips of the loops of its phases whose length is drawn when they run


@config
class DiffusionMethod(Averaged):
    """Pretraining of a teacher: one objective, one optimizer, its averages."""

    objective: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    weighting: OptimizerConfig | None = None  # trains the adaptive weighting of the loss, if there is one
    dropout: Share = 0.0  # rate, of networks that have it


@config
class RcmConfig(Averaged):
    """rCM (arXiv 2510.08431), or either half of it: a consistency loss, forward divergence; DMD, reverse divergence."""

    student: OptimizerConfig = OptimizerConfig()
    fake_score: OptimizerConfig | None = OptimizerConfig()
    weighting: OptimizerConfig | None = None  # trains the adaptive weighting of the consistency loss, if there is one
    guidance: Guidance = 1.0  # w of F_u + w·(F_c − F_u)
    # w is drawn for each sample, from guidance to this, and the student is given it.
    guidance_max: Guidance | None = None
    dropout: Share = 0.0  # rate, of students that have it
    consistency: Objective | None = dataclasses.field(default=ScmConfig(), metadata={"kinds": CONSISTENCY})
    dmd: Matching | None = dataclasses.field(default=DmdConfig(), metadata={"kinds": MATCHING})
    warmup: Natural = 0  # H: iterations of consistency alone, while r grows to 1
    # Rectified-flow times for which the networks are: p_G, p_D and rollouts are cut to them. Wan2.2 has two networks.
    noise_range: tuple[Probability, ...] = trigflow.WHOLE

    def __post_init__(self):
        super().__post_init__()
        if self.consistency is None and self.dmd is None:
            raise ValueError("consistency and dmd are both None: there is nothing to train by")
        if (self.dmd is None) != (self.fake_score is None):
            raise ValueError("dmd and fake_score belong together: one trains the other; set both, or both to None")
        if self.weighting and not self.consistency:
            raise ValueError("weighting is of the consistency loss, and consistency is None: set it to None")
        if self.warmup and not self.has_both and not (self.consistency and self.consistency.has_tangent):
            raise ValueError(f"warmup {self.warmup} has neither a tangent nor DMD to wait for: set it to 0")
        if (self.guidance != 1.0 or self.guidance_max is not None) and not self.needs_teacher:
            given = f"guidance {self.guidance}, guidance_max {self.guidance_max}"
            raise ValueError(f"{given}: they are a teacher's, and these losses ask none: set them to 1 and None")
        if self.guidance_max is not None and self.guidance_max <= self.guidance:
            raise ValueError(f"guidance_max {self.guidance_max} must be above guidance {self.guidance}, or None")
        self._check_range()

    def _check_range(self):
        """ValueError where times are hardly ever, or never, in noise_range."""
        if len(self.noise_range) != 2 or not self.noise_range[0] < self.noise_range[1]:
            raise ValueError(f"noise_range {list(self.noise_range)} must be two rising numbers, say [0.9, 1.0]")
        for objective in self.objectives.values():
            objective.check_within(self.noise_range)

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


def alone(teacher: Teacher, params):
    """The parameters of a network of which all is trained."""
    return params


class Setup(NamedTuple):
    """What all phases of a method share. weighted: the objective, if any, that has an adaptive weighting."""

    F: Velocities
    optimizers: dict
    averaged: Averaged
    parts: int  # of a batch, one after another, over which a gradient is accumulated
    rates: dict[str, Callable]  # learning rates by the count of updates
    r: Callable = lambda step: 1.0  # tangent warm-up at a step
    updates: Callable = lambda step: step  # of the student in so many steps
    weighted: Objective | None = None
    guidance: tuple[float, float] | None = None  # between which each sample's is drawn
    dropout: float = 0.0
    within: trigflow.Range = trigflow.WHOLE  # the range of noise
    normalised: Callable | None = None  # parameters -> those that a step starts from
    whole: Callable[[Teacher, Any], Any] = alone  # what is trained, beside a teacher's parameters -> what F is given

    def start(self, learner: Learner) -> Learner:
        """As a step finds it."""
        return learner.replace(params=self.normalised(learner.params)) if self.normalised else learner

    def at(self, batch: dict, key) -> tuple[Velocities, dict, jax.Array]:
        """F and the batch as a step with that key has them, with its dropout, and its guidance as a condition; and
        which of its samples [b] are finite: the others are zeros there."""
        F = self.F
        batch, finite = cleaned(batch)
        if self.dropout:  # beyond all places that `named_keys` and parts of a batch take
            dropping = denoiser.with_dropout(F.student, jax.random.fold_in(key, 1000), self.dropout)
            F = F._replace(student=dropping)
        if self.guidance:
            low, high = self.guidance
            w = jax.random.uniform(jax.random.fold_in(key, 1001), batch["x0"].shape[:1], minval=low, maxval=high)
            batch = batch | {"cond": batch["cond"] | {"guidance": w}}
        return F, batch, finite


def cleaned(batch: dict) -> tuple[dict, jax.Array]:
    """(batch, finite [b] bool) with zeros in the place of samples that are not finite, conditions included.

    Left out of a loss alone they would still take the gradient of the whole batch along: 0·NaN is NaN.
    """
    leaves = [x for x in jax.tree.leaves(batch) if jnp.issubdtype(x.dtype, jnp.inexact)]
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(x).reshape(len(x), -1).all(1) for x in leaves])
    return jax.tree.map(lambda x: jnp.where(trigflow.expand(finite, x), x, jnp.zeros_like(x)), batch), finite


def leave_out(term: Term, finite) -> Term:
    """A term without the samples that are not finite: 0 in all but the metric "nonfinite"."""
    there = term.metrics.get("nonfinite", jnp.zeros_like(term.loss))
    metrics = {name: jnp.where(finite, value, 0.0) for name, value in term.metrics.items()}
    return Term(jnp.where(finite, term.loss, 0.0), metrics | {"nonfinite": jnp.where(finite, there, 1.0)}, term.time)


def diffusion_method(
    config: DiffusionMethod, F: Velocity, parts: int = 1, normalised: Callable | None = None
) -> Method:
    """Pretraining as a method: one phase, state.student is the network; of the teacher it asks the conditions alone."""
    configs = {"student": config.optimizer, "weighting": config.weighting}
    optimizers = {name: make_optimizer(c) for name, c in configs.items() if c}
    rates = {name: schedule(c) for name, c in configs.items() if c}
    setup = Setup(
        Velocities(F, F, F), optimizers, config, parts, rates, dropout=config.dropout,
        weighted=config.objective if config.weighting else None, normalised=normalised,
    )  # fmt: skip
    step = partial(student_step, setup, {"diffusion": config.objective})
    init = partial(_init, optimizers, config.ema_tracks)
    return Method(init, lambda i: "diffusion", {"diffusion": step}, powers=config.powers)


def rcm_method(
    config: RcmConfig, F: Velocities, parts: int = 1, normalised: Callable | None = None, whole: Callable = alone
) -> Method:
    """Distillation as a method: warmup (consistency alone), student (all losses) and critic (fake score) phases.

    whole(teacher, params): the parameters of a network of which less is trained, beside those of the teacher.
    """
    configs = {"student": config.student, "weighting": config.weighting, "fake_score": config.fake_score}
    optimizers = {name: make_optimizer(c) for name, c in configs.items() if c}
    rates = {name: schedule(c) for name, c in configs.items() if c}
    setup = Setup(
        F, optimizers, config, parts, rates, partial(_warmup, config.warmup), partial(student_updates, config),
        weighted=config.consistency if config.weighting else None, dropout=config.dropout, normalised=normalised,
        guidance=None if config.guidance_max is None else (config.guidance, config.guidance_max),
        within=config.noise_range, whole=whole,
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
    init = partial(_init, optimizers, config.ema_tracks)
    return Method(init, partial(rcm_phase, config), steps, probe, config.powers, config.open_trips)


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


def _init(optimizers: dict, tracks: tuple[float, ...], params, fake_score=None) -> TrainState:
    """Every network starts from the same parameters, the fake score from its own if there are any.

    Each leaf is a buffer of its own, so that all can be donated.
    """
    copy = partial(jax.tree.map, jnp.copy)
    fake_score = params if fake_score is None else fake_score
    start = {"student": params, "fake_score": fake_score, "weighting": weighting.init()}
    learners = {name: make_learner(copy(start[name]), optimizer) for name, optimizer in optimizers.items()}
    averages = {"ema": copy(params), "tracks": tuple(copy(params) for _ in tracks) or None}
    return TrainState(step=jnp.zeros((), jnp.int32), **averages, **learners)


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
    """One student update on the sum of the objectives, and one of the adaptive weighting with it; then its averages."""
    student = setup.start(state.student)
    trained = {"student": student.params}
    if state.weighting:
        trained["weighting"] = state.weighting.params

    def loss(params, batch, key):
        own = setup.whole(teacher, params["student"])
        fake_score = setup.whole(teacher, state.fake_score.params) if state.fake_score else None
        count = setup.updates(state.step)
        F, batch, finite = setup.at(batch, key)
        total, metrics = 0, {"data/nonfinite": 1.0 - finite}
        for name, objective in objectives.items():
            # Losses on the data share a step's time and noise; one on the student's samples draws beside them.
            drawn = named_keys(key, "time", "noise", "samples")["samples"] if isinstance(objective, Matching) else key
            r = setup.r(state.step)
            given = Given(F, own, fake_score, teacher, batch, drawn, r, count, setup.within)
            values, theirs = weighed(objective, leave_out(objective.term(given), finite), setup, params, batch)
            total = total + values
            metrics |= {f"{name}/{k}": v for k, v in theirs.items()}
        return jnp.mean(total), metrics

    grads, metrics = accumulated_grad(loss, trained, batch, key, setup.parts)
    student, norm, applied = student.update(grads["student"], setup.optimizers["student"], any_left(metrics))
    averages = setup.averaged.averages(state, student.params, len(batch["x0"]), applied)
    metrics |= {"student/grad_norm": norm, "student/skipped": 1.0 - applied}
    metrics["student/learning_rate"] = setup.rates["student"](state.student.updates)
    new = state.replace(step=state.step + 1, student=student, **averages)
    if state.weighting:
        after, norm, finite = state.weighting.update(grads["weighting"], setup.optimizers["weighting"])
        kept = applied & finite  # an update is skipped whole
        new = new.replace(weighting=jax.tree.map(lambda a, b: jnp.where(applied, a, b), after, state.weighting))
        metrics |= {"weighting/grad_norm": norm, "weighting/skipped": 1.0 - kept}
    return new, reported(metrics, student=grads["student"])


def weighed(objective: Objective, term: Term, setup: Setup, params, batch):
    """scale·loss [b], adaptively weighted if asked for, and the metrics, those that are watched by time as well."""
    values, metrics = term.loss, term.metrics | stability.by_time(term.metrics, term.time)
    if objective is setup.weighted:
        size = 1 if objective.averages else batch["x0"][0].size
        metrics["log_weight"] = log_weight = weighting.log_weight(params["weighting"], term.time, size)
        # A sample left out must not raise the weight of its time.
        values = jnp.where(metrics["nonfinite"] > 0, 0.0, weighting.adaptive(values, log_weight, size))
    return objective.scale * values, metrics


def critic_step(setup: Setup, objective: Matching, state: TrainState, teacher: Teacher, batch, key):
    """One update of the fake score on the student's samples."""
    count = state.step - setup.updates(state.step)
    learner, student = setup.start(state.fake_score), setup.whole(teacher, state.student.params)

    def loss(params, batch, key):
        _, batch, finite = setup.at(batch, key)
        fake_score = setup.whole(teacher, params)
        given = Given(setup.F, student, fake_score, teacher, batch, key, count=count, within=setup.within)
        term = leave_out(objective.critic(given), finite)
        return jnp.mean(term.loss), {f"critic/{k}": v for k, v in term.metrics.items()} | {
            "data/nonfinite": 1.0 - finite
        }

    grads, metrics = accumulated_grad(loss, learner.params, batch, key, setup.parts)
    fake_score, norm, applied = learner.update(grads, setup.optimizers["fake_score"], any_left(metrics))
    metrics |= {"critic/grad_norm": norm, "critic/skipped": 1.0 - applied}
    metrics["critic/learning_rate"] = setup.rates["fake_score"](state.fake_score.updates)
    return state.replace(step=state.step + 1, fake_score=fake_score), reported(metrics, critic=grads)


def probe_step(setup: Setup, objective: ScmConfig, state: TrainState, teacher: Teacher, batch, key) -> dict:
    """stability.probe, on as much of the batch as the other steps have in memory."""
    student = setup.whole(teacher, state.student.params)
    _, part, _ = setup.at(jax.tree.map(lambda x: x[0], divided(batch, setup.parts)), key)
    return stability.probe(objective, Given(setup.F, student, None, teacher, part, key, within=setup.within))


def left_out(metrics: dict) -> list:
    """[b] of every loss: 1 for the samples that it left out."""
    return [v for name, v in metrics.items() if name.endswith("/nonfinite") and not name.startswith("data/")]


def any_left(metrics: dict):
    """[] bool, whether any sample counts in any loss: a gradient of none is no gradient."""
    return jnp.stack([jnp.min(flags) for flags in left_out(metrics)]).min() < 1


def reported(metrics: dict, **grads) -> dict:
    """Means over the batch; pairs (sum, count) stay, for the mean over several steps.

    "watched" is for who looks after the run (rcm_jax.train.guard): "data" [b], 1 for examples that are not finite, and
    "examples" [b], for those left out of some loss, all known by their place in the batch; "gradients", {network:
    `finite_groups`}.
    """
    watched = {
        "data": metrics["data/nonfinite"],
        "examples": functools.reduce(jnp.maximum, left_out(metrics)),
        "gradients": {network: finite_groups(grad) for network, grad in grads.items()},
    }
    means = {name: value if isinstance(value, tuple) else jnp.mean(value) for name, value in metrics.items()}
    return means | {"watched": watched}

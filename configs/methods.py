"""Methods by name, for any training config: --config=digits.py:scm or, with a variant, :tiny,dcm.

| name | trains by |
|---|---|
| rcm | sCM and DMD (arXiv 2510.08431): what the config says without a name |
| scm | continuous-time consistency with the teacher alone (arXiv 2410.11081) |
| scm_semi, scm_discrete | the same with finite differences, in time or altogether, for the derivative |
| rcm_adaptive, scm_adaptive | rcm and scm with the adaptive weighting of the sCM paper |
| sct | consistency with the data alone: no teacher, from random parameters |
| rf_scm, rf_rcm | scm and rcm with the consistency loss in the velocity of rectified flow |
| dcm, dcm_dmd | consistency in discrete time, alone and with DMD |
| dmd, dmd_fixed | DMD alone, its rollouts at random times and at the mid times of the sampler |

`smoke`, with or without one of them, is the same in about a minute: to see that everything runs here. `teacher` makes
the teacher alone, where the config says how.

A variant or a method is a function Experiment -> Experiment.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict, config_dict

from configs.machines import MACHINES
from rcm_jax.method.objectives import DcmConfig, RfScmConfig
from rcm_jax.run.experiment import Experiment, Pretraining
from rcm_jax.util.config import revise, to_mapping
from rcm_jax.util.ranges import options, parts

Change = Callable[[Experiment], Experiment]
WITHOUT_DMD = {"rcm.dmd": None, "rcm.fake_score": None, "fake_start": ""}


def choose(run: Experiment, variant: str, variants: Mapping[str, Change]) -> Pretraining:
    """Applies what is named in `variant`, separated by commas: keys of `variants`, one machine of configs/machines.py
    among them at most, in the order that `variants` has; then one method at most; then `smoke`; then `teacher`.

    A key of `variants` that is the name of a method takes its place.
    """
    names = [name.strip().lower() for name in variant.split(",") if name.strip()]
    methods = METHODS if run.rcm.dmd else {}  # they are made of a config of rCM
    known = methods | dict(variants) | {"smoke": smoke, "teacher": teacher}
    for name in names:
        if name not in known:
            raise ValueError(f"variant {name!r} is none of {', '.join(known)}")
    for kind, table in (("methods", METHODS), ("machines", MACHINES)):
        if len(chosen := [name for name in names if name in table]) > 1:
            raise ValueError(f"variant {variant!r} names {len(chosen)} {kind}, {', '.join(chosen)}: choose one")
    order = [*(name for name in variants if name not in METHODS), *METHODS, "smoke", "teacher"]
    for name in sorted(names, key=order.index):
        run = known[name](run)
    return run


def teacher(run: Experiment) -> Pretraining:
    """The part that makes the teacher."""
    if run.pretrain is None:
        raise ValueError("this config has no pretraining: its teacher is made of published weights")
    return run.pretraining


def flagged(run: Pretraining) -> ConfigDict:
    """As flags need it: every key can be set, those that are None by their type, groups left out by any key of them."""

    def absent(field, hint):
        kinds = [kind for kind in options(hint) if kind is not types.NoneType]
        if "kinds" in field.metadata or any(dataclasses.is_dataclass(kind) for kind in kinds):
            return {}
        return config_dict.placeholder(parts(kinds[0])[0])

    return ConfigDict(to_mapping(run, absent))


def student_updates(run: Experiment) -> int:
    """Those of rCM: the other methods have as many."""
    return run.rcm.warmup + -(-(run.train.steps - run.rcm.warmup) // run.rcm.dmd.update_freq)


def smoke(run):
    """At most 40 steps, and 40 of pretraining; schedules and report are cut to match, and the batches of a demo."""
    changes = {"rcm.warmup": min(run.rcm.warmup, 10), "sampling.report_samples": 200}
    changes["sampling.teacher_steps"] = min(run.sampling.teacher_steps, 10)
    changes |= _short("train", run.train, 40) | _short("rcm.student", run.rcm.student, 40)
    if run.rcm.fake_score:
        changes |= _short("rcm.fake_score", run.rcm.fake_score, 40)
    if run.pretrain:
        changes |= _short("pretrain.train", run.pretrain.train, 40)
        changes |= {"train.batch_size": 32, "pretrain.train.batch_size": 32}
        changes |= _short("pretrain.method.optimizer", run.pretrain.method.optimizer, 40)
    return revise(run, changes)


def _short(group: str, config, steps: int) -> dict:
    """What makes a group of a config that says how long, a TrainConfig or an OptimizerConfig, short."""
    most = {"steps": steps, "log_every": 20, "warmup_steps": 10, "decay_steps": steps}
    values = {key: getattr(config, key) for key in most if hasattr(config, key)}
    return {f"{group}.{key}": min(value, most[key]) for key, value in values.items()}


def scm(run):
    """sCM alone, with as many updates of the student."""
    return revise(run, {"train.steps": student_updates(run)} | WITHOUT_DMD)


def scm_semi(run):
    """Its derivative by a difference in t."""
    return revise(scm(run), {"rcm.consistency.derivative": "semi"})


def scm_discrete(run):
    """Its derivative by a difference altogether."""
    return revise(scm(run), {"rcm.consistency.derivative": "discrete"})


def rcm_adaptive(run):
    """rCM with the adaptive weighting of the sCM paper."""
    return revise(run, {"rcm.weighting": dataclasses.replace(run.rcm.student, learning_rate=1e-2, weight_decay=0.0)})


def scm_adaptive(run):
    """sCM with the adaptive weighting of the sCM paper."""
    return scm(rcm_adaptive(run))


def sct(run):
    """sCM that follows the data: no teacher, random parameters at first."""
    changes = {"rcm.consistency.follows": "data", "rcm.guidance": 1.0}
    return revise(scm(run), changes | {"teacher": "", "pretrain": None, "exact_teacher": False})


def rf_rcm(run):
    """With the times and the scale that the config has for sCM."""
    old = run.rcm.consistency
    return revise(run, {"rcm.consistency": RfScmConfig(time=old.time, scale=old.scale)})


def rf_scm(run):
    """`rf_rcm` without DMD."""
    return scm(rf_rcm(run))


def dcm_dmd(run):
    """The warm-up of rCM is of dCM alone, as in the official code, though there is no tangent."""
    return revise(run, {"rcm.consistency": DcmConfig(scale=run.rcm.consistency.scale)})


def dcm(run):
    """dCM alone: it has no tangent, and no warm-up."""
    alone = {"rcm.warmup": 0, "train.steps": student_updates(run)} | WITHOUT_DMD
    return revise(run, {"rcm.consistency": DcmConfig(scale=run.rcm.consistency.scale)} | alone)


def dmd(run):
    """DMD alone, with as many updates of the student."""
    steps = student_updates(run) * run.rcm.dmd.update_freq
    return revise(run, {"train.steps": steps, "rcm.consistency": None, "rcm.warmup": 0})


def dmd_fixed(run):
    """DMD alone, its rollouts at the sampler's times."""
    return revise(dmd(run), {"rcm.dmd.mid_times": run.sampling.mid_times[run.rcm.dmd.max_rollout - 1]})


METHODS: dict[str, Change] = {
    "rcm": lambda run: run,
    "rcm_adaptive": rcm_adaptive,
    "scm": scm,
    "scm_semi": scm_semi,
    "scm_discrete": scm_discrete,
    "scm_adaptive": scm_adaptive,
    "sct": sct,
    "rf_scm": rf_scm,
    "rf_rcm": rf_rcm,
    "dcm": dcm,
    "dcm_dmd": dcm_dmd,
    "dmd": dmd,
    "dmd_fixed": dmd_fixed,
}


class Stage(NamedTuple):
    """A part of a recipe: a method, and its share of the updates of the student that the config has."""

    method: str
    share: float


# Several methods, each from the student of the one before. "staged" is the official advice since June 2026.
RECIPES: dict[str, tuple[Stage, ...]] = {
    "staged": (Stage("dcm", 0.2), Stage("scm", 0.4), Stage("rcm", 0.4)),
}


def stages(run: Experiment, recipe: str) -> dict[str, Experiment]:
    """{"1_dcm": …, "2_scm": …, …}: as many updates of the student in all as `run` has, a config of rCM.

    No stage waits for a tangent or for DMD: the stage before it was the warm-up. Learning rates that decay do so within
    each stage.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is none of {', '.join(RECIPES)}")
    if not (run.rcm.dmd and run.rcm.consistency and run.rcm.consistency.has_tangent):
        raise ValueError(f"a recipe is made of a config of rCM, and this one is of {run.rcm.name}: name no method")
    made, total = {}, student_updates(run)
    for i, (method, share) in enumerate(RECIPES[recipe], 1):
        updates = max(2, round(share * total))
        stage = METHODS[method](revise(run, {"rcm.warmup": 0}))
        stage = revise(stage, {"train.steps": updates * (stage.rcm.dmd.update_freq if stage.rcm.dmd else 1)})
        if run.rcm.student.decay_steps:
            stage = revise(stage, {"rcm.student.decay_steps": max(updates, run.rcm.student.warmup_steps + 1)})
        made[f"{i}_{method}"] = stage
    return made


def chain(run: Experiment, recipe: str, folder) -> dict:
    """{workdir below a folder: stage}, each stage starting from the one before, all from the teacher of the first."""
    made, start, teacher = {}, run.start, run.teacher
    for name, stage in stages(run, recipe).items():
        made[folder / name] = revise(stage, {"start": start, "teacher": teacher})
        start = str(folder / name)
        teacher = teacher or (str(folder / name / "teacher") if run.pretrain else "")
    return made

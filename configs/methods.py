"""Methods by name, for any training config: --config=digits.py:scm or, with a variant, :tiny,dcm.

| name | trains by |
|---|---|
| rcm | sCM and DMD (arXiv 2510.08431): what the config says without a name |
| scm | continuous-time consistency with the teacher alone (arXiv 2410.11081) |
| scm_semi, scm_discrete | the same with finite differences, in time or altogether, for the derivative |
| rcm_adaptive, scm_adaptive | rcm and scm with the adaptive weighting of the sCM paper |
| sct | consistency with the data alone: no teacher, from random parameters |
| dcm, dcm_dmd | consistency in discrete time, alone and with DMD |
| dmd, dmd_fixed | DMD alone, its rollouts at random times and at the mid times of the sampler |

A variant or a method is a function Experiment -> Experiment.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict, config_dict

from rcm_jax.method.objectives import DcmConfig
from rcm_jax.run.experiment import Experiment
from rcm_jax.util.config import revise, to_mapping

Change = Callable[[Experiment], Experiment]


def choose(run: Experiment, variant: str, variants: Mapping[str, Change]) -> Experiment:
    """Applies what is named in `variant`, separated by commas: keys of `variants`, then one method at most.

    A key of `variants` that is the name of a method takes its place.
    """
    names, known = [name.strip().lower() for name in variant.split(",") if name.strip()], METHODS | dict(variants)
    for name in names:
        if name not in known:
            raise ValueError(f"variant {name!r} is none of {', '.join(known)}")
    if len(chosen := [name for name in names if name in METHODS]) > 1:
        raise ValueError(f"variant {variant!r} names {len(chosen)} methods, {', '.join(chosen)}: choose one")
    for name in sorted(names, key=lambda name: name in METHODS):
        run = known[name](run)
    return run


def flagged(run: Experiment) -> ConfigDict:
    """As flags need it: every key can be set, those that are None by their type, groups left out by any key of them."""

    def absent(field, hint):
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if "kinds" in field.metadata or any(dataclasses.is_dataclass(option) for option in options):
            return {}
        return config_dict.placeholder(next(option for option in options if option is not types.NoneType))

    return ConfigDict(to_mapping(run, absent))


def student_updates(run: Experiment) -> int:
    """Those of rCM: the other methods have as many."""
    return run.rcm.warmup + -(-(run.train.steps - run.rcm.warmup) // run.rcm.dmd.update_freq)


def scm(run):
    return revise(run, {"train.steps": student_updates(run), "rcm.dmd": None, "rcm.fake_score": None})


def scm_semi(run):
    return revise(scm(run), {"rcm.consistency.derivative": "semi"})


def scm_discrete(run):
    return revise(scm(run), {"rcm.consistency.derivative": "discrete"})


def rcm_adaptive(run):
    return revise(run, {"rcm.weighting": dataclasses.replace(run.rcm.student, learning_rate=1e-2, weight_decay=0.0)})


def scm_adaptive(run):
    return scm(rcm_adaptive(run))


def sct(run):
    changes = {"rcm.consistency.follows": "data", "rcm.guidance": 1.0}
    return revise(scm(run), changes | {"teacher": "", "pretrain": None, "exact_teacher": False})


def dcm_dmd(run):
    changes = {
        "train.steps": student_updates(run) * run.rcm.dmd.update_freq,
        "rcm.consistency": DcmConfig(scale=run.rcm.consistency.scale),
        "rcm.warmup": 0,  # there is no tangent
    }
    return revise(run, changes)


def dcm(run):
    return scm(dcm_dmd(run))


def dmd(run):
    steps = student_updates(run) * run.rcm.dmd.update_freq
    return revise(run, {"train.steps": steps, "rcm.consistency": None, "rcm.warmup": 0})


def dmd_fixed(run):
    return revise(dmd(run), {"rcm.dmd.mid_times": run.sampling.mid_times[run.rcm.dmd.max_rollout - 1]})


METHODS: dict[str, Change] = {
    "rcm": lambda run: run,
    "rcm_adaptive": rcm_adaptive,
    "scm": scm,
    "scm_semi": scm_semi,
    "scm_discrete": scm_discrete,
    "scm_adaptive": scm_adaptive,
    "sct": sct,
    "dcm": dcm,
    "dcm_dmd": dcm_dmd,
    "dmd": dmd,
    "dmd_fixed": dmd_fixed,
}

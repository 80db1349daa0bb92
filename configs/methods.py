"""Methods by name, for any training config: --config=configs/digits.py:scm or, with a variant, :tiny,dcm.

| name | trains by |
|---|---|
| rcm | sCM and DMD (arXiv 2510.08431): what the config says without a name |
| scm | continuous-time consistency with the teacher alone (arXiv 2410.11081) |
| scm_semi, scm_discrete | the same with finite differences, in time or altogether, for the derivative |
| rcm_adaptive, scm_adaptive | rcm and scm with the adaptive weighting of the sCM paper |
| sct | consistency with the data alone: no teacher, from random parameters |
| dcm, dcm_dmd | consistency in discrete time, alone and with DMD |
| dmd, dmd_fixed | DMD alone, its rollouts at random times and at the mid times of the sampler |
"""

from ml_collections import ConfigDict


def choose(config: ConfigDict, variant: str, variants: dict) -> ConfigDict:
    """Applies what is named in `variant`, separated by commas: keys of `variants`, then one method at most.

    A key of `variants` that is the name of a method takes its place.
    """
    names, known = list(filter(None, variant.split(","))), METHODS | variants
    for name in names:
        if name not in known:
            raise ValueError(f"variant {name!r} is none of {', '.join(known)}")
    if len(chosen := [name for name in names if name in METHODS]) > 1:
        raise ValueError(f"variant {variant!r} names {len(chosen)} methods, {', '.join(chosen)}: choose one")
    for name in sorted(names, key=lambda name: name in METHODS):
        known[name](config)
    return config


def student_updates(config) -> int:
    """Those of rCM: the other methods have as many."""
    return config.rcm.warmup + -(-(config.train.steps - config.rcm.warmup) // config.rcm.dmd.update_freq)


def scm(config):
    config.train.steps = student_updates(config)
    config.rcm.dmd = None


def scm_semi(config):
    scm(config)
    config.rcm.consistency.derivative = "semi"


def scm_discrete(config):
    scm(config)
    config.rcm.consistency.derivative = "discrete"


def rcm_adaptive(config):
    config.rcm.consistency.weighting = config.rcm.student.copy_and_resolve_references()
    config.rcm.consistency.weighting.update(learning_rate=1e-2, weight_decay=0.0)


def scm_adaptive(config):
    rcm_adaptive(config)
    scm(config)


def sct(config):
    scm(config)
    config.rcm.consistency.velocity = "data"
    config.rcm.guidance = 1.0
    config.teacher, config.pretrain, config.exact_teacher = "", None, False


def dcm_dmd(config):
    config.train.steps = student_updates(config) * config.rcm.dmd.update_freq
    config.rcm.consistency = ConfigDict(
        dict(kind="dcm", steps=48, skip=1, shift=5.0, scale=config.rcm.consistency.scale, weighting=None)
    )
    config.rcm.warmup = 0  # there is no tangent


def dcm(config):
    dcm_dmd(config)
    scm(config)


def dmd(config):
    config.train.steps = student_updates(config) * config.rcm.dmd.update_freq
    config.rcm.consistency = None
    config.rcm.warmup = 0


def dmd_fixed(config):
    dmd(config)
    config.rcm.dmd.mid_times = config.sampling.mid_times[config.rcm.dmd.max_rollout - 1]


METHODS = {
    "rcm": lambda config: None,
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

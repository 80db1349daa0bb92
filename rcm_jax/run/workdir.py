"""Workdirs: config.json, which says what made one, and what may change when its run goes on.

A workdir belongs to the config that made it. Three kinds of config make one: an Experiment (a distillation), a
Pretraining (a teacher) and a Predictor (converted weights).
"""

import contextlib
import json

from absl import logging

from rcm_jax.models.adapters import AdapterConfig
from rcm_jax.parallel import distributed
from rcm_jax.run.experiment import Experiment, Predictor, Pretraining, from_mapping
from rcm_jax.train import checkpoint
from rcm_jax.util.config import flatten, to_mapping
from rcm_jax.util.files import (
    as_path,
    check_new_folder,
    emptied_on_failure,
    empty,
    new_folder,
    read_json,
    reading,
    stored,
    write_text,
)

# What may change between a run and its continuation. (More pretraining steps would be another teacher.)
COMPUTED = ("mesh.data", "mesh.fsdp", "mesh.seq", "model.attention", "model.remat")  # the same numbers, otherwise
SHOWN = ("sampling.", "media.")  # groups: how samples are drawn, not what is learned
HABITS = ("log_every", "checkpoint_every", "sample_every", "snapshot_every", "keep", "offload", "asynchronous")
HABITS += ("keep_every", "wandb", "wandb_project", "wandb_name", "hang_after")
RESCUED = ("most_skips", "leave_out")  # what may save a run that diverges, and so may its
PACE = ("learning_rate", "warmup_steps", "decay_steps", "final_scale", "decay_after")
LEARNERS = ("rcm.student", "rcm.fake_score", "rcm.weighting", "pretrain.method.optimizer", "pretrain.method.weighting")
MOVED_DATA = ("data.path",)  # that they are the same is the user's word
MAY_CHANGE = (
    *COMPUTED,
    *SHOWN,
    *MOVED_DATA,
    *(f"train.{key}" for key in ("steps", *HABITS, *RESCUED)),
    *(f"pretrain.train.{key}" for key in (*HABITS, *RESCUED)),
    *(f"{learner}.{key}" for learner in LEARNERS for key in PACE),
)
# What a teacher and its student must agree on, less how it is computed and where data lie.
SHARED_WITH_TEACHER = ("data.", "model.", "parametrization", "time_scale")
NOT_SHARED = (*MOVED_DATA, "model.attention", "model.remat", "model.dtype", "model.time_dtype")
# Where keys of configs stood that were written before: whole groups move.
OLD_PLACES = {
    "rcm.dmd.fake_score": "rcm.fake_score",
    "rcm.consistency.weighting": "rcm.weighting",
    "rcm.consistency.velocity": "rcm.consistency.follows",
    "pretrain.method.time": "pretrain.method.objective.time",
    "pretrain.method.drop_condition": "pretrain.method.objective.drop_condition",
}


def claim(folder, config: Predictor) -> None:
    """Write config.json into a workdir; ValueError if it is there, of another config in more than MAY_CHANGE.

    Of several processes the first alone looks and decides, and all hear its verdict.
    """
    distributed.by_first(lambda: _claim(as_path(folder), config))


def check(folder, config: Predictor) -> None:
    """ValueError where `claim` would raise it, also for the teacher that is pretrained there; nothing is written."""
    folder = as_path(folder)
    distributed.by_first(lambda: _is_new(folder, config))
    if isinstance(config, Experiment) and config.pretrain and not config.teacher:
        distributed.by_first(lambda: _is_new(folder / "teacher", config.pretraining))


def _claim(folder, config: Predictor) -> None:
    """As one process."""
    if _is_new(folder, config):
        write_text(folder / "config.json", as_json(config))


def _is_new(folder, config: Predictor) -> bool:
    """Whether a workdir has not this very config yet; ValueError if it is another's."""
    path = folder / "config.json"
    if path.exists():
        there = read(folder)
        differing = differences(there, config, but_for=MAY_CHANGE)
        if differing:
            more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
            shown = "; ".join(differing[:5])
            raise ValueError(f"workdir {folder} belongs to another config: {shown}{more}. Choose another --workdir.")
        return there != config
    if not empty(folder):
        raise ValueError(f"workdir {folder} is not empty and has no config.json: choose a new or empty --workdir")
    return True


def read(folder) -> Predictor:
    """The config that made a workdir; ValueError if there is none."""
    path = as_path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is no training workdir: it has no config.json")
    problem = "is no config"
    values = read_json(path, problem)
    with reading(path, problem):
        if not isinstance(values, dict):
            raise ValueError("it holds no keys")
        for old, new in OLD_PLACES.items():
            _move(values, old.split("."), new.split("."))
        rcm = values.get("rcm")
        if isinstance(rcm, dict) and not rcm.get("dmd"):
            rcm.setdefault("fake_score", None)
        return from_mapping(values)


def _move(values: dict, old: list[str], new: list[str]) -> None:
    """Moves what stands at one path of nested groups to another, if it is there."""
    source = values
    for name in old[:-1]:
        source = source.get(name) if isinstance(source, dict) else None
    if not isinstance(source, dict) or old[-1] not in source:
        return
    target = values
    for name in new[:-1]:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise ValueError(f"{'.'.join(new[:-1])} is no group of keys")
    target[new[-1]] = source.pop(old[-1])


def as_json(config) -> str:
    """What config.json holds."""
    return json.dumps(to_mapping(config), indent=1) + "\n"


def differences(there, here, only=None, but_for=()) -> list[str]:
    """A sentence for every key of two configs that differs; `only` and `but_for` are keys, or groups with a dot."""
    theirs, ours = (flatten(to_mapping(config)) for config in (there, here))
    return [
        f"{key} is {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and (only is None or _listed(key, only)) and not _listed(key, but_for)
    ]


def _listed(key: str, keys) -> bool:
    """Whether config.KEY is one of keys, or in one of its groups."""
    name = key.removeprefix("config.")
    return any(name == listed or (listed[-1] == "." and f"{name}.".startswith(listed)) for listed in keys)


def check_same(folder, there: Predictor, here, keys=SHARED_WITH_TEACHER) -> None:
    """ValueError that lists where the network in a workdir is not the one of a config."""
    if differing := differences(there, here, only=keys, but_for=NOT_SHARED):
        raise ValueError(f"the network in {folder} does not fit this config: {'; '.join(differing)}")


def check_teacher(run: Experiment) -> int:
    """The step of the finished teacher; ValueError unless run.teacher is a teacher's workdir that fits."""
    if isinstance(read(run.teacher), Experiment):
        raise ValueError(f"{run.teacher} holds a distilled student; its own teacher may be in {run.teacher}/teacher")
    return check_start(run.teacher, run)


def check_start(folder, run: Experiment) -> int:
    """The last step of what a workdir holds, a student, a teacher or converted weights; ValueError if it does not fit.

    That the step is there is seen when it is read.
    """
    there = read(folder)
    if isinstance(there, Pretraining):
        check_same(folder, there, run)
        return there.train.steps if isinstance(there, Experiment) else there.pretrain.train.steps
    check_same(folder, there, run, SHARED_WITH_TEACHER[1:])  # converted weights say nothing of data
    return 0


def adapter_of(config: Predictor) -> AdapterConfig | None:
    """What a workdir of that config holds of its student; None: whole parameters."""
    return config.adapter if isinstance(config, Experiment) else None


def check_adapter(folder, there: Predictor, run: Experiment) -> None:
    """ValueError unless what a run starts from is an adapter of the same config where it trains one, else a network."""
    theirs = adapter_of(there)
    if theirs != run.adapter:
        words = [f"an adapter ({x})" if x else "whole parameters" for x in (theirs, run.adapter)]
        raise ValueError(
            f"{folder} holds {words[0]}, and this config trains {words[1]}: export_checkpoint.py merges an adapter, "
            "extract_lora.py makes one of two networks"
        )


def write_converted(folder, config: Predictor, params, step: int = 0) -> None:
    """A new workdir of parameters [numpy arrays] that no training saved; it is whole or not there."""
    folder = as_path(folder)
    if stored(folder):  # straight to the store: the arrays of a folder here would be copied once more
        check_new_folder(folder)
        with emptied_on_failure(folder):
            checkpoint.write_params(folder, params, step)
            write_text(folder / "config.json", as_json(config))
        return
    with new_folder(folder) as temporary:
        with _quiet():
            checkpoint.write_params(temporary, params, step)
        write_text(temporary / "config.json", as_json(config))


@contextlib.contextmanager
def _quiet():
    """Of an error that it raises, Orbax has logged the traceback in each of its threads."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)

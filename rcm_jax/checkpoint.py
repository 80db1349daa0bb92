"""Orbax checkpoints with exact resume, and the workdir they live in.

A workdir holds config.json (what made it) and checkpoints/STEP/: one item per field of the train state, so that the
averaged student alone can be read as a teacher or for sampling, and "data", the position of the input pipeline.
"""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from rcm_jax.config import flatten
from rcm_jax.files import write_text
from rcm_jax.train_state import TrainState

# What may change between a run and its continuation: when it stops and what it shows, not what it learns.
_SHOWN = {f"config.sampling.{key}" for key in ("sigma_max", "mid_times", "teacher_shift")}
# (More pretraining steps would be another teacher.)
_HABITS = ("log_every", "checkpoint_every", "sample_every", "keep", "wandb")
MAY_CHANGE = (
    _SHOWN
    | {f"config.train.{key}" for key in ("steps", *_HABITS)}
    | {f"config.pretrain.train.{key}" for key in _HABITS}
)


def claim_workdir(workdir, values: dict) -> None:
    """Write config.json into a workdir; ValueError if it is there, of another config in more than MAY_CHANGE."""
    workdir = pathlib.Path(workdir)
    if workdir.parts and workdir.parts[0].endswith(":"):
        raise ValueError(f"workdir {workdir}: only folders of this machine's file systems can be workdirs so far")
    path = workdir / "config.json"
    if path.exists():
        there, here = flatten(read_config(workdir)), flatten(values)
        differing = [
            key
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key) and key not in MAY_CHANGE
        ]
        if differing:
            shown = "; ".join(f"{key} is {there.get(key)} there, {here.get(key)} here" for key in differing[:5])
            more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
            raise ValueError(f"workdir {workdir} belongs to another config: {shown}{more}. Choose another --workdir.")
        if there == here:
            return
    elif workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"workdir {workdir} is not empty and has no config.json: choose a new or empty --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1) + "\n")


def read_config(workdir) -> dict:
    """The config that made a workdir; ValueError if there is none."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} is no training workdir: it has no config.json")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no config: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no config: it holds no keys")
    return values


def open_manager(workdir, keep: int | None = None) -> ocp.CheckpointManager:
    """The checkpoints of a workdir; `keep` is how many stay when new ones are saved (None: all)."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(pathlib.Path(workdir).absolute() / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, data) -> None:
    """Save all of the state and the position of the data iterator at step state.step, if it is not there yet."""
    step = int(state.step)
    if step in manager.all_steps():
        return
    items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
    manager.save(step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave(_encode(data.get_state()))))


def restore(manager: ocp.CheckpointManager, abstract: TrainState, data) -> TrainState:
    """The newest state, placed as the shardings of `abstract` say, and `data` moved to its position."""
    step = manager.latest_step()
    items = {name: ocp.args.StandardRestore(item) for name, item in _items(abstract).items()}
    restored = manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
    data.set_state(_decode(restored["data"]))
    count = jax.device_put(np.asarray(step, abstract.step.dtype), abstract.step.sharding)
    return abstract.replace(step=count, **{name: restored[name] for name in items})


def restore_item(workdir, name: str, abstract, step: int | None = None):
    """One field of the newest (or the given) checkpoint of a workdir, e.g. "ema"; ValueError if there is none."""
    workdir = pathlib.Path(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"no checkpoint in {workdir}: it has no folder checkpoints")
    with open_manager(workdir) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            wanted = "any step" if step is None else f"step {step}"
            raise ValueError(f"no checkpoint of {wanted} in {workdir}; steps there: {steps or 'none'}")
        step = steps[-1] if step is None else step
        return manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)}))[name]


def _items(state: TrainState) -> dict:
    """The fields that are saved: the step is the checkpoint's own."""
    return {name: item for name, item in vars(state).items() if item is not None and name != "step"}


def _encode(position):
    """grain gives a dict or, from worker processes, bytes."""
    return {"bytes": position.hex()} if isinstance(position, bytes) else {"json": position}


def _decode(encoded):
    return bytes.fromhex(encoded["bytes"]) if "bytes" in encoded else encoded["json"]


def abstract_like(tree, sharding):
    """ShapeDtypeStructs of a tree with the shardings of a tree of the same structure (or one for all)."""
    shardings = sharding if not isinstance(sharding, jax.sharding.Sharding) else jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

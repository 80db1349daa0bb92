"""Orbax checkpoints that are known to be whole.

A workdir holds checkpoints/STEP/: one item per field of the train state, so that the averaged student alone can be read
as a teacher or for sampling; "data", the position of the input pipeline; and "record", with digests of all of them.
snapshots/STEP/, if there are any, have an item per power EMA, named by its width, "count", how many updates they
average, and a record. They stay. Whatever is read is compared with its digest. rcm_jax/train/rotation.py writes the
checkpoints of a run, and chooses which of them stay.
"""

import asyncio.log
import contextlib
import functools
import gc
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from rcm_jax.parallel import distributed
from rcm_jax.train import digests
from rcm_jax.train.state import TrainState
from rcm_jax.util.files import absolute, as_path, stored

CHUNK_BYTES = 2**28  # of converted arrays on disk: a host that needs a part of one reads little more than that
GROUP_BYTES = 2**28  # on a device, of arrays that are read and compared at a time
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"  # folders of a workdir
DATA, COUNT, RECORD = "data", "count", "record"  # items that are JSON
JSON_FILE = "metadata"  # in the folder of such an item
LEARNERS = ("student", "fake_score", "weighting")


class Damaged(Exception):
    """A checkpoint is not whole: which array or file, and why, in one line."""


def open_manager(
    workdir, kind: str = CHECKPOINTS, writes: bool = False, asynchronous: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints, or snapshots, of a workdir.

    asynchronous: `save` returns when the arrays have been copied to the host's memory, and the manager, closed, waits
    until they are written. A checkpoint is there when all of it is written.
    """
    tidy = writes and stored(as_path(workdir))  # whoever only reads must not take another's unfinished save
    options = _options(workdir, enable_async_checkpointing=asynchronous, cleanup_tmp_directories=tidy)
    return ocp.CheckpointManager(absolute(workdir) / kind, options=options)


def _options(workdir, **options) -> ocp.CheckpointManagerOptions:
    """In a store nothing can be renamed at once: there a checkpoint is whole when its last file, a mark, is there."""
    if not stored(as_path(workdir)):
        return ocp.CheckpointManagerOptions(**options)
    _teach_s3()
    mark = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
    return ocp.CheckpointManagerOptions(**options, atomicity_options=mark)


@functools.cache
def _teach_s3() -> None:
    """Orbax (0.12) has TensorStore write arrays to gs:// and to files; from here on to s3:// in the same way.

    TensorStore does not look for AWS_ENDPOINT_URL, by which s3fs finds a store that is not Amazon's.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils  # there is no public way

    build = tensorstore_utils.build_kvstore_tspec
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    s3: dict = {"driver": "s3"} | ({"endpoint": endpoint, "aws_region": region} if endpoint else {})
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # it would first complain, again and again, that there is no ~/.aws
        s3["aws_credentials"] = {"type": "environment"}

    def moved(spec):
        if not isinstance(spec, dict):
            return spec
        return spec | s3 if spec.get("driver") == "gcs" else {name: moved(part) for name, part in spec.items()}

    def build_for_s3(directory, *args, **options):
        scheme, found, rest = str(directory).partition("s3://")
        if scheme or not found:
            return build(directory, *args, **options)
        return moved(build(f"gs://{rest}", *args, **options))

    tensorstore_utils.build_kvstore_tspec = build_for_s3


def save(manager: ocp.CheckpointManager, step: int, trees: dict, values: dict, healthy: bool = True) -> None:
    """Saves trees of arrays and JSON values as items of a step, with the record of them."""
    sums = {name: digests.of_tree(tree) for name, tree in trees.items()}
    record = {"healthy": healthy, "digests": sums | {name: _digest(value) for name, value in values.items()}}
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    jsons = {name: ocp.args.JsonSave(value) for name, value in (values | {RECORD: record}).items()}
    manager.save(step, args=ocp.args.Composite(**items, **jsons), force=True)


def save_snapshot(workdir, state: TrainState, averages: dict) -> None:
    """Save averages, {width: parameters}, of the student of a state, if there is no snapshot of its step yet."""
    step, updates = int(state.step), int(state.student.updates)
    with open_manager(workdir, SNAPSHOTS, writes=True) as manager:
        if step not in manager.all_steps():
            trees = {str(width): params for width, params in averages.items()}
            save(manager, step, trees, {COUNT: {"updates": updates}})


def snapshots_of(workdir) -> list[tuple[int, int, float]]:
    """(step, updates, width) of every average in the snapshots of a workdir; ValueError if there is none."""
    found, (steps, _) = [], steps_of(workdir, None, SNAPSHOTS)
    for step in steps:
        folder = absolute(workdir) / SNAPSHOTS / str(step)
        with _refused(workdir, step, steps, SNAPSHOTS):
            updates = read_json(folder, COUNT, read_record(folder))["updates"]
        names = (path.name for path in folder.iterdir())
        found += [(step, updates, float(name)) for name in sorted(names) if name.startswith("0.")]
    return found


# --- reading, and comparing what was read with its digest

# What an error may say that is no damage: to try again later, elsewhere or as somebody else.
ELSEWHERE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


def read_record(folder, together: bool = False) -> dict | None:
    """{"healthy", "digests"} of a checkpoint; None if it was saved before there were records. Damaged otherwise."""

    def read():
        if not (folder / RECORD).exists():
            saved = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
            if RECORD not in saved:
                return None
        record = json.loads((folder / RECORD / JSON_FILE).read_text())
        if not (isinstance(record.get("healthy"), bool) and isinstance(record.get("digests"), dict)):
            raise ValueError("it is no record")
        return record

    record = _agreed(read, RECORD, together)
    if record is None:
        _tell_of_old(str(folder))
    return record


@functools.cache
def _tell_of_old(folder: str) -> None:
    logging.warning(
        "%s was saved before checkpoints had digests: it is read, but whether it is whole is not known", folder
    )


def read_json(folder, name: str, record: dict | None, together: bool = False):
    """A JSON item of a checkpoint; Damaged unless it is what the record, if there is one, tells of."""

    def read():
        value = json.loads((folder / name / JSON_FILE).read_text())
        if record is not None and _digest(value) != record["digests"].get(name):
            raise ValueError("it is not what was saved")
        return value

    return _agreed(read, name, together)


def read_item(folder, name: str, abstract, record: dict | None, keep: bool = True, partial: bool = True) -> Any:
    """The arrays of an item of a checkpoint, or of a part of it, placed and in dtypes as `abstract` says.

    They are read in groups of GROUP_BYTES a device, in the dtypes that were saved, and compared with the record.
    keep=False: each group is forgotten then, and None is returned. Damaged if they are not what was saved; ValueError
    if what was saved is not what `abstract` asks for, or, with partial=False, more. If its arrays lie over several
    processes, all must call it.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {digests.name_of(path): leaf for path, leaf in flat}
    together = over_processes(abstract)
    if record is not None and name not in record["digests"]:
        raise ValueError(f"{folder} has no {name}")
    there = _stored(folder, name, record, together)
    _check_fits(f"{name} in {folder}", there, wanted, partial)
    as_saved = {n: jax.ShapeDtypeStruct(x.shape, there[n][0].dtype, sharding=x.sharding) for n, x in wanted.items()}
    kept, tree = {}, abstract
    if wanted.keys() != there.keys():  # a part of it: the structure of the whole is in the files
        tree = _agreed(lambda: ocp.PyTreeCheckpointHandler().metadata(folder / name).tree, name, together)
    for group in _groups(as_saved):
        target = {n: as_saved[n] if n in group else ocp.PLACEHOLDER for n in there}
        named = jax.tree_util.tree_map_with_path(lambda path, _, t=target: t[digests.name_of(path)], tree)
        arrays = _read_group(folder / name, named, {n: there[n][1] for n in group}, together)
        if keep:
            kept |= {n: _in_dtype(array, wanted[n].dtype) for n, array in arrays.items()}
    return treedef.unflatten([kept[n] for n in wanted]) if keep else None


def _check_fits(place: str, there: dict, wanted: dict, partial: bool) -> None:
    """ValueError that names the first array of another shape, or that only one side has: that is no damage."""
    for name in list(wanted) + ([] if partial else sorted(there.keys() - wanted.keys())):
        sides = there.get(name, (None,))[0], wanted.get(name)
        saved, here = ("none" if side is None else list(side.shape) for side in sides)
        if saved != here:
            raise ValueError(f"{place} is of another network or optimizer: {name} has shape {saved} there, {here} here")


def _in_dtype(array, dtype):
    return array if array.dtype == dtype else jax.device_put(array.astype(dtype), array.sharding)


def over_processes(abstract) -> bool:
    """Whether some array of a tree has parts in other processes: then all of them must read it, and agree."""
    shardings = (leaf.sharding for leaf in jax.tree.leaves(abstract))
    return any(sharding is not None and not sharding.is_fully_addressable for sharding in shardings)


def _stored(folder, name: str, record: dict | None, together: bool) -> dict[str, tuple[Any, str | None]]:
    """{name of a leaf: (shape and dtype, digest)} of an item; None: there is no digest."""

    def read():
        if record is None:
            tree = ocp.PyTreeCheckpointHandler().metadata(folder / name).tree
            flat = jax.tree_util.tree_flatten_with_path(tree)[0]
            return {digests.name_of(path): (jax.ShapeDtypeStruct(x.shape, x.dtype), None) for path, x in flat}
        there = {leaf: (digests.parsed(digest), digest) for leaf, digest in record["digests"][name].items()}
        # Without x64 JAX halves what has 64 bits: there is nothing to compare.
        narrow = {leaf for leaf, (x, _) in there.items() if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype}
        return {leaf: (x, None if leaf in narrow else digest) for leaf, (x, digest) in there.items()}

    return _agreed(read, name, together)


def _groups(leaves: dict) -> list[list[str]]:
    """Names of leaves, in order, by groups that take at most GROUP_BYTES on a device, or one leaf."""
    groups, room = [], 0
    for name, leaf in leaves.items():
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(shape) * leaf.dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _read_group(folder, target, expected: dict[str, str | None], together: bool) -> dict:
    """{name: array} of the leaves of a target that are no placeholders; Damaged, if they are so twice."""

    def read():
        restore_args = jax.tree.map(_restore_args, target)
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args)
        found = ocp.PyTreeCheckpointHandler().restore(folder, args=args)  # pyright: ignore[reportArgumentType]
        named = {digests.name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]}
        return jax.block_until_ready({name: named[name] for name in expected})

    for last in (False, True):  # what a second look mends was not damaged
        try:
            arrays = _agreed(read, folder.name, together)
            for name, digest in digests.of_tree(arrays).items():
                if expected[name] not in (None, digest):
                    raise Damaged(f"{folder.name}.{name} has digest {digest}, saved was {expected[name]}")
            return arrays
        except Damaged:
            if last:
                raise
    raise AssertionError


def _restore_args(leaf):
    return ocp.RestoreArgs() if leaf is ocp.PLACEHOLDER else ocp.checkpoint_utils.construct_restore_args(leaf)


def _agreed(read: Callable, what: str, together: bool) -> Any:
    """What read() returns; its error is Damaged: with together=True, where all processes call it, in all of them."""
    value, word = None, ""
    with _unfinished_dropped():
        try:
            value = read()
        except (MemoryError, PermissionError, ConnectionError, TimeoutError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of tensorstore, zarr, orbax, JSON: whatever half a file brings about
            word = f"{what} cannot be read: {_line(error)}"
        if word:
            gc.collect()
    if any(elsewhere in word for elsewhere in ELSEWHERE):
        raise OSError(word)
    if word := distributed.told_by_any(word) if together else word:
        raise Damaged(word)
    return value


@contextlib.contextmanager
def _unfinished_dropped():
    """What orbax still reads when something fails would complain as it is collected, each array in fifty lines."""
    hook, sys.unraisablehook, asyncio.log.logger.disabled = sys.unraisablehook, lambda _: None, True
    try:
        yield
    finally:
        sys.unraisablehook, asyncio.log.logger.disabled = hook, False


def _line(error: Exception) -> str:
    """An error in a line of a length that can be read."""
    while error.__cause__ is not None:  # orbax says where, this says what
        error = error.__cause__  # pyright: ignore[reportAssignmentType]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]} …"


@contextlib.contextmanager
def _refused(workdir, step: int, steps, kind: str = CHECKPOINTS):
    """Who only reads moves nothing and takes no other checkpoint: damage is a ValueError with the way out."""
    try:
        yield
    except Damaged as damage:
        others = ", ".join(str(other) for other in steps if other != step) or "none"
        flag = " (--checkpoint_step)" if kind == CHECKPOINTS and others != "none" else ""
        raise ValueError(
            f"the {kind.removesuffix('s')} of step {step} in {workdir} is damaged: {damage}; "
            f"others there: {others}{flag}"
        ) from None


def _digest(value) -> str:
    """Of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_empty(workdir) -> bool:
    """Whether a workdir has no checkpoint yet."""
    if not (absolute(workdir) / CHECKPOINTS).is_dir():
        return True
    with open_manager(workdir) as manager:
        return manager.latest_step() is None


def restore_item(workdir, name: str, abstract, step: int | None = None):
    """One field of the newest (or the given) checkpoint of a workdir, e.g. "ema"; ValueError if there is none, or it
    is damaged."""
    return _restore(workdir, name, abstract, step, CHECKPOINTS)[0]


def _restore(workdir, name: str, abstract, step: int | None, kind: str):
    steps, step = steps_of(workdir, step, kind)
    folder = absolute(workdir) / kind / str(step)
    with _refused(workdir, step, steps, kind):
        return read_item(folder, name, abstract, read_record(folder, over_processes(abstract))), step


def write_params(folder, params, step: int = 0) -> None:
    """One checkpoint with "ema" in a folder that has none: parameters [numpy arrays] that no training saved."""
    # Orbax would copy all arrays first, and with OCDBT hold all that is written until the end: 16 GB for 6.
    numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, numpy_handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    options = _options(folder, enable_async_checkpointing=False)
    place = absolute(folder) / CHECKPOINTS
    ema = ocp.args.PyTreeSave(params, save_args=save_args)
    record = ocp.args.JsonSave({"healthy": True, "digests": {"ema": digests.of_tree(params)}})
    handlers = {"ema": handler, RECORD: ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(place, options=options, item_handlers=handlers) as manager:
        manager.save(step, args=ocp.args.Composite(**{"ema": ema, RECORD: record}))


def params_of(workdir, name: str, step: int | None = None, kind: str = CHECKPOINTS):
    """(shapes and dtypes of the parameters, step) of "ema", "student" or "fake_score", or of a snapshot's width.

    ValueError if there is none, or its metadata cannot be read.
    """
    steps, step = steps_of(workdir, step, kind)
    with _refused(workdir, step, steps, kind):
        folder = absolute(workdir) / kind / str(step)
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if name not in there:
            networks = ", ".join(item for item in there if item not in (DATA, COUNT, RECORD))
            raise ValueError(f"the checkpoint of step {step} in {workdir} has no {name}; it has {networks}")
        tree = _agreed(lambda: ocp.PyTreeCheckpointHandler().metadata(folder / name).tree, name, together=False)
    tree = tree["params"] if name in LEARNERS else tree
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu), tree), step


def restore_params(workdir, name: str, step: int | None = None, abstract=None, kind: str = CHECKPOINTS):
    """(what `params_of` tells of, step), placed and in dtypes as `abstract` says, or in the memory of the CPU."""
    there, step = params_of(workdir, name, step, kind)
    abstract = there if abstract is None else abstract
    restored, step = _restore(workdir, name, {"params": abstract} if name in LEARNERS else abstract, step, kind)
    return (restored["params"] if name in LEARNERS else restored), step


def steps_of(workdir, step: int | None, kind: str = CHECKPOINTS) -> tuple[list[int], int]:
    """(steps, step) of the checkpoints or snapshots of a workdir, the newest if None; ValueError if there is none."""
    one = kind.removesuffix("s")
    if not (absolute(workdir) / kind).is_dir():
        way_out = "; train.snapshot_every makes them" if kind == SNAPSHOTS else ""
        raise ValueError(f"no {one} in {workdir}: it has no folder {kind}{way_out}")
    with open_manager(workdir, kind) as manager:
        steps = sorted(manager.all_steps())
    if not steps or (step is not None and step not in steps):
        wanted = "any step" if step is None else f"step {step}"
        raise ValueError(f"no {one} of {wanted} in {workdir}; steps there: {steps or 'none'}")
    return steps, steps[-1] if step is None else step


def abstract_like(tree, sharding):
    """ShapeDtypeStructs of a tree with the shardings of a tree of the same structure (or one for all)."""
    shardings = sharding if not isinstance(sharding, jax.sharding.Sharding) else jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

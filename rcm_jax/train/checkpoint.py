"""Orbax checkpoints with exact resume.

A workdir holds checkpoints/STEP/: one item per field of the train state, so that the averaged student alone can be read
as a teacher or for sampling, and "data", the position of the input pipeline.
"""

import contextlib
import functools
import os

import jax
import numpy as np
import orbax.checkpoint as ocp

from rcm_jax.train.state import TrainState
from rcm_jax.util.files import absolute, as_path, stored

CHUNK_BYTES = 2**28  # of converted arrays on disk: a host that needs a part of one reads little more than that


def open_manager(workdir, keep: int | None = None, asynchronous: bool = False) -> ocp.CheckpointManager:
    """The checkpoints of a workdir; `keep` is how many stay when new ones are saved (None: all).

    asynchronous: `save` returns when the arrays have been copied to the host's memory, and the manager, closed, waits
    until they are written. A checkpoint is there when it is whole.
    """
    tidy = keep is not None and stored(as_path(workdir))  # whoever only reads must not take another's unfinished save
    options = _options(workdir, max_to_keep=keep, enable_async_checkpointing=asynchronous, cleanup_tmp_directories=tidy)
    return ocp.CheckpointManager(_checkpoints(workdir), options=options)


def _checkpoints(workdir):
    return absolute(workdir) / "checkpoints"


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


def is_empty(workdir) -> bool:
    """Whether a workdir has no checkpoint yet."""
    if not _checkpoints(workdir).is_dir():
        return True
    with open_manager(workdir) as manager:
        return manager.latest_step() is None


def restore_item(workdir, name: str, abstract, step: int | None = None):
    """One field of the newest (or the given) checkpoint of a workdir, e.g. "ema"; ValueError if there is none."""
    with _manager_of(workdir, step) as (manager, step):
        return manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)}))[name]


def write_params(folder, params) -> None:
    """One checkpoint, of step 0, with "ema", in a folder that has none: parameters [numpy arrays] not trained here."""
    # Orbax would copy all arrays first, and with OCDBT hold all that is written until the end: 16 GB for 6.
    numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, numpy_handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    options = _options(folder, enable_async_checkpointing=False)
    with ocp.CheckpointManager(_checkpoints(folder), options=options, item_handlers={"ema": handler}) as manager:
        manager.save(0, args=ocp.args.Composite(ema=ocp.args.PyTreeSave(params, save_args=save_args)))


def params_of(workdir, name: str, step: int | None = None):
    """(shapes and dtypes of the parameters, step) of "ema", "student" or "fake_score"; ValueError if there is none."""
    with _manager_of(workdir, step) as (manager, step):
        folder = manager.directory / str(step)
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if name not in there:
        raise ValueError(f"the checkpoint of step {step} in {workdir} has no {name}; it has {', '.join(there)}")
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / name).tree
    tree = tree if name == "ema" else tree["params"]  # of a learner
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu), tree), step


def restore_params(workdir, name: str, step: int | None = None, abstract=None):
    """(what `params_of` tells of, step), placed and in dtypes as `abstract` says, or in the memory of the CPU."""
    there, step = params_of(workdir, name, step)
    abstract = there if abstract is None else abstract
    abstract = abstract if name == "ema" else {"params": abstract}
    folder = _checkpoints(workdir) / str(step)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    partial = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    restored = ocp.PyTreeCheckpointHandler().restore(folder / name, args=partial)  # pyright: ignore[reportArgumentType]
    return (restored if name == "ema" else restored["params"]), step


@contextlib.contextmanager
def _manager_of(workdir, step: int | None):
    """(manager, step) of the checkpoints of a workdir, the newest step if None; ValueError if there is none."""
    if not _checkpoints(workdir).is_dir():
        raise ValueError(f"no checkpoint in {workdir}: it has no folder checkpoints")
    with open_manager(workdir) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            wanted = "any step" if step is None else f"step {step}"
            raise ValueError(f"no checkpoint of {wanted} in {workdir}; steps there: {steps or 'none'}")
        yield manager, steps[-1] if step is None else step


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

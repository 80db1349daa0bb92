"""Parameters of workdirs: in the memory of devices, or array by array; adapters beside their base, or merged."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rcm_jax import convert
from rcm_jax.convert import adapters as adapter_files
from rcm_jax.convert import merge
from rcm_jax.convert.files import open_tensors
from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.models import NETWORKS, adapters
from rcm_jax.models.adapters import A, Adapted, B, flat
from rcm_jax.parallel.sharding import replicated
from rcm_jax.run import workdir
from rcm_jax.run.experiment import RANDOM, Predictor
from rcm_jax.run.program import Network
from rcm_jax.train import checkpoint, trainer
from rcm_jax.util.config import kind_of
from rcm_jax.util.files import as_path


def restore(network: Network, folder, step: int | None, mesh, adapter: str | None = None):
    """The averaged parameters of a workdir in the dtype they are stored in, over the devices of a mesh.

    Those of a student that is an adapter: an Adapted, with its base in the dtype that it was trained beside. adapter: a
    file of one, to be beside what the workdir holds.
    """
    there = workdir.read(folder)
    config = workdir.adapter_of(there)
    boxed = network.boxed if config is None else jax.eval_shape(network.adapter(config), jax.random.key(0))
    abstract = trainer.abstract_params(boxed, mesh)
    stored, step = checkpoint.params_of(folder, "ema", step)
    abstract = jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, y.dtype, sharding=x.sharding), abstract, stored)
    params = checkpoint.restore_item(folder, "ema", abstract, step)
    if config is not None:
        whole = trainer.abstract_params(network.boxed, mesh)
        params = Adapted(read_base(network, folder, there, whole), params, config.scale)
    if adapter is None:
        return params
    tree, scale = read_adapter(adapter, there.model)
    return Adapted(params, jax.device_put(tree, replicated(mesh)), scale)


def check_adapter(folder, there: Predictor, adapter) -> None:
    """ValueError unless the file of an adapter, whose headers are read, can be beside what a workdir holds."""
    if workdir.adapter_of(there):
        raise ValueError(f"{folder} holds an adapter already: export it merged before another, {adapter}, is beside it")
    read_adapter(adapter, there.model)


def read_adapter(path, model) -> adapter_files.Adapter:
    """Of a file, for a network; numpy arrays in float32. ValueError where it does not fit."""
    kind = kind_of(NETWORKS, model)
    if kind not in convert.GENERATORS:
        raise ValueError(f"{path}: files of adapters are for {', '.join(convert.GENERATORS)}, and this is a {kind}")
    tree, scale = adapter_files.read(path, kind, model)
    return adapter_files.Adapter(jax.tree.map(lambda x: np.asarray(x, np.float32), tree), scale)


def read_base(network: Network, folder, run: Any, abstract):
    """The parameters beside which the adapter in the workdir of an Experiment was trained, in its teacher_dtype.

    abstract: of the network, shapes and shardings.
    """
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, run.teacher_dtype, sharding=x.sharding), abstract)
    if run.teacher == RANDOM:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        params = jax.jit(network.make_params, out_shardings=shardings)(jax.random.key(run.seed))
        return jax.tree.map(lambda x: x.astype(run.teacher_dtype), params)
    return checkpoint.restore_item(base_folder(folder, run), "ema", narrow)


def base_folder(folder, run: Any) -> Any:
    """The workdir of the teacher beside which an adapter was trained; ValueError if it is not there any more."""
    base = as_path(run.teacher) if run.teacher else as_path(folder) / "teacher"
    if run.teacher == RANDOM or not (base / "config.json").exists():
        what = "random parameters" if run.teacher == RANDOM else f"the weights in {base}, which are not there"
        raise ValueError(
            f"{folder} holds an adapter, beside {what}: put them back, name where they are by teacher in its "
            "config.json, or export the adapter alone"
        )
    return base


def leaves_of(
    folder, item: str = "ema", step: int | None = None, adapter: str | None = None
) -> tuple[dict[str, LazyTensor], int]:
    """({path: array}, step) of a network in a workdir; each is read when np.asarray asks for it.

    A student that is an adapter is merged into its base, in float32; so is what a workdir holds with the file of an
    adapter.
    """
    run, (leaves, step) = workdir.read(folder), own_leaves_of(folder, item, step)
    config = workdir.adapter_of(run)
    if adapter is not None:
        check_adapter(folder, run, adapter)
        tree, scale = read_adapter(adapter, run.model)
        return merged(leaves, flat(tree), scale), step
    if config is None:
        return leaves, step
    beside, dtype = base_folder(folder, run), jnp.dtype(getattr(run, "teacher_dtype", np.float32))
    return merged(own_leaves_of(beside)[0], leaves, config.scale, dtype), step


def merged(base: Mapping, adapter: Mapping, scale: float, dtype=None) -> dict[str, LazyTensor]:
    """{path: array} of a base, whose numbers are first rounded to dtype, with an adapter merged into it, in float32."""

    def read(path: str):
        module, array = path.removesuffix("/kernel"), np.asarray(base[path])
        array = array if dtype is None else array.astype(dtype)
        if not path.endswith("/kernel") or f"{module}/{A}" not in adapter:
            return array.astype(np.float32)
        down, up = (np.asarray(adapter[f"{module}/{name}"]) for name in (A, B))
        return adapters.merged(array, down, up, scale)

    wide = np.dtype(np.float32)
    return {path: LazyTensor(leaf.shape, wide, functools.partial(read, path)) for path, leaf in base.items()}


def own_leaves_of(folder, item: str = "ema", step: int | None = None) -> tuple[dict[str, LazyTensor], int]:
    """As `leaves_of`, of what a workdir itself holds: of an adapter, A and B."""
    abstract, step = checkpoint.params_of(folder, item, step)
    return _leaves(folder, item, step, abstract), step


def _leaves(folder, item: str, step: int, abstract) -> dict[str, LazyTensor]:
    @functools.lru_cache(1)
    def read(path: str) -> np.ndarray:
        part, _ = checkpoint.restore_params(folder, item, step, unflatten_dict({path: paths[path]}, sep="/"))
        (leaf,) = jax.tree.leaves(part)
        return np.asarray(leaf)

    paths = flat(abstract)
    return {path: LazyTensor(x.shape, np.dtype(x.dtype), functools.partial(read, path)) for path, x in paths.items()}


def open_weights(path: str, kind: str, config, layout: str | None = None, skipped=lambda name: False):
    """(tensors, layout) of a checkpoint, a workdir (its averaged student) or published files, in a layout.

    None takes its own layout, and all of it must fit, also what is skipped. ValueError that names it if it does not.
    """
    way_out = ""
    try:
        if (as_path(path) / checkpoint.CHECKPOINTS).is_dir():
            tensors = of_workdir(path, kind, layout or next(iter(convert.entries(kind, config))))
        else:
            tensors = convert.parameters(kind, open_tensors(path))
        if layout is None:
            layout = convert.recognise(kind, tensors, config)
            return merge.under_names_of(layout, kind, tensors, config), layout
        way_out = "; --skip=NAME leaves a tensor as it is in base"
        return merge.under_names_of(layout, kind, tensors, config, skipped), layout
    except ValueError as error:
        raise ValueError(f"{path}: {error}{way_out}") from None


def of_workdir(path: str, kind: str, layout: str) -> dict[str, LazyTensor]:
    """The averaged student of a workdir, or converted weights, in a layout: one of our arrays (which may hold a tensor
    of every layer) is in memory at a time."""
    run = workdir.read(path)
    if (own := kind_of(NETWORKS, run.model)) != kind:
        raise ValueError(f"it holds a {own}, not a {kind}")
    leaves, _ = leaves_of(path)
    read_leaf = functools.lru_cache(1)(lambda ours: np.asarray(leaves[ours]))

    def read(entry):
        ours = read_leaf(entry.rule.ours)
        return entry.rule.form.to_theirs(ours if entry.layer is None else ours[entry.layer], entry.shape)

    return {
        name: LazyTensor(entry.shape, leaves[entry.rule.ours].dtype, functools.partial(read, entry))
        for name, entry in convert.entries(kind, run.model)[layout].items()
    }

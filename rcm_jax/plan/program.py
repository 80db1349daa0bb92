"""The programs of a run, compiled for devices that need not be here: abstract values only, nothing is allocated."""

import contextlib
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core

from rcm_jax.data import DATASETS, LatentsConfig
from rcm_jax.data.dataset import Dataset
from rcm_jax.kernels import triton
from rcm_jax.kernels.attention import KERNELS
from rcm_jax.method import denoiser
from rcm_jax.method.denoiser import Velocities
from rcm_jax.parallel.sharding import HOST, batch_sharding, has_host_memory, make_mesh, replicated
from rcm_jax.plan.chips import Chip
from rcm_jax.run import experiment
from rcm_jax.train import checkpoint, trainer
from rcm_jax.train.state import Teacher
from rcm_jax.train.steps import rcm_method

CLIP_TOKENS = 257  # of the image features of Wan2.1's image to video
COSMOS_TEXT = 512  # tokens, to which T5's are padded
# Without a GPU nothing measures which of XLA's own products is fastest, and its default tiles fail at some shapes: the
# library's are taken.
OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
CAPABILITY = 90  # of the GPUs in the table of chips


class Programs(NamedTuple):
    """lower[name]() lowers a program of the run; `note` says which attention it has, and why."""

    run: experiment.Experiment
    shape: tuple[int, ...]  # of one sample
    mesh: jax.sharding.Mesh
    held: int  # bytes of a chip that the state and the teacher take, whatever runs
    lower: dict[str, Callable[[], jax.stages.Lowered]]
    attention: str
    note: str


class Compiled(NamedTuple):
    """A compiled program; or, of one that the compiler refused, why."""

    executable: jax.stages.Compiled | None
    seconds: float
    refusal: str = ""


def prepare(values: Mapping, chip: Chip, devices) -> Programs:
    """The student and critic steps and the sampler of a nested config mapping, on devices that may be described only.

    Needs neither data nor a teacher. ValueError where the run itself would refuse the config, the mesh or the batch.
    """
    run, about_memory = _experiment(values), ""
    try:
        mesh = make_mesh(run.mesh, devices)
    except NotImplementedError as error:  # jax lays meshes along the axes of a torus
        raise ValueError(f"{run.mesh} does not fit the chips as they are wired: {error}") from error
    if run.train.offload and not has_host_memory(mesh):
        about_memory = "\ntrain.offload is counted as off: what describes these chips knows no memory of their hosts"
        values = {**values, "train": {**values["train"], "offload": False}}
        run = _experiment(values)
    run.train.check(mesh)
    dataset = _dataset(run)
    with _target(chip):
        attention, note = _attention(values, run, chip, mesh, dataset)
        run = _experiment(_with(values, attention))
        calls, held = _calls(run, mesh, dataset)

    def lower(function, *args):
        with jax.set_mesh(mesh), _target(chip):
            return function.lower(*args)

    lowers = {name: functools.partial(lower, *call) for name, call in calls.items()}
    return Programs(run, dataset.sample_shape, mesh, held, lowers, attention, note + about_memory)


def compile_program(lower: Callable[[], jax.stages.Lowered], chip: Chip) -> Compiled:
    """What the compiler makes of it. A program that is too large for a TPU is refused, with the numbers."""
    started = time.time()
    try:
        return Compiled(lower().compile(compiler_options=OPTIONS.get(chip.platform)), time.time() - started)
    except jax.errors.JaxRuntimeError as error:
        first = str(error).partition("RESOURCE_EXHAUSTED: ")
        words = f"does not fit: {first[2]}" if first[1] else f"fails to compile: {first[0]}"
        return Compiled(None, time.time() - started, words.splitlines()[0])


def _experiment(values: Mapping) -> experiment.Experiment:
    """With stand-ins for a teacher and for data that are not there yet."""
    if "rcm" not in values:
        raise ValueError("this config trains no student: a plan is for a distillation")
    values = dict(values)
    if values["pretrain"] is None and not values["teacher"]:
        needs = experiment.build(experiment.RcmConfig, values["rcm"], "config.rcm", experiment.KINDS).needs_teacher
        values["teacher"] = "TEACHER" if needs else ""
    if "path" in values["data"]:
        values["data"] = {**values["data"], "path": values["data"]["path"] or "LATENTS"}
    return experiment.from_mapping(values)


def _with(values: Mapping, attention: str) -> Mapping:
    """With that attention, where the network has any."""
    model = values["model"]
    return {**values, "model": {**model, "attention": attention}} if "attention" in model else values


def _dataset(run: experiment.Experiment) -> Dataset:
    """Latents: one example of zeros in the shapes that the config says. Data that come with the code: themselves."""
    if not isinstance(run.data, LatentsConfig):
        return DATASETS[type(run.data)](run.data)
    model = run.model
    tokens, width = getattr(model, "text_len", COSMOS_TEXT), getattr(model, "text_dim", None)
    cond = {"text": np.zeros((tokens, width or model.crossattn_emb_channels), np.float32)}
    uncond = dict(cond)
    if getattr(model, "model_type", "") == "i2v":
        cond["y"] = np.zeros((*run.data.shape[:-1], model.in_dim - model.out_dim), np.float32)
        if model.clip_dim:
            cond["clip_features"] = np.zeros((CLIP_TOKENS, model.clip_dim), np.float32)
    example = {"x0": np.zeros(run.data.shape, np.float32), "cond": cond}
    return Dataset(jax.tree.map(lambda x: x[None], example), None, uncond, num_classes=None, to_image=None)


def _abstract(tree, sharding, *leading):
    """Shapes and dtypes of arrays with further leading axes, and their sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding), tree)


def _calls(run: experiment.Experiment, mesh, dataset) -> tuple[dict, int]:
    """({name: (jitted function, *abstract arguments)}, bytes that state and teacher hold on a chip).

    As rcm_jax.run.pipeline.distil and rcm_jax.train.trainer.fit make and call them.
    """
    network = experiment.make_network(run, dataset)
    boxed = jax.eval_shape(network.init, jax.random.key(0))
    teacher_F = dataset.velocity if run.exact_teacher else network.F
    velocities = Velocities(network.F, denoiser.guided(teacher_F, run.rcm.guidance), network.F)
    method = rcm_method(run.rcm, velocities, run.train.accumulate)
    state_boxed = jax.eval_shape(method.init, boxed)
    shardings = trainer.shardings_of(state_boxed, mesh, run.train.offload)
    state = checkpoint.abstract_like(nn.meta.unbox(state_boxed), shardings)
    params = trainer.abstract_params(boxed, mesh)
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, run.teacher_dtype, sharding=x.sharding), params)
    teacher = Teacher(narrow if run.has_start else None, _abstract(dataset.uncond, replicated(mesh)))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), dataset.first)
    batch = _abstract(one, batch_sharding(mesh), run.train.batch_size)
    steps = trainer.compile_steps(method, shardings, jax.random.key(0))
    calls = {name: (steps[name], state, teacher, batch) for name in ("student", "critic") if name in steps}
    sampler = experiment.student_sampler(network.F, run.sampling, len(run.sampling.mid_times))
    ids = jax.ShapeDtypeStruct((run.train.batch_size,), np.uint32, sharding=batch_sharding(mesh))
    key = _abstract(jax.eval_shape(jax.random.key, 0), replicated(mesh))
    calls["sampler"] = (sampler, params, key, ids, batch["cond"], one["x0"].shape)
    leaves = [x for x in jax.tree.leaves((state, teacher)) if x.sharding.memory_kind != HOST]
    return calls, sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


@contextlib.contextmanager
def _target(chip: Chip):
    """Triton kernels are compiled for the GPU of the plan, not for that of this machine."""
    if chip.platform != "gpu":
        yield
        return
    with triton.compiling_for(CAPABILITY):
        yield


def _attention(values, run, chip: Chip, mesh, dataset) -> tuple[str, str]:
    """(implementation, a line on the choice). The kernels of the platform, unless config.model.attention names one."""
    asked = getattr(run.model, "attention", "auto")
    name = KERNELS.get(chip.platform, "blockwise") if asked == "auto" else asked
    reason = _obstacle(values, name, chip, mesh, dataset)
    if not reason:
        return name, f'attention "{name}"' + (", as the config says" if asked != "auto" else "")
    if asked != "auto":
        raise ValueError(f'config.model.attention "{asked}" cannot be compiled here: {reason}')
    return "blockwise", f'attention "blockwise", NOT the kernels "{name}": {reason}'


def _obstacle(values, name: str, chip: Chip, mesh, dataset) -> str:
    """Why a program with these attention kernels cannot be compiled for the mesh; "" if it can."""
    if name not in KERNELS.values():
        return ""
    if name == "triton" and importlib.util.find_spec("jax_triton") is None:
        return f"jax-triton is not installed ({triton.INSTALL})"
    run = _experiment(_with(values, name))
    network = experiment.make_network(run, dataset)
    one = dataset.first
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((run.train.batch_size, *x.shape[1:]), x.dtype), one)
    params = jax.eval_shape(experiment.make_params(network), jax.random.key(0))
    times = jax.ShapeDtypeStruct((run.train.batch_size,), np.float32)
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(network.F)(params, batch["x0"], times, batch["cond"])
    if mesh.size > 1 and _outside_shard_map(traced.jaxpr):
        return f"they stand outside of shard_map, and XLA cannot split a kernel over {mesh.size} chips by itself"
    return ""


def _outside_shard_map(jaxpr: core.Jaxpr) -> bool:
    """Whether a kernel stands where XLA partitions the program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("pallas_call", "triton_kernel_call", "triton_call"):
            return True
        if eqn.primitive.name != "shard_map":
            inner = [v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in jax.tree.leaves([*eqn.params.values()])]
            if any(_outside_shard_map(v) for v in inner if isinstance(v, core.Jaxpr)):
                return True
    return False

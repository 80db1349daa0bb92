"""The programs of a run, compiled for devices that need not be here: abstract values only, nothing is allocated."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from rcm_jax.data import LatentsConfig
from rcm_jax.data.dataset import Dataset
from rcm_jax.kernels import pallas_tpu, triton  # pyright: ignore[reportAttributeAccessIssue]
from rcm_jax.kernels.implementations import KERNELS  # pyright: ignore[reportMissingImports]
from rcm_jax.parallel.chips import Chip
from rcm_jax.parallel.sharding import HOST, has_host_memory, make_mesh
from rcm_jax.run.experiment import Experiment
from rcm_jax.run.program import Program, assemble, load_data, make_network, zeros
from rcm_jax.util.config import revise
from rcm_jax.util.extras import installed

# Without a GPU nothing measures which of XLA's own products is fastest, and its default tiles fail at some shapes: the
# library's are taken.
OPTIONS: dict[str, Any] = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
CAPABILITY = 90  # of the GPUs in the table of chips


class Programs(NamedTuple):
    """lower[name]() lowers a program of the run; `note` says which attention it has, and why."""

    run: Experiment
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


def prepare(run: Experiment, chip: Chip, devices) -> Programs:
    """The student and critic steps and the sampler of an experiment, on devices that may be described only.

    Needs neither data nor a teacher. ValueError where the run itself would refuse the config, the mesh or the batch.
    """
    about_memory = ""
    try:
        mesh = make_mesh(run.mesh, devices)
    except NotImplementedError as error:  # jax lays meshes along the axes of a torus
        raise ValueError(f"{run.mesh} does not fit the chips as they are wired: {error}") from error
    if run.train.offload and not has_host_memory(mesh):
        about_memory = "\ntrain.offload is counted as off: what describes these chips knows no memory of their hosts"
        run = revise(run, {"train.offload": False})
    dataset = _dataset(run)
    with _target(chip, mesh):
        attention, note = _attention(run, chip, mesh, dataset)
        program = assemble(_with(run, attention), mesh, dataset)
        calls, held = _calls(program)

    def lower(function, *args):
        with jax.set_mesh(mesh), _target(chip, mesh):
            return function.lower(*args)

    lowers = {name: functools.partial(lower, *call) for name, call in calls.items()}
    return Programs(program.run, dataset.sample_shape, mesh, held, lowers, attention, note + about_memory)


def compile_program(lower: Callable[[], jax.stages.Lowered], chip: Chip) -> Compiled:
    """What the compiler makes of it. A program that is too large for a TPU is refused, with the numbers."""
    started = time.time()
    try:
        return Compiled(lower().compile(compiler_options=OPTIONS.get(chip.platform)), time.time() - started)
    except jax.errors.JaxRuntimeError as error:
        first = str(error).partition("RESOURCE_EXHAUSTED: ")
        words = f"does not fit: {first[2]}" if first[1] else f"fails to compile: {first[0]}"
        return Compiled(None, time.time() - started, words.splitlines()[0])


def _with(run: Experiment, attention: str) -> Experiment:
    """With that attention, where the network has any."""
    return revise(run, {"model.attention": attention}) if hasattr(run.model, "attention") else run


def _dataset(run: Experiment) -> Dataset:
    """Latents: one example of zeros in the shapes that the config says. Data that come with the code: themselves."""
    return zeros(run, run.data.shape) if isinstance(run.data, LatentsConfig) else load_data(run)


def _calls(program: Program) -> tuple[dict, int]:
    """({name: (jitted function, *abstract arguments)}, bytes that state and teacher hold on a chip)."""
    training, (teacher, batch) = program.distillation, program.abstract_inputs()
    names = [name for name in ("student", "critic") if name in training.steps]
    calls = {name: (training.steps[name], training.state, teacher, batch) for name in names}
    params = program.whole(teacher, training.state.ema)
    calls["sampler"] = (program.student_sampler(), *program.sampler_inputs(params, batch))
    leaves = [x for x in jax.tree.leaves((training.state, teacher)) if x.sharding.memory_kind != HOST]
    return calls, sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


@contextlib.contextmanager
def _target(chip: Chip, mesh):
    """Kernels are compiled for the GPU or TPU of the plan, not for that of this machine."""
    kind = mesh.devices.flat[0].device_kind
    targets = {"gpu": lambda: triton.compiling_for(CAPABILITY), "tpu": lambda: pallas_tpu.compiling_for(kind)}
    with targets.get(chip.platform, contextlib.nullcontext)():
        yield


def _attention(run: Experiment, chip: Chip, mesh, dataset) -> tuple[str, str]:
    """(implementation, a line on the choice). The kernels of the platform, unless config.model.attention names one."""
    asked = getattr(run.model, "attention", "auto")
    name = KERNELS.get(chip.platform, "blockwise") if asked == "auto" else asked
    reason = _obstacle(run, name, mesh, dataset)
    if not reason:
        return name, f'attention "{name}"' + (", as the config says" if asked != "auto" else "")
    if asked != "auto":
        raise ValueError(f'config.model.attention "{asked}" cannot be compiled here: {reason}')
    return "blockwise", f'attention "blockwise", NOT the kernels "{name}": {reason}'


def _obstacle(run: Experiment, name: str, mesh, dataset) -> str:
    """Why a program with these attention kernels cannot be compiled for the mesh; "" if it can."""
    if name == "fa4":
        return "fa4-jax compiles its kernels on the GPU that runs them"
    if name not in KERNELS.values():
        return ""
    if name == "triton" and not installed("jax_triton"):
        return f"jax-triton is not installed ({triton.INSTALL})"
    one, rows = dataset.first, run.train.batch_size
    network = make_network(_with(run, name), one)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), one)
    params = jax.eval_shape(network.make_params, jax.random.key(0))
    times = jax.ShapeDtypeStruct((rows,), np.float32)
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

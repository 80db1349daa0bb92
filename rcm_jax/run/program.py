"""The program of an experiment on a mesh, assembled once: training runs it, a plan compiles it, it has the samplers.

Nothing is allocated here. What the data are is asked of a Dataset: the real one, or one of zeros in its shapes.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax import data
from rcm_jax.data import SyntheticConfig
from rcm_jax.data.dataset import Dataset
from rcm_jax.kernels.choice import in_words, settle  # pyright: ignore[reportMissingImports]
from rcm_jax.method import denoiser, samplers, trigflow
from rcm_jax.method.denoiser import Velocities, Velocity
from rcm_jax.models import adapters, check_network, example, network_of, token_grid
from rcm_jax.models.adapters import Adapted, AdapterConfig
from rcm_jax.parallel.sharding import batch_sharding, replicated
from rcm_jax.run.experiment import Experiment, Predictor, SamplingConfig
from rcm_jax.train import trainer
from rcm_jax.train.state import Teacher
from rcm_jax.train.steps import alone, diffusion_method, rcm_method
from rcm_jax.train.trainer import Training


class Network(NamedTuple):
    """init(key) -> boxed parameters (with logical axes); F(params, x, t, cond) -> TrigFlow velocity, float32.

    F takes parameters, or an adapters.Adapted.
    """

    init: Callable[[jax.Array], Any]
    F: Velocity
    attention: str = ""  # what computes it, in words; "" without
    normalised: Callable | None = None  # of the network's record
    adapted: tuple[str, ...] = ()  # of the network's record

    @property
    def boxed(self):
        """The abstract, boxed, parameters."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def make_params(self, key):
        """Plain parameters."""
        return nn.meta.unbox(self.init(key))

    def adapter(self, config: AdapterConfig | None) -> Callable[[jax.Array], Any]:
        """key -> what is trained, boxed: an adapter or, without a config, all parameters."""
        return partial(adapters.init, config, self.adapted, self.boxed) if config else self.init


def make_network(config: Predictor, one: dict) -> Network:
    """The network for samples like `one`, {"x0": [1, ...], "cond": {name: [1, ...]}}; conditions go by their names.

    Decides which kernels its attention has, if that is "auto": with several processes all must make their networks.
    """
    model = config.model
    attention = _attention(model, token_grid(model, one["x0"].shape[1:]))
    module = network_of(model).module(model)

    def init(key):
        return module.init(key, jnp.asarray(one["x0"]), jnp.zeros(1), **one["cond"])["params"]

    def net(params, x, time, cond):
        return module.apply({"params": adapters.whole(params)}, x, time, **cond)

    F = denoiser.PARAMETRIZATIONS[config.parametrization](net, config.time_scale)
    record = network_of(model)
    return Network(init, F, attention, record.normalised, record.adapted)


def _attention(model, grid) -> str:
    """What computes the attention of a network, in words; decided here if that is "auto"."""
    asked = getattr(model, "attention", "")
    if asked != "auto" or not grid:
        return asked and f'"{asked}"'
    return in_words(settle(model.dim // model.num_heads, model.dtype, math.prod(grid)))


def zeros(config: Predictor, shape, **conditions) -> Dataset:
    """A data set of one example of zeros, for samples of that shape; conditions: other shapes than the network's."""
    one = example(config.model, shape, **conditions)
    uncond = {name: one["cond"][name] for name in ("text", "label") if name in one["cond"]}
    classes = getattr(config.model, "num_classes", None)
    return Dataset(jax.tree.map(lambda x: x[None], one), None, uncond, classes, view="video")


def load_data(run: Any) -> Dataset:
    """The data of an Experiment or Pretraining; synthetic ones that name no conditions have those of its network."""
    config = run.data
    if isinstance(config, SyntheticConfig) and not config.conditions:
        known = {n: leaf.shape for n, leaf in network_of(run.model).conditions(run.model, config.shape).items()}
        if (media := getattr(run, "media", None)) is not None and media.text_encoder is not None:
            known["text"] = (media.text_length, media.text_width)
        classes = getattr(run.model, "num_classes", None)
        config = dataclasses.replace(config, conditions=tuple(known.items()), num_classes=classes)
    return data.load(config)


class Program(NamedTuple):
    """An experiment, its data and its mesh, and the functions that they make."""

    run: Experiment
    mesh: jax.sharding.Mesh
    dataset: Dataset
    network: Network
    teacher_F: Velocity  # without guidance
    pretraining: Training | None  # None: the teacher is given, or there is none
    distillation: Training

    @property
    def params(self):
        """Shapes, dtypes and shardings of the parameters of one network."""
        return trainer.abstract_params(self.network.boxed, self.mesh)

    @property
    def base(self):
        """As `params`, in the dtype of a teacher's in memory."""
        dtype = self.run.teacher_dtype
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), self.params)

    def first(self, key):
        """What is trained as it is first drawn: plain parameters, or an adapter that adds nothing."""
        return nn.meta.unbox(self.network.adapter(self.run.adapter)(key))

    def whole(self, teacher: Teacher, trained):
        """What F is given, of what is trained."""
        return whole(self.run.adapter)(teacher, trained)

    def teacher(self, params) -> Teacher:
        """The frozen side of the distillation, with given parameters (None: it has none)."""
        return Teacher(params, jax.device_put(self.dataset.uncond, replicated(self.mesh)))

    def abstract_inputs(self) -> tuple[Teacher, dict]:
        """(teacher, batch) of the distillation: shapes, dtypes and shardings."""
        uncond = jax.tree.map(lambda x: _abstract(np.shape(x), x.dtype, replicated(self.mesh)), self.dataset.uncond)
        rows, size = batch_sharding(self.mesh), self.run.train.batch_size
        batch = jax.tree.map(lambda x: _abstract((size, *x.shape[1:]), x.dtype, rows), self.dataset.first)
        return Teacher(self.base if self.run.has_teacher else None, uncond), batch

    def student_sampler(self, steps: int | None = None) -> Callable:
        """Of so many steps, by default of the most that there are times for."""
        sampling, within = self.run.sampling, self.run.noise_range
        steps = steps or len(sampling.mid_times)
        return student_sampler(self.network.F, sampling, steps, sampling.student_guidance, within)

    def student_samplers(self, steps) -> dict[int, Callable]:
        """{k: student_sampler(k)} of those numbers of steps for which there are times, in its range of noise."""
        sampling, found = self.run.sampling, {}
        for k in steps:
            with contextlib.suppress(ValueError):
                samplers.within(sampling.student_times(k), self.run.noise_range)
                found[k] = self.student_sampler(k)
        return found

    def teacher_sampler(self, steps: int | None = None, F: Velocity | None = None) -> Callable:
        """Of the teacher that F_T is, exact or a network, or of another F."""
        F, within = denoiser.guided(F or self.teacher_F, self.run.teacher_guidance), self.run.noise_range
        return teacher_sampler(F, self.dataset.uncond, self.run.sampling, steps, within)

    def sampler_inputs(self, params, batch: dict) -> tuple:
        """Abstract arguments of a sampler, for abstract parameters and the conditions of an abstract batch."""
        ids = _abstract(batch["x0"].shape[:1], np.uint32, batch_sharding(self.mesh))
        key = jax.eval_shape(jax.random.key, 0)
        return (
            params,
            _abstract(key.shape, key.dtype, replicated(self.mesh)),
            ids,
            batch["cond"] | ({samplers.START: batch["x0"]} if self.run.noise_range[1] < 1 else {}),
            self.sample_shape,
        )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.dataset.sample_shape


def _abstract(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def assemble(run: Experiment, mesh, dataset: Dataset) -> Program:
    """ValueError, before anything is allocated, where experiment, data and mesh do not fit each other."""
    classes = getattr(run.model, "num_classes", None)
    if classes != dataset.num_classes and classes != 0:  # with 0 the network does not look at labels
        raise ValueError(f"config.model.num_classes is {classes}, but the data have {dataset.num_classes} classes")
    check_conditions(run.model, dataset)
    for shape in dataset.shapes:
        check_network(run.model, shape, mesh)
    network, key = make_network(run, dataset.first), jax.random.key(run.seed)
    boxed, pretraining = network.boxed, None
    if run.pretrain and not run.teacher:
        method = diffusion_method(run.pretrain.method, network.F, run.pretrain.train.accumulate, network.normalised)
        key_data = jax.random.fold_in(key, 1)
        pretraining = trainer.make_training("teacher", run.pretrain.train, mesh, method, boxed, key_data)
    teacher_F = network.F
    if run.exact_teacher:
        if dataset.velocity is None:
            raise ValueError(
                "config.exact_teacher is set, but the velocity of these data is not known: set it to False"
            )
        teacher_F = dataset.velocity
    guidance = run.rcm.guidance if run.rcm.guidance_max is None else None
    velocities = Velocities(network.F, denoiser.guided(teacher_F, guidance), network.F)
    method = rcm_method(run.rcm, velocities, run.train.accumulate, network.normalised, whole(run.adapter))
    trained = jax.eval_shape(network.adapter(run.adapter), key)
    distillation = trainer.make_training(run.rcm.name, run.train, mesh, method, trained, jax.random.fold_in(key, 2))
    return Program(run, mesh, dataset, network, teacher_F, pretraining, distillation)


def whole(config: AdapterConfig | None) -> Callable[[Teacher, Any], Any]:
    """(teacher, what is trained) -> the parameters of a network: an adapter's are of the teacher as well."""
    if config is None:
        return alone
    return lambda teacher, adapter: Adapted(teacher.params, adapter, config.scale)


def check_conditions(model, dataset: Dataset) -> None:
    """ValueError where the data lack what a network is told of an image, or have what it does not take."""
    takes = WAYS.keys() & set(network_of(model).conditions(model, dataset.sample_shape))
    has = WAYS.keys() & set(dataset.first["cond"])
    for name in sorted(takes ^ has):
        sides = ("takes", "lack") if name in takes else ("does not take", "have")
        raise ValueError(f"this network {sides[0]} {name}, which the data {sides[1]}: it is {WAYS[name]}")


# What tells a network of an image, and how a set gets it.
WAYS = {
    "y": "of sets that are built with --first_frame",
    "clip_features": "of sets that are built with --clip=FILE",
    "known": "the first frames of a set, by config.data.known_frames and config.model.known_frames",
}


def student_sampler(
    F: Velocity, sampling: SamplingConfig, steps: int, guidance: float | None = None, within=trigflow.WHOLE
) -> Callable:
    """Jitted (params, key, sample_ids [b], cond, sample_shape) -> x0 [b, ...]: few-step sampling.

    guidance: of a student that is given it, as a condition. within: of a network for a part of the noise, its range:
    those of the steps that are in it. If that is not the noisiest part, cond has START, data to be noised.

    Step k draws its noise with fold_in(key, k), per sample: k = 0 is the noise that teacher_sampler starts from.
    """
    times = samplers.within(sampling.student_times(steps), within)

    def sample(params, key, ids, cond, shape):
        if guidance is not None:
            cond = cond | {"guidance": jnp.full(ids.shape, guidance, jnp.float32)}
        noise = jnp.stack([samplers.unit_noise(jax.random.fold_in(key, k), ids, shape) for k in range(len(times))])
        start, cond = samplers.started(noise[0], times[0], cond)
        return samplers.few_step(F, params, noise.at[0].set(start), times, cond)

    return jax.jit(sample, static_argnums=4)


def teacher_sampler(
    guided: Velocity, uncond, sampling: SamplingConfig, steps: int | None = None, within=trigflow.WHOLE
) -> Callable:
    """Jitted (params, key, sample_ids [b], cond, sample_shape) -> x0 [b, ...]: the PF-ODE of a guided F, solved.

    within: as in `student_sampler`; where the range ends above 0, one step leads from there to x0.
    """
    solver = samplers.SOLVERS[sampling.teacher_solver]
    times = sampling.teacher_times(steps)
    times = np.append(samplers.within(times[:-1], within), times[-1])

    def sample(params, key, ids, cond, shape):
        noise = samplers.unit_noise(jax.random.fold_in(key, 0), ids, shape)
        start, cond = samplers.started(noise, times[0], cond)
        return solver(guided, params, start, times, (cond, uncond))

    return jax.jit(sample, static_argnums=4)

"""A whole experiment as one frozen config, and the pure functions it stands for."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rcm_jax.data import DigitsConfig, LatentsConfig, MixtureConfig
from rcm_jax.data.dataset import Dataset
from rcm_jax.method import denoiser, samplers
from rcm_jax.method.objectives.consistency import DcmConfig, ScmConfig
from rcm_jax.method.trigflow import LogNormal, ShiftedUniform
from rcm_jax.models import NETWORKS, CosmosConfig, DiTConfig, MLPConfig, WanConfig
from rcm_jax.models.layers import DTYPES
from rcm_jax.models.t5 import T5Config
from rcm_jax.models.wan_vae import WanVAEConfig
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.train import checkpoint
from rcm_jax.train.steps import DiffusionConfig, RcmConfig, student_updates
from rcm_jax.train.trainer import TrainConfig
from rcm_jax.util.config import build, flatten

KINDS = {
    "digits": DigitsConfig,
    "latents": LatentsConfig,
    "mixture": MixtureConfig,
    "dit": DiTConfig,
    "mlp": MLPConfig,
    "wan": WanConfig,
    "cosmos": CosmosConfig,
    "scm": ScmConfig,
    "dcm": DcmConfig,
    "log_normal": LogNormal,
    "shifted_uniform": ShiftedUniform,
}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Making the teacher."""

    method: DiffusionConfig
    train: TrainConfig


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Noise levels of the samplers. mid_times[k - 1] are the k − 1 times between arctan(sigma_max) and 0 of k steps."""

    sigma_max: float
    mid_times: tuple[tuple[float, ...], ...]
    teacher_shift: float = 1.0  # of the teacher's grid, uniform in rectified-flow time before the shift
    teacher_solver: str = "euler"
    teacher_sigma_max: float | None = None  # None: sigma_max

    def __post_init__(self):
        if self.teacher_solver not in samplers.SOLVERS:
            raise ValueError(f"teacher_solver {self.teacher_solver!r} is none of {', '.join(samplers.SOLVERS)}")
        if not self.mid_times:
            raise ValueError("mid_times is empty: its first entry, (), makes samples of one step")
        for k, times in enumerate(self.mid_times, 1):
            if len(times) != k - 1:
                raise ValueError(f"mid_times[{k - 1}] is for {k} steps: it needs {k - 1} times, got {list(times)}")
            samplers.student_times(self.sigma_max, times)


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """What lies between files and the network: a prompt becomes its condition "text", its latents become pixels."""

    text_encoder: T5Config
    text_length: int  # tokens, to which every prompt is cut or padded
    clean_prompts: bool  # as Wan does
    zero_negative: bool  # an empty negative prompt is zeros, as Cosmos-Predict2 was trained; else the encoder's
    vae: WanVAEConfig
    fps: int  # frames of pixels in a second

    def __post_init__(self):
        if min(self.text_length, self.fps) < 1:
            raise ValueError(f"text_length {self.text_length} and fps {self.fps} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Generator:
    """A network and what it predicts: all that a converted checkpoint says of itself."""

    model: CosmosConfig | DiTConfig | MLPConfig | WanConfig
    parametrization: str  # what the network predicts, and of what
    time_scale: float  # the network is given time_scale × its own time

    def __post_init__(self):
        if self.parametrization not in denoiser.PARAMETRIZATIONS:
            raise ValueError(
                f"parametrization {self.parametrization!r} is none of {', '.join(denoiser.PARAMETRIZATIONS)}"
            )


@dataclasses.dataclass(frozen=True)
class Pretraining(Generator):
    """What makes a teacher, whole: the config of a teacher's workdir."""

    seed: int
    data: DigitsConfig | LatentsConfig | MixtureConfig
    pretrain: PretrainConfig
    sampling: SamplingConfig
    mesh: MeshConfig


@dataclasses.dataclass(frozen=True)
class Experiment(Pretraining):
    """A distillation, whole, with the pretraining of its teacher if it has one."""

    pretrain: PretrainConfig | None
    teacher: str  # workdir of a teacher; "": pretrain one first, if pretrain says how
    rcm: RcmConfig
    train: TrainConfig
    teacher_dtype: str = "float32"  # of the teacher's parameters in memory; those that are trained are float32
    exact_teacher: bool = False  # F_T is the data's own velocity; a pretrained network is only where the student starts
    media: MediaConfig | None = None  # of data that are latents of images or videos

    @property
    def has_start(self) -> bool:
        """Whether the student starts from a trained network, not from random parameters."""
        return bool(self.teacher) or self.pretrain is not None

    def __post_init__(self):
        super().__post_init__()
        if self.rcm.needs_teacher and not self.exact_teacher and not self.has_start:
            raise ValueError(
                "teacher is empty, and this experiment has no pretraining: set config.teacher to the workdir of one "
                "(scripts/convert_checkpoint.py makes it from published weights)"
            )
        if self.teacher_dtype not in DTYPES:
            raise ValueError(f"teacher_dtype {self.teacher_dtype!r} is none of {', '.join(DTYPES)}")
        updates, student = student_updates(self.rcm, self.train.steps), self.rcm.student
        if 0 < student.decay_steps < updates and student.final_scale == 0:
            raise ValueError(
                f"train.steps {self.train.steps} makes {updates} student updates, but the learning rate is 0 after "
                f"rcm.student.decay_steps = {student.decay_steps}: raise decay_steps or final_scale"
            )


# What a teacher and its student must agree on, less how it is computed and where data lie. (Converted weights say
# nothing of data.)
SHARED_WITH_TEACHER = ("data", "model", "parametrization", "time_scale")
NOT_SHARED = ("config.data.path", *(f"config.model.{key}" for key in ("attention", "remat", "dtype", "time_dtype")))


def from_mapping(values: dict) -> Generator:
    """An Experiment from a nested mapping with the key rcm, else a Pretraining if it has pretrain, else a Generator.

    Raises ValueError that names a bad key.
    """
    cls = Experiment if "rcm" in values else Pretraining if "pretrain" in values else Generator
    return build(cls, values, kinds=KINDS)


def teacher_values(values: dict) -> dict:
    """The part of an experiment's mapping that makes its teacher."""
    return {field.name: values[field.name] for field in dataclasses.fields(Pretraining)}


def check_teacher(values: dict) -> int:
    """The step of the finished teacher; ValueError unless values["teacher"] is a teacher's workdir that fits."""
    folder = values["teacher"]
    there = checkpoint.read_config(folder)
    if "rcm" in there:
        raise ValueError(f"{folder} holds a distilled student; its own teacher may be in {folder}/teacher")
    check_same(folder, there, values, [key for key in SHARED_WITH_TEACHER if key in there or key != "data"])
    return there["pretrain"]["train"]["steps"] if "pretrain" in there else 0


def check_same(folder, there: dict, values: dict, keys) -> None:
    """ValueError that lists where the config of a workdir differs from values in these keys (but for NOT_SHARED)."""
    theirs, ours = (flatten(_whole({key: v.get(key) for key in keys})) for v in (there, values))
    differing = [
        f"{key} is {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in NOT_SHARED
    ]
    if differing:
        raise ValueError(f"the network in {folder} does not fit this config: {'; '.join(differing)}")


def _whole(values: dict) -> dict:
    """The mapping with the defaults of keys that the config of its model got after it was written."""
    model = values["model"]
    if not isinstance(model, dict) or model.get("kind") not in KINDS:
        return values
    fields = dataclasses.fields(KINDS[model["kind"]])
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return values | {"model": defaults | model}


class Network(NamedTuple):
    """init(key) -> boxed parameters (with logical axes); F(params, x, t, cond) -> TrigFlow velocity, float32."""

    init: Callable[[jax.Array], Any]
    F: denoiser.Velocity


def make_network(run: Pretraining, dataset: Dataset) -> Network:
    """The network of an experiment on its data; conditions are keyword arguments of the module.

    Raises ValueError if the network is for another number of classes than the data have.
    """
    if (classes := getattr(run.model, "num_classes", None)) != dataset.num_classes:
        raise ValueError(f"config.model.num_classes is {classes}, but the data have {dataset.num_classes} classes")
    module = NETWORKS[type(run.model)](run.model)

    def init(key):
        one = dataset.first
        return module.init(key, jnp.asarray(one["x0"]), jnp.zeros(1), **one["cond"])["params"]

    def net(params, x, time, cond):
        return module.apply({"params": params}, x, time, **cond)

    return Network(init, denoiser.PARAMETRIZATIONS[run.parametrization](net, run.time_scale))


def make_params(network: Network) -> Callable:
    """key -> plain parameters."""
    return lambda key: nn.meta.unbox(network.init(key))


def as_dtype(params, dtype: str):
    """Parameters in that dtype; an array that has another gives up its memory as soon as it is converted."""

    def convert(leaf):
        if leaf.dtype == dtype:
            return leaf
        converted = leaf.astype(dtype)
        leaf.delete()
        return converted

    return jax.tree.map(convert, params)


def student_sampler(F: denoiser.Velocity, sampling: SamplingConfig, steps: int) -> Callable:
    """Jitted (params, key, sample_ids [b], cond, sample_shape) -> x0 [b, ...]: few-step sampling.

    Step k draws its noise with fold_in(key, k), per sample: k = 0 is the noise that teacher_sampler starts from.
    """
    if not 1 <= steps <= len(sampling.mid_times):
        raise ValueError(f"{steps} steps asked for, but sampling.mid_times covers 1 to {len(sampling.mid_times)}")
    times = samplers.student_times(sampling.sigma_max, sampling.mid_times[steps - 1])

    def sample(params, key, ids, cond, shape):
        noise = jnp.stack([samplers.unit_noise(jax.random.fold_in(key, k), ids, shape) for k in range(steps)])
        return samplers.few_step(F, params, noise, times, cond)

    return jax.jit(sample, static_argnums=4)


def teacher_sampler(F: denoiser.Velocity, uncond, guidance: float, sampling: SamplingConfig, steps: int) -> Callable:
    """Jitted (params, key, sample_ids [b], cond, sample_shape) -> x0 [b, ...]: the guided PF-ODE, solved."""
    guided = denoiser.guided(F, guidance)
    solver = samplers.SOLVERS[sampling.teacher_solver]
    times = samplers.ode_times(steps, sampling.teacher_sigma_max or sampling.sigma_max, sampling.teacher_shift)

    def sample(params, key, ids, cond, shape):
        noise = samplers.unit_noise(jax.random.fold_in(key, 0), ids, shape)
        return solver(guided, params, noise, times, (cond, uncond))

    return jax.jit(sample, static_argnums=4)

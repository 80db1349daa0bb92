"""A whole experiment as one frozen config. Defaults stand here and in the configs of its parts, and nowhere else."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

from rcm_jax.data import DATASETS, LatentsConfig
from rcm_jax.method import denoiser, samplers, trigflow
from rcm_jax.models import AUTOENCODERS, IMAGE_ENCODERS, NETWORKS, TEXT_ENCODERS, network_of
from rcm_jax.models.adapters import AdapterConfig
from rcm_jax.models.layers import Dtype
from rcm_jax.models.records import record_of
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.steps import DiffusionMethod, RcmConfig, student_updates
from rcm_jax.train.trainer import TrainConfig
from rcm_jax.util.config import build
from rcm_jax.util.ranges import Guidance, Seed, Shift, Steps, Time, Width, among, between, config, some

RANDOM = "random"  # in the place of a teacher: parameters as they are first drawn, to see that a run runs


def one_of(table: Mapping, optional: bool = False):
    """A field whose value is the config of an entry of a table; optional: or None."""
    return dataclasses.field(metadata={"kinds": table, "optional": optional})


@config
class PretrainConfig:
    """Making the teacher."""

    method: DiffusionMethod = DiffusionMethod()
    train: TrainConfig = TrainConfig()


def _level(value: float) -> str:
    """Rule of a field."""
    return "" if 1e-9 <= value <= 1e9 or value == math.inf else "from 1e-9 to 1e9, or inf"


Level = Annotated[float, _level]  # of noise


@config
class SamplingConfig:
    """Noise levels of the samplers. mid_times[k - 1] are the k − 1 times between arctan(sigma_max) and 0 of k steps."""

    sigma_max: Level = 80.0
    mid_times: Annotated[tuple[tuple[Time, ...], ...], some] = ((), (1.3,), (1.3, 1.0), (1.3, 1.0, 0.6))
    teacher_steps: Steps = 50
    teacher_shift: Shift = 1.0  # of the teacher's grid, uniform in rectified-flow time before the shift
    teacher_solver: Annotated[str, among(samplers.SOLVERS)] = "euler"
    teacher_sigma_max: Level | None = None  # None: sigma_max
    # Of EDM's grid, in the place of the shifted one; EDM has 7.
    teacher_rho: Annotated[float, between(0.1, 100)] | None = None
    teacher_sigma_min: Annotated[float, between(1e-9, 1e9)] = (
        0.004  # of EDM's grid: its 0.002, for data of unit variance
    )
    student_guidance: Guidance | None = None  # of students that are given it (guidance_max), and teachers beside them
    data_shift: Shift | None = None  # of the teacher's grid where a set is built of its samples; None: teacher_shift
    # Of every row of a report's table, two or more, for they are compared; None: as many as tell rows apart.
    report_samples: Annotated[int, between(2, 1_000_000)] | None = None

    def __post_init__(self):
        for k, times in enumerate(self.mid_times, 1):
            if len(times) != k - 1:
                raise ValueError(f"mid_times[{k - 1}] is for {k} steps: it needs {k - 1} times, got {list(times)}")
            samplers.student_times(self.sigma_max, times)
        if self.teacher_rho is not None and self.data_shift is not None:
            raise ValueError("data_shift is of the shifted grid, and teacher_rho takes EDM's: set one of them to None")
        self.teacher_times()

    def student_times(self, steps: int):
        """[steps] decreasing times of a student; ValueError if there are none for so many."""
        if not 1 <= steps <= len(self.mid_times):
            raise ValueError(f"{steps} steps asked for, but sampling.mid_times covers 1 to {len(self.mid_times)}")
        return samplers.student_times(self.sigma_max, self.mid_times[steps - 1])

    def teacher_times(self, steps: int | None = None):
        """[steps + 1] decreasing times of a teacher's ODE, of teacher_steps by default."""
        sigma_max, steps = self.teacher_sigma_max or self.sigma_max, steps or self.teacher_steps
        if self.teacher_rho is None:
            return samplers.ode_times(steps, sigma_max, self.teacher_shift)
        return samplers.edm_times(steps, sigma_max, self.teacher_sigma_min, self.teacher_rho)


@config
class MediaConfig:
    """What lies between files and the network: a prompt becomes its condition "text", its latents become pixels."""

    text_encoder: Any = one_of(TEXT_ENCODERS, optional=True)  # None: there are no prompts but classes
    vae: Any = one_of(AUTOENCODERS)
    text_length: Width = 512  # tokens, to which every prompt is cut or padded
    clean_prompts: bool = False  # as Wan does
    zero_negative: bool = False  # an empty negative prompt is zeros, as Cosmos-Predict2 was trained; else the encoder's
    # Of image to video of Wan2.1; None: none is needed.
    image_encoder: Any = dataclasses.field(default=None, metadata={"kinds": IMAGE_ENCODERS, "optional": True})
    fps: Annotated[int, between(1, 1_000)] = 16  # frames of pixels in a second
    vae_path: str = ""  # published weights of the autoencoder, any layout: previews and reports show pixels; "": none

    @property
    def text_width(self) -> int:
        """Features of a token."""
        return record_of(TEXT_ENCODERS, self.text_encoder).width(self.text_encoder)


@config
class Predictor:
    """A network and what it predicts: all that converted weights say of themselves."""

    model: Any = one_of(NETWORKS)
    # What the network predicts, and of what; "": as its record says.
    parametrization: Annotated[str, among(denoiser.PARAMETRIZATIONS, "")] = ""
    # The network is given time_scale × its own time; 0: as its record says.
    time_scale: Annotated[float, between(0, 1e6)] = 0.0

    def __post_init__(self):
        record = network_of(self.model)
        object.__setattr__(self, "parametrization", self.parametrization or record.parametrization)
        object.__setattr__(self, "time_scale", self.time_scale or record.time_scale)


@config(kw_only=True)
class Pretraining(Predictor):
    """What makes a teacher, whole: the config of a teacher's workdir."""

    seed: Seed = 0
    data: Any = one_of(DATASETS)
    pretrain: PretrainConfig = PretrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: MeshConfig = MeshConfig()
    media: MediaConfig | None = None  # of data that are latents of images or videos

    def __post_init__(self):
        super().__post_init__()
        self._check_optional()
        known, given = network_of(self.model).known_frames(self.model), getattr(self.data, "known_frames", 0)
        if isinstance(self.data, LatentsConfig) and known != given:
            raise ValueError(f"model.known_frames is {known} and data.known_frames {given}: they must be the same")
        if self.pretrain:
            steps = self.pretrain.train.steps
            _check_decay(
                "pretrain.method.optimizer", self.pretrain.method.optimizer, f"pretrain.train.steps {steps}", steps
            )

    def _check_optional(self):
        """ValueError where the network cannot do without, or lacks, what its training gives it."""
        if self.pretrain and self.pretrain.method.dropout and "dropout" not in network_of(self.model).optional:
            raise ValueError(f"pretrain.method.dropout {self.pretrain.method.dropout}: this network has none")


@config(kw_only=True)
class Experiment(Pretraining):
    """A distillation, whole, with the pretraining of its teacher if it has one."""

    pretrain: PretrainConfig | None = None
    teacher: str = ""  # workdir of a teacher, or RANDOM; "": pretrain one first, if pretrain says how
    start: str = ""  # workdir of a student, or of converted weights, to start from; "": the teacher
    fake_start: str = ""  # workdir whose fake score, or averaged network, the fake score starts from; "": the teacher
    rcm: RcmConfig = RcmConfig()
    train: TrainConfig = TrainConfig()
    adapter: AdapterConfig | None = None  # trained in the place of whole networks, beside the teacher's parameters
    teacher_dtype: Dtype = "float32"  # of the teacher's parameters in memory; those that are trained are float32
    exact_teacher: bool = False  # F_T is the data's own velocity; a pretrained network is only where the student starts

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher network, from which the others start; else they start from random parameters."""
        return bool(self.teacher) or self.pretrain is not None or self.needs_teacher_network

    @property
    def needs_teacher_network(self) -> bool:
        """Whether the losses ask a teacher that is a network."""
        return self.rcm.needs_teacher and not self.exact_teacher

    @property
    def noise_range(self) -> trigflow.Range:
        """Rectified-flow times for which the networks are."""
        return self.rcm.noise_range

    @property
    def teacher_guidance(self) -> float:
        """Of the teacher's samples."""
        return self.rcm.guidance if self.rcm.guidance_max is None else self.sampling.student_guidance or 1.0

    @property
    def pretraining(self) -> Pretraining:
        """The part that makes the teacher."""
        return Pretraining(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Pretraining)})

    def __post_init__(self):
        super().__post_init__()
        if self.adapter and not self.has_teacher:
            raise ValueError("adapter is beside the parameters of a teacher, and there is none: set it to None")
        if self.fake_start and not self.rcm.fake_score:
            raise ValueError(f"fake_start is {self.fake_start}, but rcm.fake_score is None: set it to ''")
        self._check_guidance()
        self._check_times()
        self._check_phases()
        updates = student_updates(self.rcm, self.train.steps)
        _check_decay("rcm.student", self.rcm.student, f"train.steps {self.train.steps}", updates)

    def _check_optional(self):
        super()._check_optional()
        if self.rcm.dropout and "dropout" not in network_of(self.model).optional:
            raise ValueError(f"rcm.dropout {self.rcm.dropout}: this network has none, set it to 0")

    def _check_times(self):
        """ValueError where no time of the samplers is in rcm.noise_range."""
        sampling, within = self.sampling, self.noise_range
        for times in (sampling.student_times(len(sampling.mid_times)), sampling.teacher_times()[:-1]):
            samplers.within(times, within)

    def _check_guidance(self):
        """ValueError unless a student is given its guidance both when it is trained and when it samples, or never."""
        given, most = self.sampling.student_guidance, self.rcm.guidance_max
        if most is None and given is not None:
            raise ValueError(f"sampling.student_guidance {given} is for students with rcm.guidance_max: set it to None")
        if most is None:
            return
        if not getattr(self.model, "guidance_input", False):
            raise ValueError(f"rcm.guidance_max {most} takes a network with model.guidance_input=True")
        if given is None or not self.rcm.guidance <= given <= most:
            raise ValueError(
                f"sampling.student_guidance is {given}: it must be in rcm.guidance to rcm.guidance_max, "
                f"{self.rcm.guidance} to {most}"
            )

    def _check_phases(self):
        """ValueError where training would end before a loss, or the whole of the tangent, has had its turn."""
        rcm, steps = self.rcm, self.train.steps
        needed, joins = rcm.warmup, "the tangent counts in full"
        if rcm.consistency and rcm.dmd:
            needed, joins = rcm.warmup + rcm.dmd.update_freq, f"{rcm.dmd.label} first updates the student"
        if needed and steps <= needed:
            raise ValueError(
                f"train.steps {steps} is too short: with rcm.warmup {rcm.warmup} {joins} in iteration {needed}, the "
                f"first being 0. Set train.steps above {needed}, or rcm.warmup lower, or choose a method without it"
            )


def _check_decay(key: str, optimizer: OptimizerConfig, steps: str, updates: int) -> None:
    """ValueError where a learning rate is 0 before so many updates, of so many steps, are done."""
    if 0 < optimizer.decay_steps < updates and optimizer.final_scale == 0:
        raise ValueError(
            f"{steps} makes {updates} updates, but the learning rate is 0 after {key}.decay_steps = "
            f"{optimizer.decay_steps}: raise decay_steps or final_scale"
        )


def from_mapping(values: Mapping) -> Predictor:
    """An Experiment from a nested mapping with the key rcm, else a Pretraining if it has pretrain, else a Predictor.

    Raises ValueError that names a bad key.
    """
    if "rcm" in values:
        return build(Experiment, values)
    return build(Pretraining if "pretrain" in values else Predictor, values)

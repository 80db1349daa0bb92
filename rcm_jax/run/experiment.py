"""A whole experiment as one frozen config. Defaults stand here and in the configs of its parts, and nowhere else."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rcm_jax.data import DATASETS
from rcm_jax.method import denoiser, samplers
from rcm_jax.models import AUTOENCODERS, NETWORKS, TEXT_ENCODERS, network_of
from rcm_jax.models.layers import DTYPES
from rcm_jax.models.records import record_of
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.train.steps import DiffusionMethod, RcmConfig, student_updates
from rcm_jax.train.trainer import TrainConfig
from rcm_jax.util.config import build

RANDOM = "random"  # in the place of a teacher: parameters as they are first drawn, to see that a run runs


def one_of(table: Mapping):
    """A field whose value is the config of an entry of a table."""
    return dataclasses.field(metadata={"kinds": table})


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Making the teacher."""

    method: DiffusionMethod = DiffusionMethod()
    train: TrainConfig = TrainConfig()


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Noise levels of the samplers. mid_times[k - 1] are the k − 1 times between arctan(sigma_max) and 0 of k steps."""

    sigma_max: float = 80.0
    mid_times: tuple[tuple[float, ...], ...] = ((), (1.3,), (1.3, 1.0), (1.3, 1.0, 0.6))
    teacher_steps: int = 50
    teacher_shift: float = 1.0  # of the teacher's grid, uniform in rectified-flow time before the shift
    teacher_solver: str = "euler"
    teacher_sigma_max: float | None = None  # None: sigma_max
    data_shift: float | None = None  # of the teacher's grid where a set is built of its samples; None: teacher_shift
    report_samples: int | None = None  # of every row of a report's table; None: as many as tell rows apart

    def __post_init__(self):
        if self.teacher_solver not in samplers.SOLVERS:
            raise ValueError(f"teacher_solver {self.teacher_solver!r} is none of {', '.join(samplers.SOLVERS)}")
        if self.teacher_steps < 1:
            raise ValueError(f"teacher_steps {self.teacher_steps} must be at least 1")
        if self.report_samples is not None and self.report_samples < 2:
            raise ValueError(f"report_samples {self.report_samples} must be at least 2, for they are compared")
        if not self.mid_times:
            raise ValueError("mid_times is empty: its first entry, (), makes samples of one step")
        for k, times in enumerate(self.mid_times, 1):
            if len(times) != k - 1:
                raise ValueError(f"mid_times[{k - 1}] is for {k} steps: it needs {k - 1} times, got {list(times)}")
            samplers.student_times(self.sigma_max, times)


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """What lies between files and the network: a prompt becomes its condition "text", its latents become pixels."""

    text_encoder: Any = one_of(TEXT_ENCODERS)
    vae: Any = one_of(AUTOENCODERS)
    text_length: int = 512  # tokens, to which every prompt is cut or padded
    clean_prompts: bool = False  # as Wan does
    zero_negative: bool = False  # an empty negative prompt is zeros, as Cosmos-Predict2 was trained; else the encoder's
    fps: int = 16  # frames of pixels in a second
    vae_path: str = ""  # published weights of the autoencoder, any layout: previews and reports show pixels; "": none

    def __post_init__(self):
        if min(self.text_length, self.fps) < 1:
            raise ValueError(f"text_length {self.text_length} and fps {self.fps} must be at least 1")

    @property
    def text_width(self) -> int:
        """Features of a token."""
        return record_of(TEXT_ENCODERS, self.text_encoder).width(self.text_encoder)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A network and what it predicts: all that converted weights say of themselves."""

    model: Any = one_of(NETWORKS)
    parametrization: str = ""  # what the network predicts, and of what; "": as its record says
    time_scale: float = 0.0  # the network is given time_scale × its own time; 0: as its record says

    def __post_init__(self):
        record = network_of(self.model)
        object.__setattr__(self, "parametrization", self.parametrization or record.parametrization)
        object.__setattr__(self, "time_scale", self.time_scale or record.time_scale)
        if self.parametrization not in denoiser.PARAMETRIZATIONS:
            known = ", ".join(denoiser.PARAMETRIZATIONS)
            raise ValueError(f"parametrization {self.parametrization!r} is none of {known}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(Predictor):
    """What makes a teacher, whole: the config of a teacher's workdir."""

    seed: int = 0
    data: Any = one_of(DATASETS)
    pretrain: PretrainConfig = PretrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Pretraining):
    """A distillation, whole, with the pretraining of its teacher if it has one."""

    pretrain: PretrainConfig | None = None
    teacher: str = ""  # workdir of a teacher, or RANDOM; "": pretrain one first, if pretrain says how
    start: str = ""  # workdir of a student, or of converted weights, to start from; "": the teacher
    fake_start: str = ""  # workdir whose fake score, or averaged network, the fake score starts from; "": the teacher
    rcm: RcmConfig = RcmConfig()
    train: TrainConfig = TrainConfig()
    teacher_dtype: str = "float32"  # of the teacher's parameters in memory; those that are trained are float32
    exact_teacher: bool = False  # F_T is the data's own velocity; a pretrained network is only where the student starts
    media: MediaConfig | None = None  # of data that are latents of images or videos

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher network, from which the others start; else they start from random parameters."""
        return bool(self.teacher) or self.pretrain is not None or self.needs_teacher_network

    @property
    def needs_teacher_network(self) -> bool:
        """Whether the losses ask a teacher that is a network."""
        return self.rcm.needs_teacher and not self.exact_teacher

    @property
    def pretraining(self) -> Pretraining:
        """The part that makes the teacher."""
        return Pretraining(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Pretraining)})

    def __post_init__(self):
        super().__post_init__()
        if self.teacher_dtype not in DTYPES:
            raise ValueError(f"teacher_dtype {self.teacher_dtype!r} is none of {', '.join(DTYPES)}")
        if self.fake_start and not self.rcm.fake_score:
            raise ValueError(f"fake_start is {self.fake_start}, but rcm.fake_score is None: set it to ''")
        self._check_phases()
        updates, student = student_updates(self.rcm, self.train.steps), self.rcm.student
        if 0 < student.decay_steps < updates and student.final_scale == 0:
            raise ValueError(
                f"train.steps {self.train.steps} makes {updates} student updates, but the learning rate is 0 after "
                f"rcm.student.decay_steps = {student.decay_steps}: raise decay_steps or final_scale"
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


def from_mapping(values: Mapping) -> Predictor:
    """An Experiment from a nested mapping with the key rcm, else a Pretraining if it has pretrain, else a Predictor.

    Raises ValueError that names a bad key.
    """
    if "rcm" in values:
        return build(Experiment, values)
    return build(Pretraining if "pretrain" in values else Predictor, values)

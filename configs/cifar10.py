"""CIFAR-10 as the sCM paper has it (arXiv 2410.11081, appendix G): a TrigFlow teacher, sCD and sCT.

python scripts/train.py --config=cifar10.py:teacher --config.data.path=TFDS --workdir=TEACHER
python scripts/train.py --config=cifar10.py:scd --config.data.path=TFDS --config.teacher=TEACHER --workdir=DIR
python scripts/train.py --config=cifar10.py:sct --config.data.path=TFDS --config.teacher=TEACHER --workdir=DIR

TFDS is the folder in which `tfds build cifar10 --file_format=array_record` prepared the images. The paper reports FID
2.15 for the teacher in 35 calls, 3.66 and 2.52 for sCD and 2.85 and 2.06 for sCT in 1 and 2 steps; this file has not
been run at full size. sCT, too, starts from the teacher. EDM's augmentation of images is not here, and the paper does
not say whether it was there.

`:digits` after its name is the same in small, on scikit-learn's digits of 16×16 pixels (docs/results.md); `:tiny` is
smaller still, to see that it runs.
"""

import math

from ml_collections import ConfigDict

from configs import methods
from rcm_jax.data import DigitsConfig, TfdsConfig
from rcm_jax.method.objectives import DiffusionConfig, ScmConfig
from rcm_jax.method.trigflow import LogNormal
from rcm_jax.models.edm_unet import EdmConfig
from rcm_jax.run.experiment import Experiment, PretrainConfig, SamplingConfig
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.steps import DiffusionMethod, RcmConfig
from rcm_jax.train.trainer import TrainConfig
from rcm_jax.util.config import revise

SIGMA_DATA = 0.5  # the paper's data have this deviation, ours 1: its noise levels and constants are divided by it
SAMPLING = SamplingConfig(  # EDM's sampler for the teacher, one step or two for the student
    sigma_max=80 / SIGMA_DATA, mid_times=((), (1.1,)), teacher_steps=18, teacher_solver="heun", teacher_rho=7.0,
    teacher_sigma_min=0.002 / SIGMA_DATA,
)  # fmt: skip
WEIGHTING = OptimizerConfig(
    1e-2, b1=0.9, b2=0.99, weight_decay=0.0
)  # of our 33 numbers; the paper's network is its own


def log_normal(mean: float, std: float) -> LogNormal:
    """log(sigma_data·tan t) ~ N(mean, std²), as the paper says it."""
    return LogNormal(mean - math.log(SIGMA_DATA), std)


def consistency(mean: float, std: float) -> ScmConfig:
    """sCD of the paper, at those times."""
    return ScmConfig(log_normal(mean, std), scale=1.0, warmup_form="scm", tangent_constant=0.1 / SIGMA_DATA)


MODEL = EdmConfig(  # DDPM++, with the changes of section 4.1
    img_resolution=32, img_channels=3, label_dim=0, model_channels=128, channel_mult=(2, 2, 2), adaptive_scale=True,
    double_norm=True,
)  # fmt: skip
PRETRAIN = PretrainConfig(
    method=DiffusionMethod(
        DiffusionConfig(log_normal(-1.2, 1.2), drop_condition=0.0),
        OptimizerConfig(1e-3, b1=0.9, b2=0.999, weight_decay=0.0, warmup_steps=19_531),  # 10 million images, as in EDM
        weighting=WEIGHTING,
        dropout=0.13,
        ema_half_life=500_000,
        ema_ramp=0.05,
    ),
    train=TrainConfig(400_000, 512, checkpoint_every=5000, sample_every=5000, asynchronous=True),
)
RCM = RcmConfig(
    student=OptimizerConfig(1e-4, kind="radam", b1=0.9, b2=0.99, weight_decay=0.0, warmup_steps=0),
    fake_score=None,
    weighting=WEIGHTING,
    consistency=consistency(-1.0, 1.4),
    dmd=None,
    warmup=10_000,
    ema_half_life=500_000,
)
EXPERIMENT = Experiment(
    model=MODEL,
    parametrization="trigflow",
    time_scale=1.0,  # c_noise(t) = t
    data=TfdsConfig("cifar10", test="test", sigma_data=SIGMA_DATA),
    pretrain=PRETRAIN,
    rcm=RCM,
    train=TrainConfig(400_000, 512, checkpoint_every=5000, sample_every=5000, asynchronous=True),
    sampling=SAMPLING,
)


def sct(run: Experiment) -> Experiment:
    """Follows the data; more dropout."""
    return revise(run, {"rcm.consistency.follows": "data", "rcm.dropout": 0.20})


def digits(run: Experiment) -> Experiment:
    """The same method on 16×16 digits: a teacher in 17 minutes and a student in 6 to 9, on two busy cores."""
    model = dict(img_resolution=16, img_channels=1, model_channels=16, channel_mult=(1, 2), num_blocks=1,
                 attn_resolutions=(8,), label_dim=10)  # fmt: skip
    optimizer = dict(warmup_steps=100, decay_steps=0)
    return revise(run, {
        "model": revise(run.model, model),
        "data": DigitsConfig(size=16),
        "pretrain.method.optimizer": revise(run.pretrain.method.optimizer, optimizer | dict(learning_rate=2e-3)),
        "pretrain.method.ema_half_life": 5_000,
        "pretrain.train": TrainConfig(1500, 32, sample_every=500, checkpoint_every=500),
        "rcm.student.learning_rate": 5e-4,
        "rcm.warmup": 200,
        "rcm.ema_half_life": 5_000,
        "train": TrainConfig(1000, 32, sample_every=500, checkpoint_every=250, keep=10),
    })  # fmt: skip


def tiny(run: Experiment) -> Experiment:
    """Hardly any width, and a few steps."""
    return revise(digits(run), {
        "model.model_channels": 8,
        "pretrain.train": TrainConfig(4, 8, log_every=2, sample_every=4),
        "train": TrainConfig(6, 8, log_every=2, sample_every=6),
        "rcm.warmup": 3,
        "sampling.teacher_steps": 3,
        "sampling.report_samples": 80,
    })  # fmt: skip


VARIANTS = {"digits": digits, "tiny": tiny, "scd": lambda run: run, "sct": sct}


def get_config(variant: str = "") -> ConfigDict:
    """For flags: any key can be changed from the command line, e.g. --config.train.batch_size=64."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, VARIANTS))

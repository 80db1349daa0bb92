"""ImageNet 64×64 as the sCM paper has it (arXiv 2410.11081, appendix G): a TrigFlow teacher of EDM2, sCD and sCT.

python scripts/train.py --config=imagenet64.py:s,teacher --config.data.path=TFDS --workdir=TEACHER
python scripts/reconstruct_ema.py --workdir=TEACHER --std=0.075 --dst=AVERAGED
python scripts/train.py --config=imagenet64.py:s,scd --config.data.path=TFDS --config.teacher=AVERAGED --workdir=DIR
python scripts/train.py --config=imagenet64.py:s,sct --config.data.path=TFDS --config.teacher=AVERAGED --workdir=DIR

TFDS is the folder in which `tfds build imagenet_resized/64x64 --file_format=array_record` prepared the images (its
pictures are resized by boxes; the paper resizes by bicubic interpolation and crops the centre). The sizes are s, m, l
and xl. The paper reports FID 1.70 to 1.38 for the teachers in 63 calls; for sCD in 1 and 2 steps 2.97 and 2.07 (s) to
2.44 and 1.66 (xl), for sCT 3.23 and 2.93 to 2.04 and 1.48; this file has not been run at full size. The paper computes
in float16, we in bfloat16.

`:digits` after its name is the same in small, on scikit-learn's digits of 16×16 pixels (docs/results.md); `:tiny` is
smaller still, to see that it runs.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import cifar10, methods
from rcm_jax.data import TfdsConfig
from rcm_jax.method.objectives import DiffusionConfig
from rcm_jax.models.edm2_unet import Edm2Config
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.run.experiment import Experiment, PretrainConfig
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.steps import DiffusionMethod, RcmConfig
from rcm_jax.train.trainer import TrainConfig
from rcm_jax.util.config import revise

BATCH = 2048
WARMUP = 10_000_000 // BATCH  # updates: 10 million images


class Size(NamedTuple):
    """A column of tables 4 and 5 of the paper. dropout: rates of teacher, sCD and sCT; ema: of the teacher."""

    channels: int
    learning_rate: float  # of the teacher; that of sCD and sCT is a hundredth
    teacher_steps: int
    ema: float
    dropout: tuple[float, float, float]


SIZES = {
    "s": Size(192, 1e-2, 1_048_000, 0.075, (0.0, 0.0, 0.45)),
    "m": Size(256, 9e-3, 1_486_000, 0.06, (0.1, 0.0, 0.45)),
    "l": Size(320, 8e-3, 761_000, 0.04, (0.1, 0.0, 0.45)),
    "xl": Size(384, 7e-3, 540_000, 0.04, (0.1, 0.0, 0.45)),
}
ADAM = OptimizerConfig(1e-2, b1=0.9, b2=0.99, eps=1e-11, weight_decay=0.0, warmup_steps=WARMUP, decay_after=35_000)
TRAIN = TrainConfig(400_000, BATCH, checkpoint_every=2000, sample_every=2000, asynchronous=True)
MODEL = Edm2Config(
    img_resolution=64, img_channels=3, label_dim=1000, model_channels=192, embedding_type="positional",
    double_norm=True, dropout_resolution=16, dtype="bfloat16",
)  # fmt: skip
EXPERIMENT = Experiment(
    model=MODEL,
    parametrization="trigflow",
    time_scale=1.0,  # c_noise(t) = t
    data=TfdsConfig("imagenet_resized/64x64", test="validation", sigma_data=cifar10.SIGMA_DATA),
    pretrain=PretrainConfig(
        method=DiffusionMethod(
            DiffusionConfig(cifar10.log_normal(-0.8, 1.6), drop_condition=0.0), ADAM, weighting=cifar10.WEIGHTING,
            ema_std=0.05, ema_tracks=(0.10,),
        ),
        train=revise(TRAIN, {"snapshot_every": 4000}),  # of 8 million images, as in EDM2
    ),
    rcm=RcmConfig(
        student=revise(ADAM, {"learning_rate": 1e-4}),
        fake_score=None,
        weighting=cifar10.WEIGHTING,
        consistency=cifar10.consistency(-1.0, 1.6),
        dmd=None,
        warmup=10_000,
        ema_std=0.05,
    ),
    train=TRAIN,
    sampling=revise(cifar10.SAMPLING, {"teacher_steps": 32}),
    mesh=MeshConfig(data=1, fsdp=-1),
)  # fmt: skip


def sized(size: Size, run: Experiment) -> Experiment:
    """With the width of a size, and the settings that go with it."""
    return revise(run, {
        "model.model_channels": size.channels,
        "pretrain.method.optimizer.learning_rate": size.learning_rate,
        "pretrain.method.dropout": size.dropout[0],
        "pretrain.train.steps": size.teacher_steps,
        "rcm.student.learning_rate": size.learning_rate / 100,
        "rcm.dropout": size.dropout[1],
    })  # fmt: skip


def sct(sizes, run: Experiment) -> Experiment:
    """Follows the data; the size's dropout."""
    [size] = [size for size in sizes.values() if size.channels == run.model.model_channels] or [sizes["s"]]
    return revise(run, {"rcm.consistency.follows": "data", "rcm.dropout": size.dropout[2]})


def digits(run: Experiment) -> Experiment:
    """The same method on 16×16 digits; no run of it has been measured."""
    small = cifar10.digits(cifar10.EXPERIMENT)
    model = dict(img_resolution=16, img_channels=1, label_dim=10, model_channels=16, channel_mult=(1, 2), num_blocks=1,
                 attn_resolutions=(8,), channels_per_head=16, dtype="float32")  # fmt: skip
    return revise(run, {
        "model": revise(run.model, model),
        "data": small.data,
        "pretrain.method.optimizer": revise(run.pretrain.method.optimizer, dict(warmup_steps=100, decay_after=1000)),
        "pretrain.train": revise(small.pretrain.train, {"snapshot_every": 500}),
        "rcm.student": revise(run.rcm.student, dict(learning_rate=2e-3, warmup_steps=100, decay_after=1000)),
        "rcm.warmup": small.rcm.warmup,
        "train": small.train,
        "sampling.teacher_steps": small.sampling.teacher_steps,
    })  # fmt: skip


def tiny(run: Experiment) -> Experiment:
    """Hardly any width, and a few steps."""
    small = cifar10.tiny(cifar10.EXPERIMENT)
    return revise(digits(run), {
        "model.model_channels": 8,
        "model.channels_per_head": 8,
        "pretrain.train": revise(small.pretrain.train, {"snapshot_every": 2, "checkpoint_every": 2}),
        "train": small.train,
        "rcm.warmup": small.rcm.warmup,
        "sampling.teacher_steps": 3,
        "sampling.report_samples": 80,
    })  # fmt: skip


def variants(sizes) -> dict:
    """Sizes, small versions, and the two ways to train."""
    by_size = {name: lambda run, size=size: sized(size, run) for name, size in sizes.items()}
    ways = {"scd": lambda run: run, "sct": lambda run: sct(sizes, run)}
    return by_size | {"digits": digits, "tiny": tiny} | ways


def get_config(variant: str = "") -> ConfigDict:
    """For flags: any key can be changed from the command line, e.g. --config.train.batch_size=64."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, variants(SIZES)))

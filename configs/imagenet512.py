"""ImageNet 512×512 in latents, as the sCM paper has it (arXiv 2410.11081, appendix G): EDM2 teachers, sCD and sCT.

python scripts/build_dataset.py --config=imagenet512.py --images=IMAGENET/train --vae=VAE --out=LATENTS
python scripts/train.py --config=imagenet512.py:m,teacher --config.data.path=LATENTS --workdir=TEACHER
python scripts/reconstruct_ema.py --workdir=TEACHER --std=0.03 --dst=AVERAGED
python scripts/train.py --config=imagenet512.py:m,scd --config.data.path=LATENTS --config.teacher=AVERAGED \\
    --workdir=DIR
python scripts/sample.py --checkpoint=DIR --classes=88,29 --guidance=1.3 --steps=2 --vae=VAE --out=grid.png

VAE is the autoencoder stabilityai/sd-vae-ft-mse. The sizes are s, m, l, xl and xxl. A student of sCD is given the
guidance of its samples as an input, from 1 to 2. The paper reports FID 2.29 to 1.73 for the guided teachers in 126
calls; for sCD in 1 and 2 steps 3.07 and 2.50 (s) to 2.28 and 1.88 (xxl), at guidance 1.5 and 1.4 (s), 1.3 and 1.2; this
file has not been run at full size.

`:tiny` after its name is the same with hardly any width, on noise in the shapes of latents, to see that it runs.
"""

from ml_collections import ConfigDict

from configs import cifar10, imagenet64, methods
from configs.imagenet64 import Size
from rcm_jax.data import LatentsConfig, SyntheticConfig
from rcm_jax.models.sd_vae import SdVaeConfig
from rcm_jax.run.experiment import Experiment, MediaConfig
from rcm_jax.util.config import revise

SIZES = {
    "s": Size(192, 1e-2, 1_048_000, 0.025, (0.0, 0.0, 0.25)),
    "m": Size(256, 9e-3, 1_048_000, 0.03, (0.1, 0.1, 0.35)),
    "l": Size(320, 8e-3, 696_000, 0.015, (0.1, 0.1, 0.35)),
    "xl": Size(384, 7e-3, 598_000, 0.02, (0.1, 0.1, 0.35)),
    "xxl": Size(448, 6.5e-3, 376_000, 0.015, (0.1, 0.1, 0.35)),
}
EXPERIMENT = revise(
    imagenet64.EXPERIMENT,
    {
        "model": revise(imagenet64.MODEL, {"img_channels": 4, "guidance_input": True}),
        "data": LatentsConfig(shape=(64, 64, 4)),
        "media": MediaConfig(text_encoder=None, vae=SdVaeConfig()),
        "pretrain.method.objective.time": cifar10.log_normal(-0.4, 1.0),
        "pretrain.method.objective.drop_condition": 0.1,
        "pretrain.method.optimizer.decay_after": 70_000,
        "rcm.student.decay_after": 70_000,
        "rcm.consistency.time": cifar10.log_normal(-0.8, 1.6),
        "rcm.guidance_max": 2.0,
        "sampling.student_guidance": 1.4,
        "train.steps": 200_000,
    },
)


def sct(run: Experiment) -> Experiment:
    """Follows the data, at half the length, and without guidance."""
    changes = {"rcm.guidance_max": None, "sampling.student_guidance": None}
    return imagenet64.sct(SIZES, revise(run, changes | {"train.steps": min(run.train.steps, 100_000)}))


def tiny(run: Experiment) -> Experiment:
    """Hardly any width, and a few steps."""
    small = imagenet64.tiny(imagenet64.EXPERIMENT)
    return revise(run, {
        "model": revise(small.model, {"img_resolution": 8, "attn_resolutions": (4,), "img_channels": 4,
                                      "guidance_input": True}),
        "data": SyntheticConfig((8, 8, 4), examples=64),
        "pretrain": revise(small.pretrain, {"method.objective": run.pretrain.method.objective}),
        "rcm.warmup": small.rcm.warmup,
        "train": small.train,
        "sampling.teacher_steps": 3,
        "media": None,
    })  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    """For flags: any key can be changed from the command line, e.g. --config.train.batch_size=64."""
    variants = {name: change for name, change in imagenet64.variants(SIZES).items() if name != "digits"}
    return methods.flagged(methods.choose(EXPERIMENT, variant, variants | {"tiny": tiny, "sct": sct}))

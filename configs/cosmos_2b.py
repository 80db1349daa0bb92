"""Cosmos-Predict2 2B text to image, 1360×768, distilled to 1 to 4 steps with the settings of the real runs.

python scripts/convert_checkpoint.py --model=cosmos-2b --src=model.pt --dst=cosmos-2b
python scripts/train.py --config=cosmos_2b.py --config.teacher=cosmos-2b --config.data.path=LATENTS \\
    --workdir=DIR

LATENTS is a set as scripts/build_dataset.py makes it, of x0 [1, 96, 170, 16] and text [512, 1024] (T5-11B).
Another resolution is another data.shape, [1, height/8, width/8, 16], both even and at most 240. The teacher was trained
on buckets of width × height 1024×1024, 1168×880, 880×1168, 1360×768 and 768×1360; a run here has one shape. The paper
trains 30,000 iterations at a global batch of 512 and reports GenEval 0.81 with 4 steps (teacher: 0.83); this file has
not been run at full size. `:tiny` after its name is the same method with hardly any width, for x0 [1, 4, 6, 4] and text
[6, 8]; `:8gpu` cuts it to fit one machine (configs/machines.py); a method of configs/methods.py may follow.
"""

from ml_collections import ConfigDict

from configs import machines, methods, wan_1_3b
from rcm_jax.data import LatentsConfig
from rcm_jax.method.objectives import DmdConfig, ScmConfig
from rcm_jax.method.trigflow import LogNormal
from rcm_jax.models import cosmos, t5, wan_vae
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.run.experiment import Experiment, MediaConfig, SamplingConfig
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.steps import RcmConfig
from rcm_jax.train.trainer import TrainConfig
from rcm_jax.util.config import revise

RCM = RcmConfig(
    student=OptimizerConfig(1e-6),
    fake_score=OptimizerConfig(2e-7),
    # F_u + w·(F_c − F_u), as the official code since February 2026: the paper's 4.5 may be 5.5 in this form
    # (docs/deviations.md). Cosmos' own sampler counts from 0.
    guidance=4.5,
    consistency=ScmConfig(LogNormal(-0.8, 1.6)),
    dmd=DmdConfig(LogNormal(0.0, 1.6)),
)
EXPERIMENT = Experiment(
    model=revise(cosmos.PUBLISHED["cosmos-2b"], wan_1_3b.COMPUTED),
    data=LatentsConfig(shape=(1, 96, 170, 16)),
    mesh=MeshConfig(data=1, fsdp=-1),
    teacher_dtype="bfloat16",
    rcm=RCM,
    train=TrainConfig(30_000, 512, log_every=10, checkpoint_every=500, sample_every=500, asynchronous=True),
    sampling=SamplingConfig(
        mid_times=((), (1.3,), (1.3, 1.0), (1.3, 1.0, 0.6)), teacher_solver="unipc", teacher_sigma_max=80.0
    ),
    # Its T5 runs in float32, and what it is given for no text is zeros.
    media=MediaConfig(t5.PUBLISHED["t5-11b"], wan_vae.PUBLISHED["wan2.1-vae"], zero_negative=True),
)

TINY = dict(
    model_channels=24, num_blocks=2, num_heads=2, in_channels=4, out_channels=4, crossattn_emb_channels=8,
    adaln_lora_dim=4,
)  # fmt: skip


def tiny(run: Experiment) -> Experiment:
    """The same method with hardly any width."""
    return revise(
        run,
        {
            "model": revise(run.model, TINY | ({"in_channels": 5} if run.model.known_frames else {})),
            "data.shape": (2 if run.model.known_frames else 1, 4, 6, 4),
            "mesh": MeshConfig(data=1, fsdp=-1),
            "rcm.dmd.update_freq": 2,
            "train": revise(run.train, dict(steps=6, batch_size=8, accumulate=1, log_every=1, checkpoint_every=3)),
            "media": run.media and wan_1_3b.tiny_media(run.media),
        },
    )


def get_config(variant: str = "") -> ConfigDict:
    """For flags: any key can be changed from the command line, e.g. --config.train.batch_size=64."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, machines.of("cosmos_2b") | {"tiny": tiny}))

"""Wan2.1 1.3B text to video, 832×480, 77 frames, distilled to 1 to 4 steps with the settings of the real runs.

python scripts/convert_checkpoint.py --model=wan-1.3b --src=…/diffusion_pytorch_model.safetensors --dst=wan-1.3b
python scripts/train.py --config=wan_1_3b.py --config.teacher=wan-1.3b --config.data.path=LATENTS --workdir=DIR

LATENTS is a set as scripts/build_dataset.py makes it. The paper trains 10,000 iterations at a global batch of 256
and reports VBench 84.4 with 4 steps (teacher: 83.0); this file has not been run at full size. `:tiny` after its name is
the same method with hardly any width, for x0 of shape [2, 4, 6, 4] and text of shape [6, 8]; `:8gpu` and `:v6e-8`
cut it to fit one machine (configs/machines.py).
"""

from ml_collections import ConfigDict

from configs import machines, methods
from rcm_jax.data import LatentsConfig
from rcm_jax.method.objectives import DmdConfig, ScmConfig
from rcm_jax.method.trigflow import LogNormal
from rcm_jax.models import t5, wan, wan_vae
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.run.experiment import Experiment, MediaConfig, SamplingConfig
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.steps import RcmConfig
from rcm_jax.train.trainer import TrainConfig
from rcm_jax.util.config import revise

COMPUTED = {"dtype": "bfloat16", "time_dtype": "float32", "remat": "full"}  # blocks, time embedding
RCM = RcmConfig(
    student=OptimizerConfig(2e-6),
    fake_score=OptimizerConfig(4e-7),
    guidance=5.0,  # F_u + w·(F_c − F_u), as the official code since February 2026; the paper's 5 may be 6 in this form
    # The paper's N(−0.8, 1.6²) with log sigma moved by ln sqrt(20), for 20 latent frames.
    consistency=ScmConfig(LogNormal(0.7, 1.6)),
    dmd=DmdConfig(),
    warmup=1000,
    ema_std=0.05,  # the paper; the official code's default is 0.1
)
SAMPLING = SamplingConfig(
    # The official code; the paper samples from sigma_max 1600 by 1.3, 1.0, 0.6.
    mid_times=((), (1.5,), (1.5, 1.4), (1.5, 1.4, 1.0)),
    teacher_shift=5.0,
    teacher_solver="unipc",
    teacher_sigma_max=5000.0,
    data_shift=3.0,
)
EXPERIMENT = Experiment(
    model=revise(wan.PUBLISHED["wan-1.3b"], COMPUTED),
    data=LatentsConfig(shape=(20, 60, 104, 16)),
    mesh=MeshConfig(data=1, fsdp=-1),
    teacher_dtype="bfloat16",
    rcm=RCM,
    train=TrainConfig(10_000, 256, log_every=10, checkpoint_every=500, sample_every=500, asynchronous=True),
    sampling=SAMPLING,
    media=MediaConfig(
        text_encoder=revise(t5.PUBLISHED["umt5-xxl"], {"dtype": "bfloat16"}),
        vae=wan_vae.PUBLISHED["wan2.1-vae"],
        clean_prompts=True,
    ),
)

TINY_TEXT = dict(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
TINY_CLIP = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
TINY_VAE = dict(dim=4, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
TINY = dict(dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16)


def tiny(run: Experiment) -> Experiment:
    """The same method with hardly any width; y of image to video has 8 channels then."""
    image = (
        {"in_dim": TINY["in_dim"] + 8, "clip_dim": run.model.clip_dim and 16} if run.model.model_type == "i2v" else {}
    )
    return revise(
        run,
        {
            "model": revise(run.model, TINY | image),
            "data.shape": (2, 4, 6, 4),
            "mesh": MeshConfig(data=1, fsdp=-1),
            "rcm.warmup": 2,
            "rcm.dmd.update_freq": 2,
            "train": revise(run.train, dict(steps=6, batch_size=8, accumulate=1, log_every=1, checkpoint_every=3)),
            "media": tiny_media(run.media),
        },
    )


def tiny_media(media: MediaConfig) -> MediaConfig:
    """The same text encoder and autoencoder with hardly any width."""
    small = TINY_VAE | ({"dec_dim": 4} if hasattr(media.vae, "dec_dim") else {})
    encoder, vae = revise(media.text_encoder, TINY_TEXT), revise(media.vae, small)
    tiny = {"text_encoder": encoder, "vae": vae, "text_length": 6}
    if media.image_encoder:
        tiny["image_encoder"] = revise(media.image_encoder, TINY_CLIP)
    return revise(media, tiny)


def get_config(variant: str = "") -> ConfigDict:
    """For flags: any key can be changed from the command line, e.g. --config.train.batch_size=64."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, machines.of("wan_1_3b") | {"tiny": tiny}))

"""Wan2.1 1.3B text to video, 832×480, 77 frames, distilled to 1 to 4 steps with the settings of the real runs.

python scripts/convert_checkpoint.py --model=wan-1.3b --src=…/diffusion_pytorch_model.safetensors --dst=wan-1.3b
python scripts/train.py --config=configs/wan_1_3b.py --config.teacher=wan-1.3b --config.data.path=LATENTS --workdir=DIR

LATENTS is a folder as rcm_jax.data.latents.write makes it. The paper trains 10,000 iterations at a global batch of 256
and reports VBench 84.4 with 4 steps (teacher: 83.0); this file has not been run at full size. `:tiny` after its name is
the same method with hardly any width, for x0 of shape [2, 4, 6, 4] and text of shape [6, 8].
"""

import dataclasses

from ml_collections import ConfigDict

from configs import methods
from rcm_jax.models.t5 import PUBLISHED as TEXT_ENCODERS
from rcm_jax.models.wan import PUBLISHED
from rcm_jax.models.wan_vae import PUBLISHED as VAES

TINY_TEXT = dict(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
TINY_VAE = dict(dim=4, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
TINY = dict(dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16)


def model(name: str) -> dict:
    """The sizes of a published network; how it is computed."""
    sizes = {key: value for key, value in dataclasses.asdict(PUBLISHED[name]).items() if value is not None}
    return sizes | dict(kind="wan", dtype="bfloat16", time_dtype="float32", remat="full", attention="auto")


def media(text_encoder: str, text_dtype: str, **others) -> dict:
    """A published text encoder, and the autoencoder of Wan2.1, which Cosmos-Predict2 2B and 14B have as well."""
    return others | dict(
        text_encoder=dataclasses.asdict(TEXT_ENCODERS[text_encoder]) | dict(dtype=text_dtype),
        text_length=512,
        vae=dataclasses.asdict(VAES["wan2.1-vae"]),
        fps=16,
    )


def get_config(variant: str = "") -> ConfigDict:
    """All keys; change any from the command line, e.g. --config.train.batch_size=64."""
    config = ConfigDict()
    config.seed = 0
    config.data = dict(kind="latents", path="", shape=(20, 60, 104, 16))
    config.model = model("wan-1.3b")
    config.parametrization = "rectified_flow"
    config.time_scale = 1000.0
    config.mesh = dict(data=1, fsdp=-1, seq=1)
    config.teacher = ""  # the workdir of converted weights
    config.teacher_dtype = "bfloat16"
    config.exact_teacher = False
    config.pretrain = None

    adamw = dict(b1=0.0, b2=0.999, eps=1e-8, weight_decay=0.01, warmup_steps=100, decay_steps=0, final_scale=0.0)
    config.rcm = dict(
        guidance=5.0,
        warmup=1000,
        student=dict(adamw, learning_rate=2e-6),
        ema_std=0.05,  # the paper; the official code's default is 0.1
        consistency=dict(
            kind="scm",
            # The paper's N(−0.8, 1.6²) with log sigma moved by ln sqrt(20), for 20 latent frames.
            time=dict(kind="log_normal", mean=0.7, std=1.6),
            scale=100.0,
            velocity="teacher",
            derivative="jvp",
            warmup_form="paper",
            limit="norm",
            weighting=None,
        ),
        dmd=dict(
            time=dict(kind="shifted_uniform", shift=5.0),
            fake_score=dict(adamw, learning_rate=4e-7),
            scale=1.0,
            update_freq=5,
            max_rollout=4,
            rollout_length="drawn",
            mid_times=(),  # random
        ),
    )
    config.train = dict(
        steps=10_000, batch_size=256, log_every=10, checkpoint_every=500, sample_every=500, keep=2, wandb=False,
        accumulate=1, offload=False, asynchronous=True,
    )  # fmt: skip
    config.sampling = dict(
        # The official code; the paper samples from sigma_max 1600 by 1.3, 1.0, 0.6.
        sigma_max=80.0,
        mid_times=((), (1.5,), (1.5, 1.4), (1.5, 1.4, 1.0)),  # of 1, 2, 3 and 4 steps
        teacher_shift=5.0,
        teacher_solver="unipc",
        teacher_sigma_max=5000.0,
    )
    config.media = media("umt5-xxl", text_dtype="bfloat16", clean_prompts=True, zero_negative=False)
    return methods.choose(config, variant, {"tiny": tiny})


def tiny(config: ConfigDict) -> None:
    """The same method with hardly any width."""
    config.data.shape = (2, 4, 6, 4)
    config.mesh.update(fsdp=-1, seq=1)
    config.model.update(TINY)
    config.media.text_encoder.update(TINY_TEXT)
    config.media.text_length = TINY["text_len"]
    config.media.vae.update(TINY_VAE)
    config.train.update(steps=6, batch_size=8, log_every=1, checkpoint_every=3)
    config.rcm.warmup = 2
    config.rcm.dmd.update_freq = 2

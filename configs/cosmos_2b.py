"""Cosmos-Predict2 2B text to image, 1360×768, distilled to 1 to 4 steps with the settings of the real runs.

python scripts/convert_checkpoint.py --model=cosmos-2b --src=model.pt --dst=cosmos-2b
python scripts/train.py --config=configs/cosmos_2b.py --config.teacher=cosmos-2b --config.data.path=LATENTS \\
    --workdir=DIR

LATENTS is a folder as rcm_jax.data.latents.write makes it, of x0 [1, 96, 170, 16] and text [512, 1024] (T5-11B).
Another resolution is another data.shape, [1, height/8, width/8, 16], both even and at most 240. The teacher was trained
on buckets of width × height 1024×1024, 1168×880, 880×1168, 1360×768 and 768×1360; a run here has one shape. The paper
trains 30,000 iterations at a global batch of 512 and reports GenEval 0.81 with 4 steps (teacher: 0.83); this file has
not been run at full size. `:tiny` after its name is the same method with hardly any width, for x0 [1, 4, 6, 4] and text
[6, 8]; a method of configs/methods.py may follow.
"""

from ml_collections import ConfigDict

from configs import methods, wan_1_3b
from rcm_jax.models.cosmos import PUBLISHED

SIZES = ("model_channels", "num_blocks", "num_heads", "in_channels", "out_channels", "crossattn_emb_channels")
TINY = dict(
    model_channels=24, num_blocks=2, num_heads=2, in_channels=4, out_channels=4, crossattn_emb_channels=8,
    adaln_lora_dim=4,
)  # fmt: skip


def model(name: str) -> dict:
    """The sizes of a published network; how it is computed."""
    sizes = {key: getattr(PUBLISHED[name], key) for key in (*SIZES, "adaln_lora_dim")}
    return sizes | dict(kind="cosmos", dtype="bfloat16", time_dtype="float32", remat="full", attention="auto")


def get_config(variant: str = "") -> ConfigDict:
    """All keys; change any from the command line, e.g. --config.train.batch_size=64."""
    config = ConfigDict()
    config.seed = 0
    config.data = dict(kind="latents", path="", shape=(1, 96, 170, 16))
    config.model = model("cosmos-2b")
    config.parametrization = "rectified_flow"
    config.time_scale = 1.0
    config.mesh = dict(data=1, fsdp=-1, seq=1)
    config.teacher = ""  # the workdir of converted weights
    config.teacher_dtype = "bfloat16"
    config.exact_teacher = False
    config.pretrain = None

    adamw = dict(b1=0.0, b2=0.999, eps=1e-8, weight_decay=0.01, warmup_steps=100, decay_steps=0, final_scale=0.0)
    config.rcm = dict(
        guidance=4.5,  # F_u + w·(F_c − F_u); Cosmos' own sampler counts from 0
        warmup=0,
        student=dict(adamw, learning_rate=1e-6),
        ema_std=0.05,
        consistency=dict(
            kind="scm",
            time=dict(kind="log_normal", mean=-0.8, std=1.6),
            scale=100.0,
            velocity="teacher",
            derivative="jvp",
            warmup_form="paper",
            limit="norm",
            weighting=None,
        ),
        dmd=dict(
            time=dict(kind="log_normal", mean=0.0, std=1.6),
            fake_score=dict(adamw, learning_rate=2e-7),
            scale=1.0,
            update_freq=5,
            max_rollout=4,
            rollout_length="drawn",
            mid_times=(),  # random
        ),
    )
    config.train = dict(
        steps=30_000, batch_size=512, log_every=10, checkpoint_every=500, sample_every=500, keep=2, wandb=False,
        accumulate=1, offload=False, asynchronous=True,
    )  # fmt: skip
    config.sampling = dict(
        sigma_max=80.0,
        mid_times=((), (1.3,), (1.3, 1.0), (1.3, 1.0, 0.6)),  # of 1, 2, 3 and 4 steps
        teacher_shift=1.0,
        teacher_solver="unipc",
        teacher_sigma_max=80.0,
    )
    # Its T5 runs in float32, and what it is given for no text is zeros.
    config.media = wan_1_3b.media("t5-11b", text_dtype="float32", clean_prompts=False, zero_negative=True)
    return methods.choose(config, variant, {"tiny": tiny})


def tiny(config: ConfigDict) -> None:
    """The same method with hardly any width."""
    config.data.shape = (1, 4, 6, 4)
    config.model.update(TINY)
    if config.media:
        config.media.text_encoder.update(wan_1_3b.TINY_TEXT)
        config.media.text_length = 6
        config.media.vae.update(wan_1_3b.TINY_VAE)
    config.train.update(steps=6, batch_size=8, log_every=1, checkpoint_every=3)
    config.rcm.dmd.update_freq = 2

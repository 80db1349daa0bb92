"""Names of the autoencoder of Stable Diffusion. One layout, "diffusers": AutoencoderKL, also under the names that its
attention had before (stabilityai/sd-vae-ft-mse is published with those)."""

from rcm_jax.convert.table import Conversion, Rule, rules_of_modules, shapes_of
from rcm_jax.models import sd_vae
from rcm_jax.models.sd_vae import SdVaeConfig

# ours, diffusers, kind of module
OUTSIDE = (("encoder/moments", "quant_conv", "conv"), ("decoder/latents", "post_quant_conv", "conv"))
ATTENTION = "mid_block.attentions.0"
HALF = (  # of encoder and decoder
    ("conv_in", "conv_in", "conv"),
    ("norm_out", "conv_norm_out", "norm"),
    ("conv_out", "conv_out", "conv"),
    ("middle_attention/norm", f"{ATTENTION}.group_norm", "norm"),
    ("middle_attention/query", f"{ATTENTION}.to_q", "dense"),
    ("middle_attention/key", f"{ATTENTION}.to_k", "dense"),
    ("middle_attention/value", f"{ATTENTION}.to_v", "dense"),
    ("middle_attention/out", f"{ATTENTION}.to_out.0", "dense"),
)
BLOCK = (
    ("norm1", "norm1", "norm"),
    ("conv1", "conv1", "conv"),
    ("norm2", "norm2", "norm"),
    ("conv2", "conv2", "conv"),
    ("shortcut", "conv_shortcut", "conv"),  # where the number of channels changes
)
STAGES = {"encoder": ("down_blocks", "downsamplers"), "decoder": ("up_blocks", "upsamplers")}
EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ALIASES = {
    f"{half}.{ATTENTION}.{old}.{leaf}": f"{half}.{ATTENTION}.{new}.{leaf}"
    for half in STAGES
    for old, new in EARLIER.items()
    for leaf in ("weight", "bias")
}


def layouts(config: SdVaeConfig) -> dict[str, list[Rule]]:
    """The rules of the layout."""
    here, found = shapes_of(sd_vae.init, config), rules_of_modules(OUTSIDE)
    for half, (stages, resample) in STAGES.items():
        found += rules_of_modules(HALF, f"{half}/", f"{half}.")
        for i in range(2):
            found += rules_of_modules(BLOCK, f"{half}/middle_block_{i}/", f"{half}.mid_block.resnets.{i}.")
        for i in range(len(config.block_out_channels)):
            stage = f"{half}.{stages}.{i}"
            found += rules_of_modules([(f"{half}/stage_{i}_resample", f"{stage}.{resample}.0.conv", "conv")])
            for j in range(config.layers_per_block + 1):
                found += rules_of_modules(BLOCK, f"{half}/stage_{i}_block_{j}/", f"{stage}.resnets.{j}.")
    return {"diffusers": [rule for rule in found if rule.ours in here]}  # not every block has a shortcut, and so on


def described(config: SdVaeConfig, layout: str) -> dict:
    """The config.json that is published beside the layout. What latents are shifted and scaled by is not in it."""
    stages = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": 3,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
    }


CONVERSION = Conversion(sd_vae.AUTOENCODER, sd_vae.init, layouts, described, aliases=ALIASES)

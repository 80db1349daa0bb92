"""Names of the Wan2.1 video autoencoder. Layouts:

"official": Wan2.1_VAE.pth of Wan-AI, also the tokenizer of Cosmos-Predict2 (layers of all stages in one list);
"diffusers": AutoencoderKLWan (a list for each stage of the decoder, but not of the encoder).
"""

from collections.abc import Collection, Sequence

from rcm_jax.convert.table import Conversion, Rule, columns_of, rules_of_modules, shapes_of
from rcm_jax.models import wan_vae
from rcm_jax.models.wan_vae import WanVAEConfig

# ours, official, diffusers, kind of module
OUTSIDE = (
    ("encoder/moments", "conv1", "quant_conv", "conv"),
    ("decoder/latents", "conv2", "post_quant_conv", "conv"),
)
HALF = (  # of encoder and decoder
    ("conv_in", "conv1", "conv_in", "conv"),
    ("norm_out", "head.0", "norm_out", "video_gamma"),
    ("conv_out", "head.2", "conv_out", "conv"),
    ("middle_attention/norm", "middle.1.norm", "mid_block.attentions.0.norm", "image_gamma"),
    ("middle_attention/qkv", "middle.1.to_qkv", "mid_block.attentions.0.to_qkv", "conv"),
    ("middle_attention/out", "middle.1.proj", "mid_block.attentions.0.proj", "conv"),
)
BLOCK = (
    ("norm1", "residual.0", "norm1", "video_gamma"),
    ("conv1", "residual.2", "conv1", "conv"),
    ("norm2", "residual.3", "norm2", "video_gamma"),
    ("conv2", "residual.6", "conv2", "conv"),
    ("shortcut", "shortcut", "conv_shortcut", "conv"),  # where the number of channels changes
)
RESAMPLE = (
    ("conv", "resample.1", "resample.1", "conv"),
    ("time_conv", "time_conv", "time_conv", "conv"),  # where frames are merged or doubled
)
MIDDLE = tuple((f"middle_block_{i}", f"middle.{2 * i}", f"mid_block.resnets.{i}") for i in range(2))


def _places(config: WanVAEConfig):
    """(half, layer, its name in official, its name in diffusers, its modules) of all blocks and resamplings."""
    n = config.num_res_blocks
    halves = (
        ("encoder", n, "downsamples.{k}", "down_blocks.{k}", "down_blocks.{k}"),
        ("decoder", n + 1, "upsamples.{k}", "up_blocks.{i}.resnets.{j}", "up_blocks.{i}.upsamplers.0"),
    )
    for half, blocks, official, block, resample in halves:
        yield from ((half, *names, BLOCK) for names in MIDDLE)
        for i in range(len(config.dim_mult)):
            for j in range(blocks + 1):  # the last is the resampling
                at = {"i": i, "j": j, "k": i * (blocks + 1) + j}
                name, diffusers, modules = (
                    ("resample", resample, RESAMPLE) if j == blocks else (f"block_{j}", block, BLOCK)
                )
                yield half, f"stage_{i}_{name}", official.format(**at), diffusers.format(**at), modules


def layouts(config: WanVAEConfig) -> dict[str, list[Rule]]:
    """The rules of every layout."""
    return layouts_of(list(_places(config)), shapes_of(wan_vae.init, config))


def layouts_of(places: Sequence[tuple], here: Collection[str]) -> dict[str, list[Rule]]:
    """The same from what `_places` gives and the paths of our parameters."""

    def rules(column):
        found = rules_of_modules(columns_of(OUTSIDE, column))
        for half in ("encoder", "decoder"):
            found += rules_of_modules(columns_of(HALF, column), f"{half}/", f"{half}.")
        for half, *names, modules in places:
            found += rules_of_modules(columns_of(modules, column), f"{half}/{names[0]}/", f"{half}.{names[column]}.")
        return [rule for rule in found if rule.ours in here]  # not every block has a shortcut, and so on

    return {"official": rules(1), "diffusers": rules(2)}


def described(config: WanVAEConfig, layout: str) -> dict:
    """The config.json that is published beside a layout; nothing for official, which has none."""
    if layout == "official":
        return {}
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": list(config.attn_scales),
        "base_dim": config.dim,
        "decoder_base_dim": None,
        "dim_mult": list(config.dim_mult),
        "dropout": config.dropout,
        "in_channels": 3,
        "is_residual": False,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "out_channels": 3,
        "patch_size": None,
        "scale_factor_spatial": config.stride[1],
        "scale_factor_temporal": config.stride[0],
        "temperal_downsample": list(config.temperal_downsample),
        "z_dim": config.z_dim,
    }


CONVERSION = Conversion(wan_vae.AUTOENCODER, wan_vae.init, layouts, described)

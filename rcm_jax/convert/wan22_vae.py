"""Names of the Wan2.2 video autoencoder. Layouts:

"official": Wan2.2_VAE.pth of Wan-AI;
"diffusers": AutoencoderKLWan with is_residual. In both each stage has a list of its own.
"""

from rcm_jax.convert import wan_vae
from rcm_jax.convert.table import Conversion, Rule, shapes_of
from rcm_jax.convert.wan_vae import BLOCK, MIDDLE, RESAMPLE
from rcm_jax.models import wan22_vae
from rcm_jax.models.wan22_vae import Wan22VAEConfig


def _places(config: Wan22VAEConfig):
    """(half, layer, its name in official, its name in diffusers, its modules) of all blocks and resamplings."""
    for half, way, blocks in (("encoder", "down", config.num_res_blocks), ("decoder", "up", config.num_res_blocks + 1)):
        yield from ((half, *names, BLOCK) for names in MIDDLE)
        for i in range(len(config.dim_mult)):
            official, diffusers = f"{way}samples.{i}.{way}samples", f"{way}_blocks.{i}"
            for j in range(blocks):
                yield half, f"stage_{i}/block_{j}", f"{official}.{j}", f"{diffusers}.resnets.{j}", BLOCK
            yield half, f"stage_{i}/resample", f"{official}.{blocks}", f"{diffusers}.{way}sampler", RESAMPLE


def layouts(config: Wan22VAEConfig) -> dict[str, list[Rule]]:
    """The rules of every layout."""
    return wan_vae.layouts_of(list(_places(config)), shapes_of(wan22_vae.init, config))


def described(config: Wan22VAEConfig, layout: str) -> dict:
    """The config.json that is published beside a layout; nothing for official, which has none."""
    if layout == "official":
        return {}
    channels = 3 * config.patch_size**2
    return wan_vae.described(config, layout) | {
        "decoder_base_dim": config.dec_dim,
        "in_channels": channels,
        "is_residual": True,
        "out_channels": channels,
        "patch_size": config.patch_size,
    }


CONVERSION = Conversion(wan22_vae.AUTOENCODER, wan22_vae.init, layouts, described)

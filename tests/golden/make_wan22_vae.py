"""Records tests/golden/wan22_vae: a tiny video autoencoder of Wan2.2 TI2V-5B.

python tests/golden/make_wan22_vae.py
"""

import json
import re

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan

from oracles import HERE, diffsynth, drawn, keep, keep_index, normal

CONFIG = dict(
    dim=2, dec_dim=3, z_dim=5, dim_mult=[1, 2, 4, 2], num_res_blocks=1, attn_scales=[],
    temperal_downsample=[False, True, True], dropout=0.0,
)  # fmt: skip
LARGE = CONFIG | dict(dim=160, dec_dim=256, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
NAMES = (  # official, diffusers
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"head\.0\.", "norm_out."),
    (r"head\.2\.", "conv_out."),
    (r"middle\.0\.", "mid_block.resnets.0."),
    (r"middle\.1\.", "mid_block.attentions.0."),
    (r"middle\.2\.", "mid_block.resnets.1."),
    (r"(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)", r"\1_blocks.\2.\1sampler.\3"),
    (r"(down|up)samples\.(\d+)\.\1samples\.(\d+)\.", r"\1_blocks.\2.resnets.\3."),
    (r"residual\.0\.", "norm1."),
    (r"residual\.2\.", "conv1."),
    (r"residual\.3\.", "norm2."),
    (r"residual\.6\.", "conv2."),
    (r"shortcut\.", "conv_shortcut."),
)


def diffusers_name(name: str) -> str:
    """Of an official name, by hand."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def diffusers_config(c: dict) -> dict:
    """What AutoencoderKLWan is told."""
    same = ("z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")
    renamed = dict(base_dim=c["dim"], decoder_base_dim=c["dec_dim"], is_residual=True, patch_size=2)
    return {name: c[name] for name in same} | renamed | dict(in_channels=12, out_channels=12)


def both(config: dict):
    """The same network in both codes."""
    code = diffsynth("wan_video_vae").VideoVAE38_
    there = diffusers_config(config)
    zeros, ones = ([value] * config["z_dim"] for value in (0.0, 1.0))
    return code(**config), AutoencoderKLWan(**there, latents_mean=zeros, latents_std=ones)


def main():
    """Both codes on the same weights; they must agree."""
    for upsample in (diffsynth("wan_video_vae").Upsample, autoencoder_kl_wan.WanUpsample):
        upsample.forward = torch.nn.Upsample.forward  # theirs rounds to float32 on the way
    official, other = both(CONFIG)
    official, other = drawn(official, 0).double(), other.double().eval().requires_grad_(False)
    names = {diffusers_name(name): name for name in official.state_dict()}
    other.load_state_dict({theirs: official.state_dict()[ours] for theirs, ours in names.items()}, strict=True)
    mean, std = normal(CONFIG["z_dim"], seed=1), normal(CONFIG["z_dim"], seed=2).abs() + 0.5
    scale = [mean.double(), 1 / std.double()]
    pixels = normal(1, 3, 9, 16, 32, seed=3).clamp(-1, 1)
    latent = official.encode(pixels.double(), scale)
    recon = official.decode(latent, scale)
    column = (1, -1, 1, 1, 1)
    theirs = other.encode(pixels.double()).latent_dist.mode()
    np.testing.assert_allclose((theirs - mean.view(column)) / std.view(column), latent, rtol=1e-11, atol=1e-12)
    decoded = other._decode(theirs).sample  # clamped
    np.testing.assert_allclose(decoded, recon.clamp(-1, 1), rtol=1e-11, atol=1e-12)
    arrays = {"pixels": pixels, "latent_f64": latent, "recon_f64": recon, "latent_mean": mean, "latent_std": std}
    keep("wan22_vae", "wan22_vae_tiny", CONFIG, {"": official.state_dict()}, arrays)
    (HERE / "wan22_vae/wan22_vae_tiny.diffusers_names.json").write_text(json.dumps(names, indent=0) + "\n")
    with torch.device("meta"):
        official, other = both(LARGE)
    note = "Wan2.2 repository wan/modules/vae2_2.py WanVAE_ (Wan2.2_VAE.pth)"
    keep_index("wan2.2_vae", official.state_dict(), note, LARGE)
    keep_index("diffusers_wan2.2_vae", other.state_dict(), "diffusers AutoencoderKLWan", diffusers_config(LARGE))


if __name__ == "__main__":
    main()

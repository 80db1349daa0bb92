"""The image autoencoder of Stable Diffusion and its conversion: the reference's numbers, and what they refuse."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert import sd_vae as names
from rcm_jax.media import vae
from rcm_jax.models.sd_vae import PUBLISHED, SdVaeConfig, init
from tests import tiny
from tests.tiny import assert_trees_equal, cases, relative, stem
from tests.wan import precision

TINY = SdVaeConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("sd_vae/*.npz"), ids=stem)
def test_means_and_images_are_those_of_diffusers(path):
    """In float64; the published sizes, with random weights, were within 1e-14 there, and within 4e-6 in float32."""
    values = json.loads(path.with_suffix(".config.json").read_text())
    config = SdVaeConfig(**values, dtype="float64")
    data = {name: np.moveaxis(array, 1, -1)[:, None] for name, array in np.load(path).items()}
    with precision("float64"):
        tensors = load_file(path.with_suffix(".safetensors"))
        params = convert.from_reference("sd_vae", tensors, config, dtype="float64")
        mean, std = np.array(config.latents_mean), np.array(config.latents_std)
        x0 = vae.encode(config, params, data["pixels"].astype("float64"))
        assert relative(x0 * std + mean, data["mean"]) < 1e-13
        assert relative(vae.decode(config, params, (data["latents"] - mean) / std), data["decoded"]) < 1e-13
    assert values.items() <= names.described(config, "diffusers").items()
    back = convert.to_reference("sd_vae", params, config, "diffusers")
    assert_trees_equal({name: array.astype(np.float32) for name, array in back.items()}, tensors)


def test_frames_are_images_of_their_own_whatever_the_tiles():
    params = jax.tree.map(np.asarray, tiny.random_params(init, TINY))
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 4, 8, 3)).astype(np.float32)
    x0 = vae.encode(TINY, params, pixels)
    assert x0.shape == (1, 3, 2, 4, 4)
    assert relative(vae.encode(TINY, params, pixels[:, 1:2]), x0[:, 1:2]) < 1e-5
    assert relative(vae.decode(TINY, params, x0, tile=8), vae.decode(TINY, params, x0)) < 1e-6


@pytest.mark.smoke
def test_the_published_sizes_have_as_many_numbers_as_the_real_one_and_both_names_of_attention():
    config = PUBLISHED["sd-vae-ft-mse"]
    assert sum(map(math.prod, convert.shapes_of("sd_vae", config).values())) == 83_653_863
    entries = convert.entries("sd_vae", config)["diffusers"]
    earlier = {first: alias for alias, first in names.ALIASES.items()}
    assert len(earlier) == 16 and earlier.keys() <= entries.keys()
    abstract = {earlier.get(n, n): jax.ShapeDtypeStruct(entry.shape, np.float32) for n, entry in entries.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in abstract
    assert convert.recognise("sd_vae", abstract, config) == "diffusers"
    with pytest.raises(ValueError, match="no sd_vae of this config"):
        convert.recognise("sd_vae", abstract, TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(block_out_channels=(4, 9)), r"\(4, 9\) must be multiples of norm_num_groups 2"),
        (dict(layers_per_block=0), "layers_per_block is 0"),
        (dict(latents_std=(1.0, 1.0, 1.0, 0.0)), r"latents_std\[3\] is 0.0"),
        (dict(latent_channels=3), "latent_channels = 3 numbers each"),
        (dict(dtype="float8"), "dtype is 'float8': it must be one of"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match="height 5 must be a multiple of 2: nearest are 4 and 6"):
        vae.encode(TINY, {"encoder": {}}, np.zeros((1, 1, 5, 4, 3), np.float32))

"""The video autoencoder: the reference's numbers, chunks against the whole, and what it refuses."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.models.wan_vae import LATENT_MEAN, LATENT_STD, PUBLISHED, WanVAEConfig, init
from rcm_jax.parallel.sharding import MeshConfig, make_mesh, partition_spec
from tests.tiny import cases, relative, stem
from tests.wan import precision
from tests.wan_vae import TINY, in_chunks, input_sets, normal, random_params, recorded_network, recorded_set, step

replace = dataclasses.replace


# --- Recorded values


@pytest.mark.golden
@pytest.mark.parametrize(("path", "prefix"), input_sets(), ids=lambda value: stem(value).strip("_"))
def test_whole_videos_are_those_of_the_reference(path, prefix):
    """In float64; in float32 and by chunks in tests/test_vae.py. Reached 1e-15 and 2e-15: rounding."""
    found = recorded_set(path, prefix)
    mean, std = np.asarray(LATENT_MEAN), np.asarray(LATENT_STD)
    with precision("float64"):
        config, params = recorded_network(path, "float64")
        mu, _ = step(config, "encoder")(params, found["pixels"].astype("float64"), {})
        assert mu.dtype == "float64"
        assert relative((mu - mean) / std, found["latent_f64"]) < 1e-13
        assert relative(mu, found["latent_unnormalised"]) < 5e-6  # recorded in float32 alone
        for source, decoded in (("latent_f64", "recon_f64"), ("rand_latent", "rand_latent_decoded_f64")):
            pixels, _ = step(config, "decoder")(params, found[source].astype("float64") * std + mean, {})
            assert relative(pixels, found[decoded]) < 1e-13, decoded


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("wan_vae/*.npz"), ids=stem)
def test_the_statistics_of_the_latents_are_the_recorded_ones(path):
    data = np.load(path)
    np.testing.assert_array_equal(np.float32(LATENT_MEAN), data["latent_mean"])
    np.testing.assert_array_equal(np.float32(LATENT_STD), data["latent_std"])


# --- Chunks


def test_chunks_of_any_length_are_encoded_as_the_whole_video_is():
    """Those of rcm_jax.media.vae are in tests/test_vae.py."""
    x, params = normal(1, 17, 16, 8, 3), random_params()
    whole = in_chunks(TINY, "encoder", params, x, [17])
    assert whole.shape == (1, 5, 2, 1, 16)
    assert relative(in_chunks(TINY, "encoder", params, x, [5, 12]), whole) < 3e-6


def test_chunks_of_any_length_are_decoded_as_the_whole_video_is():
    x, params = normal(1, 5, 2, 1, 16), random_params()
    whole = in_chunks(TINY, "decoder", params, x, [5])
    assert whole.shape == (1, 17, 16, 8, 3)
    assert relative(in_chunks(TINY, "decoder", params, x, [2, 3]), whole) < 3e-6


def test_a_narrow_dtype_computes_nearly_the_same_and_comes_out_in_float32():
    x, params = normal(1, 5, 16, 8, 3), random_params()
    narrow = in_chunks(replace(TINY, dtype="bfloat16"), "encoder", params, x, [5])
    assert narrow.dtype == jnp.float32
    assert 1e-4 < relative(narrow, in_chunks(TINY, "encoder", params, x, [5])) < 0.1


# --- Parameters


def test_every_parameter_has_known_axes_and_every_large_one_is_split():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, seq=2))
    boxed = jax.eval_shape(lambda key: init(PUBLISHED["wan2.1-vae"], key), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    for path, leaf in leaves:
        spec = partition_spec(leaf.names, leaf.value.shape, mesh)
        assert any(spec) or 4 * math.prod(leaf.value.shape) <= 2**15, path


# --- What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim_mult=[1, 2]), r"dim_mult \(1, 2\) must be one number more than those of temperal"),
        (dict(dim_mult=(1, 2, 0, 3)), r"dim_mult\[2\] is 0: it must be from 1"),
        (dict(attn_scales=[0.25]), r"attn_scales is \(0.25,\): it must be \(\), for nothing else is supported"),
        (dict(dropout=0.1), "dropout is 0.1: it must be 0, for nothing else is supported"),
        (dict(dim=3), r"dim 3 times dim_mult \(2, 1, 3\) must be even"),
        (dict(num_res_blocks=0), "num_res_blocks is 0: it must be"),
        (dict(dtype="int8"), "dtype is 'int8': it must be one of"),
        (dict(z_dim=4), r"latents_mean and latents_std must be z_dim = 4 numbers each"),
        (dict(z_dim=1, latents_mean=[0.0], latents_std=[0.0]), r"latents_std\[0\] is 0.0: it must be above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_lists_of_json_make_the_same_config():
    assert (
        WanVAEConfig(dim_mult=[1, 2, 4, 4], attn_scales=[], temperal_downsample=[False, True, True]) == WanVAEConfig()
    )


@pytest.mark.parametrize(
    ("half", "shape", "message"),
    [
        ("encoder", (1, 6, 8, 8, 3), r"6 frames must be 1 \+ 4n: nearest are 5 and 9"),
        ("encoder", (1, 5, 8, 20, 3), "width 20 must be a multiple of 8: nearest are 16 and 24"),
        ("encoder", (1, 5, 4, 8, 3), "height 4 must be a multiple of 8: nearest are 8\n"),
        ("encoder", (1, 5, 8, 8, 4), r"pixels must be \[b, t, h, w, 3\], none of them 0, got"),
        ("encoder", (1, 0, 8, 8, 3), "none of them 0"),
        ("decoder", (1, 2, 1, 1, 8), r"latents must be \[b, t, h, w, 16\], none of them 0, got"),
        ("decoder", (2, 1, 1, 16), r"latents must be \[b, t, h, w, 16\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_nearest_that_do(half, shape, message):
    with pytest.raises(ValueError, match=message):
        step(TINY, half)(random_params(), jnp.zeros(shape), {})


def test_a_video_goes_on_with_four_frames_at_a_time():
    begun = {"conv_in": jnp.zeros((1, 2, 8, 8, 3))}
    with pytest.raises(ValueError, match="5 frames must be 4n: nearest are 4 and 8"):
        step(TINY, "encoder")(random_params(), jnp.zeros((1, 5, 8, 8, 3)), begun)

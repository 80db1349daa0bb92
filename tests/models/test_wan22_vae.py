"""The video autoencoder of Wan2.2: the reference's numbers, chunks against the whole, and what it refuses."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.media import vae
from rcm_jax.models.wan22_vae import PUBLISHED, Wan22VAEConfig, fold, grown, init, shrunk, unfold
from rcm_jax.parallel.sharding import MeshConfig, make_mesh, partition_spec
from tests import tiny
from tests.tiny import cases, relative, stem
from tests.wan import precision
from tests.wan22_vae import TINY, in_chunks, random_params, recorded_network, step
from tests.wan_vae import normal

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
replace = dataclasses.replace
CASES = cases("wan22_vae/*.npz")


def channels_last(array):
    return np.moveaxis(array, 1, -1)


# --- Recorded values


@pytest.mark.golden
@pytest.mark.parametrize("path", CASES, ids=stem)
def test_whole_videos_are_those_of_the_reference(path):
    """In float64. Reached 6e-16 and 3e-15: rounding."""
    data = np.load(path)
    latent, recon = channels_last(data["latent_f64"]), channels_last(data["recon_f64"])
    with precision("float64"):
        config, params = recorded_network(path, "float64")
        mean, std = np.asarray(config.latents_mean), np.asarray(config.latents_std)
        mu, _ = step(config, "encoder", params, channels_last(data["pixels"]).astype("float64"), {})
        assert mu.dtype == "float64" and relative((mu - mean) / std, latent) < 1e-13
        pixels, _ = step(config, "decoder", params, latent * std + mean, {})
        assert relative(pixels, recon) < 1e-13


@pytest.mark.golden
@pytest.mark.parametrize("path", CASES, ids=stem)
def test_videos_in_chunks_are_those_of_the_reference(path):
    """In float32, as rcm_jax.media.vae makes them. Reached 3e-7 and 2e-6."""
    data = np.load(path)
    config, params = recorded_network(path, "float32")
    latent = vae.encode(config, params, channels_last(data["pixels"]))
    assert latent.dtype == "float32" and relative(latent, channels_last(data["latent_f64"])) < 5e-6
    assert relative(vae.decode(config, params, latent), channels_last(data["recon_f64"])) < 1e-5


# --- Chunks and tiles


def test_chunks_of_any_length_are_as_the_whole_video_is():
    params, pixels, latents = random_params(), normal(1, 7, 16, 8, 3), normal(1, 4, 2, 1, 3)
    whole = in_chunks(TINY, "encoder", params, pixels, [7])
    assert whole.shape == (1, 4, 2, 1, 3)
    assert relative(in_chunks(TINY, "encoder", params, pixels, [3, 4]), whole) < 3e-6
    whole = in_chunks(TINY, "decoder", params, latents, [4])
    assert whole.shape == (1, 7, 16, 8, 3)
    assert relative(in_chunks(TINY, "decoder", params, latents, [1, 3]), whole) < 3e-6


def test_a_tile_that_covers_everything_changes_no_bit():
    x0, params = normal(1, 2, 2, 1, 3), random_params()
    whole = vae.decode(TINY, params, x0)
    np.testing.assert_array_equal(vae.decode(TINY, params, x0, tile=2), whole)
    assert whole.shape == (1, 3, 16, 8, 3)


def test_a_narrow_dtype_computes_nearly_the_same_and_comes_out_in_float32():
    x, params = normal(1, 3, 16, 8, 3), random_params()
    narrow = in_chunks(replace(TINY, dtype="bfloat16"), "encoder", params, x, [3])
    assert narrow.dtype == jnp.float32
    assert 1e-4 < relative(narrow, in_chunks(TINY, "encoder", params, x, [3])) < 0.1


# --- Shortcuts


def test_pixels_are_folded_by_colour_column_and_row():
    x = normal(1, 2, 4, 6, 3)
    folded = fold(x, 2)
    assert folded.shape == (1, 2, 2, 3, 12)
    np.testing.assert_array_equal(folded[0, 1, 1, 2, 4 * 1 + 2 * 1 + 0], x[0, 1, 2, 5, 1])
    np.testing.assert_array_equal(unfold(folded, 2), x)


def test_shortcuts_are_means_and_copies():
    x = normal(1, 3, 2, 4, 2)
    mean = shrunk(x, 2, 2, 1)
    np.testing.assert_allclose(mean[0, 0, 0, 0, 0], x[0, :1, :, :2].sum() / 16, rtol=1e-5)  # of zeros, too
    np.testing.assert_allclose(mean[0, 1, 0, 1, 0], x[0, 1:, :, 2:].mean(), rtol=1e-5)
    copies = grown(x, 2, 2, 2, start=False)
    assert copies.shape == (1, 6, 4, 8, 2)
    np.testing.assert_array_equal(copies[:, ::2, ::2, ::2], x)
    np.testing.assert_array_equal(grown(x, 2, 2, 2, start=True), copies[:, 1:])
    narrow = grown(x, 1, 2, 1, start=True)  # each channel is two of the four neighbours: a row
    np.testing.assert_array_equal(narrow[0, :, 0::2, 0::2, 0], x[0, ..., 0])
    np.testing.assert_array_equal(narrow[0, :, 1::2, 1::2, 0], x[0, ..., 1])


# --- Parameters, and what is refused


def test_every_parameter_has_known_axes_and_every_large_one_is_split():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, seq=2))
    boxed = jax.eval_shape(lambda key: init(PUBLISHED["wan2.2-vae"], key), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    for path, leaf in leaves:
        spec = partition_spec(leaf.names, leaf.value.shape, mesh)
        assert any(spec) or 4 * math.prod(leaf.value.shape) <= 2**18, path


def test_the_published_one_has_the_sizes_of_ti2v_5b():
    config = PUBLISHED["wan2.2-vae"]
    assert config.stride == (4, 16, 16) and config.z_dim == 48
    with pytest.raises(ValueError, match="width 1284 must be a multiple of 16: nearest are 1280 and 1296"):
        vae.encode(config, {}, np.zeros((1, 1, 720, 1284, 3), np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim_mult=(1, 2)), r"dim_mult \(1, 2\) must be one number more than those of temperal"),
        (
            dict(dim_mult=(1, 7, 1)),
            r"dim_mult \(1, 7, 1\): shortcuts would put 8 times dim channels into groups of 7",
        ),
        (
            dict(dim_mult=(3, 1, 1)),
            r"dim_mult \(3, 1, 1\): shortcuts would put 4 times dim channels into groups of 3",
        ),
        (dict(patch_size=0), "patch_size is 0: it must be from 1"),
        (dict(z_dim=4), r"latents_mean and latents_std must be z_dim = 4 numbers each"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Wan22VAEConfig(**dataclasses.asdict(TINY) | changes)

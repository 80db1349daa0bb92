"""Videos to latents and back, by chunks and by tiles: the reference's numbers, bounded memory, and what is refused."""

import jax
import numpy as np
import pytest

from rcm_jax.media import vae
from tests import tiny
from tests.tiny import relative, stem
from tests.wan_vae import TINY, in_chunks, input_sets, normal, random_params, recorded_network, recorded_set

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize(("path", "prefix"), input_sets(), ids=lambda value: stem(value).strip("_"))
def test_latents_and_videos_are_those_of_the_reference(path, prefix):
    """The suggested tolerances; reached 4e-7 and 7e-7."""
    found = recorded_set(path, prefix)
    config, params = recorded_network(path, "float32")
    latent = vae.encode(config, params, found["pixels"])
    assert latent.dtype == "float32" and relative(latent, found["latent_f64"]) < 5e-6
    for source, decoded in (("latent", "recon_f64"), ("rand_latent", "rand_latent_decoded_f64")):
        assert relative(vae.decode(config, params, found[source]), found[decoded]) < 1e-5, decoded


# --- Chunks


def test_a_longer_video_is_that_of_the_whole_network_at_once():
    pixels, params = normal(1, 17, 16, 8, 3), random_params()
    x0 = vae.encode(TINY, params, pixels)
    mean = x0 * np.float32(TINY.latents_std) + np.float32(TINY.latents_mean)
    assert relative(mean, in_chunks(TINY, "encoder", params, pixels, [17])) < 3e-6
    decoded = [np.asarray(chunk) for chunk in vae.decode_chunks(TINY, params, x0)]
    assert [chunk.shape for chunk in decoded] == [(1, n, 16, 8, 3) for n in (1, 4, 4, 4, 4)]
    decoded = np.concatenate(decoded, axis=1)
    assert relative(decoded, in_chunks(TINY, "decoder", params, mean, [5])) < 3e-6
    np.testing.assert_array_equal(vae.decode(TINY, params, x0), decoded)


HALVES = {
    "encode": (vae.encode, vae._encode_chunk, lambda frames: normal(1, 4 * frames - 3, 16, 8, 3), (1, 4, 16, 8, 3)),
    "decode": (vae.decode, vae._decode_chunk, lambda frames: normal(1, frames, 2, 1, 16), (1, 1, 2, 1, 16)),
}


@pytest.mark.parametrize("half", HALVES)
def test_the_memory_of_a_step_does_not_grow_with_the_video(half):
    """Every chunk after the first runs the same program, whose cache is written where it was read."""
    whole, chunk, video, shape = HALVES[half]
    params, compiled = random_params(), chunk(TINY)
    whole(TINY, params, video(2))
    programs = compiled._cache_size()
    whole(TINY, params, video(6))
    assert compiled._cache_size() == programs
    params = params[f"{half}r"]
    _, cache = jax.eval_shape(compiled, params, video(1), {})
    begun = compiled.lower(params, normal(*shape), cache)
    assert jax.tree.map(lambda leaf: leaf.shape, begun.out_info[1]) == jax.tree.map(lambda leaf: leaf.shape, cache)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert begun.compile().memory_analysis().alias_size_in_bytes == held


def test_frames_go_to_the_device_and_come_back_one_chunk_at_a_time():
    taken = []

    class Watched(np.ndarray):
        def __getitem__(self, item):
            taken.append(item[1])
            return np.asarray(super().__getitem__(item))

    chunks = vae.decode_chunks(TINY, random_params(), normal(1, 3, 2, 1, 16).view(Watched))
    assert taken == []
    next(chunks)
    assert taken == [slice(0, 1)]
    next(chunks)
    assert taken == [slice(0, 1), slice(1, 2)]


# --- Tiles


def test_a_tile_that_covers_everything_changes_no_bit():
    x0, params = normal(1, 2, 2, 1, 16), random_params()
    whole = vae.decode(TINY, params, x0)
    pixels = np.clip(whole, -1, 1)
    for tile, overlap in ((2, None), (2, 1), (7, 3)):
        np.testing.assert_array_equal(vae.decode(TINY, params, x0, tile=tile, overlap=overlap), whole)
        x0_again = vae.encode(TINY, params, pixels, tile=tile, overlap=overlap)
        np.testing.assert_array_equal(x0_again, vae.encode(TINY, params, pixels))


def enlarged(x):
    """A decoder of which no place depends on another: nearest neighbours, frame by frame."""
    for i in range(x.shape[1]):
        yield x[:, i : i + 1].repeat(8, axis=2).repeat(8, axis=3)


def averaged(x):
    """An encoder of the same kind."""
    b, t, h, w, c = x.shape
    for i in range(t):
        yield x[:, i : i + 1].reshape(b, 1, h // 8, 8, w // 8, 8, c).mean(axis=(3, 5))


@pytest.mark.parametrize(("tile", "overlap"), [(1, 0), (2, 0), (2, 1), (3, 1), (4, None), (5, 4), (6, 2), (20, None)])
def test_the_shares_of_tiles_sum_to_one_everywhere(tile, overlap):
    x = normal(1, 3, 5, 13, 2).astype(np.float64)
    large = np.concatenate(list(enlarged(x)), axis=1)
    decoded = vae._blend(enlarged, x, np.zeros_like(large), tile, overlap)
    np.testing.assert_allclose(decoded, large, rtol=0, atol=1e-14)
    np.testing.assert_allclose(vae._blend(averaged, large, np.zeros_like(x), tile, overlap), x, rtol=0, atol=1e-14)


def test_neighbouring_tiles_are_blended_linearly():
    (start, first), (next_start, second) = vae._tiles(size=6, tile=4, overlap=2, scale=2)
    assert (start, next_start) == (0, 4)
    np.testing.assert_allclose(first, [1, 1, 1, 1, 7 / 8, 5 / 8, 3 / 8, 1 / 8], rtol=1e-15)
    np.testing.assert_allclose(second, first[::-1], rtol=1e-15)


def test_without_attention_only_what_is_near_a_border_of_a_tile_changes():
    """A place of this decoder sees at most 14 rows and columns of latents around it; that is all that tiles may cut."""
    x0, params = normal(1, 1, 1, 48, 16), jax.tree.map(lambda leaf: leaf, random_params())
    attention = params["decoder"]["middle_attention"]
    attention["out"] = jax.tree.map(np.zeros_like, attention["out"])
    whole = vae.decode(TINY, params, x0)
    tiled = vae.decode(TINY, params, x0, tile=32, overlap=16)
    sides, middle = np.r_[0 : 8 * 16, 8 * 32 : 8 * 48], np.r_[8 * 16 : 8 * 32]
    assert relative(tiled[:, :, :, sides], whole[:, :, :, sides]) < 3e-6
    assert 1e-4 < relative(tiled[:, :, :, middle], whole[:, :, :, middle]) < 0.5


# --- What is refused


def test_inputs_that_do_not_fit_are_refused_before_anything_runs():
    params = {}
    for shape, message in (((1, 4, 8, 8, 3), "nearest are 1 and 5"), ((1, 1, 8, 9, 3), "nearest are 8 and 16")):
        with pytest.raises(ValueError, match=message):
            vae.encode(TINY, params, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=r"floating point numbers in \[-1, 1\], got uint8: take x / 127\.5 - 1"):
        vae.encode(TINY, params, np.zeros((1, 1, 8, 8, 3), np.uint8))
    for function in (vae.decode, vae.decode_chunks):
        with pytest.raises(ValueError, match=r"latents must be \[b, t, h, w, 16\]"):
            function(TINY, params, np.zeros((1, 1, 2, 2, 4), np.float32))


@pytest.mark.parametrize(("tile", "overlap"), [(0, None), (-2, None), (3, 3), (3, -1)])
def test_tiles_that_cannot_be_blended_are_refused(tile, overlap):
    with pytest.raises(ValueError, match=f"tile {tile} must be above 0, and overlap .* from 0 up to, not including"):
        vae.decode(TINY, random_params(), normal(1, 1, 2, 2, 16), tile=tile, overlap=overlap)

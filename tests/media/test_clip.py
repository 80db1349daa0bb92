"""Frames to features of CLIP: the reference's resizing and normalising, and any number of frames at once."""

import numpy as np
import pytest

from rcm_jax.media.clip import MEAN, STD, clip_features, clip_pixels
from tests import tiny
from tests.clip_vision import TINY, golden_config, golden_params, random_params
from tests.tiny import cases, relative, stem

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("clip_vision/*.npz"), ids=stem)
def test_pixels_and_features_are_those_of_the_reference(path):
    """Larger, smaller and of the very size; reached 0 and 3e-7."""
    data, config = np.load(path), golden_config(path)
    sizes = [name.removeprefix("frames_") for name in data if name.startswith("frames_")]
    assert len(sizes) > 1
    params = golden_params(path, config)
    for size in sizes:
        frames = data[f"frames_{size}"]
        pixels = np.stack([clip_pixels(frame, config.image_size) for frame in frames])
        assert pixels.dtype == np.float32
        assert relative(pixels, data[f"pixels_{size}"]) < 2e-7, size
        assert relative(clip_features(config, params, frames), data[f"features_{size}"]) < 5e-6, size


def test_a_frame_of_the_size_asked_for_is_only_normalised_and_a_plain_one_stays_plain():
    frame = np.random.default_rng(0).uniform(-1, 1, (28, 28, 3))
    np.testing.assert_allclose(clip_pixels(frame, 28), (frame / 2 + 0.5 - MEAN) / STD, rtol=1e-5, atol=1e-6)
    grey = clip_pixels(np.zeros((30, 517, 3)))
    assert grey.shape == (224, 224, 3)
    np.testing.assert_allclose(grey, np.broadcast_to((0.5 - np.array(MEAN)) / STD, grey.shape), rtol=1e-5, atol=1e-6)


def test_features_of_a_frame_do_not_depend_on_the_others():
    frames = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    both = clip_features(TINY, random_params(), frames)
    assert (both.shape, both.dtype) == ((2, 257, 8), np.float32)
    alone = clip_features(TINY, random_params(), frames[1:])
    np.testing.assert_allclose(both[1:], alone, rtol=1e-5, atol=1e-6)
    assert relative(both[:1], alone) > 1e-2


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (0, 4, 3)])
def test_what_is_no_frame_is_refused(shape):
    with pytest.raises(ValueError, match=r"a frame must be \[H, W, 3\], none of them 0, got"):
        clip_pixels(np.zeros(shape))

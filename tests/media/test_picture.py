"""Grids of images and PNG files."""

import imageio.v3 as imageio
import numpy as np
import pytest

from rcm_jax.media.picture import grid, save_png


def test_layout():
    images = np.linspace(0, 1, 5)[:, None, None, None] * np.ones((5, 2, 3, 1))
    picture = grid(images, 3, upscale=2, separator=1, background=0.2)
    assert picture.shape == (1 + 2 * 5, 1 + 3 * 7, 1) and picture.dtype == np.uint8
    for i, value in enumerate((0, 64, 128, 191, 255)):
        top, left = 1 + i // 3 * 5, 1 + i % 3 * 7
        assert (picture[top : top + 4, left : left + 6] == value).all()
    assert (picture[[0, 5, 10]] == 51).all() and (picture[:, [0, 7, 14, 21]] == 51).all()
    assert (picture[6:, 15:] == 51).all()  # the place that is left over


def test_enlarging_repeats_pixels_and_colour_stays():
    image = np.random.default_rng(0).uniform(size=(1, 4, 5, 3))
    picture = grid(image, 1, upscale=3, separator=0)
    assert picture.shape == (12, 15, 3)
    np.testing.assert_array_equal(picture[1::3, 2::3], np.round(image[0] * 255))


def test_broken_values_are_drawn():
    image = np.array([np.nan, -3, 7, np.inf]).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(grid(image, 1, separator=0)[..., 0], [[128, 0], [255, 255]])


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((4, 8, 8)), {}, r"\(4, 8, 8\), expected \[n, h, w, c\]"),
        (np.zeros((4, 8, 8, 2)), {}, "c = 1 or 3"),
        (np.zeros((4, 8, 8, 1), np.uint8), {}, "uint8, expected floats.*divide by 255"),
        (np.zeros((4, 8, 8, 1)), {"upscale": 0}, "upscale = 0"),
    ],
)
def test_bad_images(images, options, message):
    with pytest.raises(ValueError, match=message):
        grid(images, 2, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, channels), dtype=np.uint8)
    path = tmp_path / "samples" / "step_10.png"
    for _ in range(2):  # the second time over the first file
        save_png(path, picture)
        np.testing.assert_array_equal(imageio.imread(path).reshape(picture.shape), picture)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"float64.*expected uint8"):
        save_png(path, picture / 255)

"""Grids of images, points in the plane and PNG files."""

import sys

import imageio.v3 as imageio
import numpy as np
import pytest

from rcm_jax.media.picture import SERIES, captioned, figure, grid, save_png, scatter, strokes


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


def test_a_caption_stands_above_and_names_of_rows_on_the_left():
    picture = np.full((61, 301, 1), 7, np.uint8)
    page = captioned(picture, "step 12 · student", ["0", "10"])
    assert page.dtype == np.uint8 and page.shape[0] == 24 + 61 + 1 and page.shape[1] % 2 == 0 and page.shape[2] == 3
    left = page.shape[1] - 301 - page.shape[1] % 2 - (page[24, -1, 0] == 255)
    np.testing.assert_array_equal(page[24:85, left : left + 301], np.broadcast_to(picture, (61, 301, 3)))
    ink = (page != 255).any(axis=-1)
    assert ink[:24].any() and ink[24:54, :left].any() and ink[54:, :left].any()
    assert ink[24:54, :left].sum() != ink[54:, :left].sum()  # other names
    narrow = captioned(picture[:, :11], "a caption that is much wider than what it is of")
    assert narrow.shape[1] > 200 and (narrow[24:, 12:] == 255).all()


def test_light_strokes_on_black_are_told_from_other_images():
    dark = np.zeros((3, 4, 4, 1))
    assert strokes(dark) and not strokes(dark + 0.8) and not strokes(np.zeros((3, 4, 4, 3)))


def test_points_are_drawn_where_they_are_in_the_colours_of_their_classes():
    points = np.array([[0, 0], [1, 0.5], [-1, -1], [1.2, 0], [np.nan, 0]])
    image = scatter(points, np.array([0, 1, 5, 0, 0]), size=21, reach=1.0)
    drawn = {(row, column): image[row, column] for row, column in np.argwhere((image != 1).any(axis=-1)).tolist()}
    assert set(drawn) == {(10, 10), (5, 20), (20, 0)}  # up is up, and the others are left out
    for place, color in {(10, 10): SERIES[0], (5, 20): SERIES[1], (20, 0): SERIES[5 % len(SERIES)]}.items():
        assert "#" + "".join(f"{round(255 * value):02x}" for value in drawn[place]) == color
    assert grid(image[None], 1).shape == (23, 23, 3)


def test_a_density_is_shaded_under_points():
    image = scatter(np.zeros((1, 2)), [0], size=21, reach=1.0, density=lambda x: np.exp(-10 * (x[:, 1] - 0.5) ** 2))
    rows = image.mean(axis=(1, 2))
    assert rows.argmin() == 5 and rows.min() < 0.75 and rows.max() > 0.9
    assert (image[10, 10] < image[10, 9]).any()


def test_a_figure_says_how_to_install_what_draws_it(monkeypatch):
    assert figure(2, 1).get_size_inches().tolist() == [2, 1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"matplotlib is not installed: pip install 'rcm-jax\[demo\]'"):
        figure(2, 1)


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

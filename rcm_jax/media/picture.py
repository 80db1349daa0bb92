"""Pictures: grids of images and points in the plane as arrays, without matplotlib; figures with it; PNG files."""

import os
from collections.abc import Callable, Sequence

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rcm_jax.util.extras import require
from rcm_jax.util.files import write_whole

# The colours of all drawings; those in SERIES tell lines, or classes, apart.
INK, GREY, RULE, PAPER = "#1f2430", "#697180", "#d9dde3", "#ffffff"
SERIES = ("#2f5f8f", "#c4663a", "#4c8a68", "#8a68a6", "#a88a2c")
LETTERS, BAR = 13, 24  # of captions: pixels of their letters, and of the line that they stand in
SIZE, REACH = 368, 2.4  # of `scatter`: pixels, standard deviations of the data from the middle to the edge


def grid(images, columns: int, *, upscale: int = 1, separator: int = 1, background: float = 0.25) -> np.ndarray:
    """images [n, h, w, c], floats in [0, 1], c = 1 or 3 → uint8 [H, W, c], row by row, `columns` to a row.

    Every pixel becomes `upscale` × `upscale`; lines of `separator` pixels in `background` (grey, 0 to 1) run between
    the images and around them, and fill what the last row lacks. Values outside [0, 1] are clipped and NaNs drawn in
    middle grey: a picture taken while training must not end it.

    Raises:
      ValueError: another shape or dtype, columns or upscale below 1, separator below 0.
    """
    images = np.asarray(images)
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] not in (1, 3):
        raise ValueError(f"images have shape {images.shape}, expected [n, h, w, c] with n >= 1 and c = 1 or 3")
    if np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"images have dtype {images.dtype}, expected floats in [0, 1]; divide by 255 first")
    if columns < 1 or upscale < 1 or separator < 0:
        raise ValueError(f"columns = {columns} and upscale = {upscale} must be >= 1, separator = {separator} >= 0")
    pixels = _bytes(images).repeat(upscale, axis=1).repeat(upscale, axis=2)
    n, h, w, c = pixels.shape
    rows, h, w = -(-n // columns), h + separator, w + separator
    canvas = np.full((separator + rows * h, separator + columns * w, c), _bytes(np.array(background)))
    for i, image in enumerate(pixels):
        top, left = separator + i // columns * h, separator + i % columns * w
        canvas[top : top + h - separator, left : left + w - separator] = image
    return canvas


def captioned(picture, caption: str, rows: Sequence[str] = ()) -> np.ndarray:
    """picture, uint8 [H, W, 1 or 3], on paper under a line of text → uint8 [H', W', 3] with even sides.

    rows: what stands left of it, each beside one of as many parts of the same height. What is too narrow for its
    caption gets paper on the right.
    """
    picture, font = np.asarray(picture), ImageFont.load_default(LETTERS)
    height, width = picture.shape[:2]
    left = 2 * LETTERS + max(int(font.getlength(row)) for row in rows) if rows else 0
    size = max(left + width, int(font.getlength(caption)) + LETTERS), BAR + height
    page = Image.new("RGB", [side + side % 2 for side in size], PAPER)
    page.paste(Image.fromarray(np.broadcast_to(picture, (height, width, 3)).copy()), (left, BAR))
    draw = ImageDraw.Draw(page)
    draw.text((left + LETTERS // 2, BAR / 2), caption, INK, font, anchor="lm")
    for i, row in enumerate(rows):
        draw.text((left - LETTERS, BAR + (i + 0.5) * height / len(rows)), row, GREY, font, anchor="rm")
    return np.asarray(page)


def strokes(images) -> bool:
    """Whether images [n, h, w, c] in [0, 1] are light strokes on black: they read best as ink on paper, 1 − images."""
    return images.shape[-1] == 1 and bool(np.mean(images) < 0.5)


def scatter(points, labels, *, density: Callable | None = None, size: int = SIZE, reach: float = REACH) -> np.ndarray:
    """points [n, 2] as dots in the colours of their classes, labels [n]: an image [size, size, 3] in [0, 1] for `grid`.

    The middle is the origin, `reach` as far as the edges are; points beyond them, and NaNs, are left out.
    density: a function [m, 2] → [m] that is shaded behind the points.
    """
    image = np.ones((size, size, 3))
    if density is not None:
        line = np.linspace(-reach, reach, size)
        shade = density(np.stack(np.meshgrid(line, -line), axis=-1).reshape(-1, 2)).reshape(size, size, 1)
        image -= 0.35 * (shade / shade.max()) ** 0.25 * np.array([1.0, 0.9, 0.8])
    places = np.round((np.asarray(points) * [1, -1] / reach + 1) / 2 * (size - 1))
    inside = ((places >= 0) & (places < size)).all(axis=1)
    column, row = places[inside].astype(int).T
    colors = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in SERIES])
    image[row, column] = colors[np.asarray(labels)[inside] % len(SERIES)]
    return image


def encode_png(array) -> bytes:
    """array, uint8 [H, W, 1 or 3], as a PNG.

    Raises:
      ValueError: another shape or dtype.
    """
    array = np.asarray(array)
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or array.dtype != np.uint8:
        raise ValueError(f"array is {array.dtype} {array.shape}, expected uint8 [H, W, 1 or 3] as grid returns it")
    return imageio.imwrite("<bytes>", array[..., 0] if array.shape[-1] == 1 else array, extension=".png")


def save_png(path: str | os.PathLike, array) -> None:
    """Writes array, uint8 [H, W, 1 or 3], as a PNG; folders are made, and readers never see half a file.

    Raises:
      ValueError: another shape or dtype.
    """
    content = encode_png(array)
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def figure(width: float, height: float, **options):
    """An empty Figure of matplotlib, in inches; ValueError that says how to install it, for it is an extra."""
    require("matplotlib", "demo", "a drawing")
    from matplotlib.figure import Figure

    return Figure((width, height), facecolor=PAPER, **options)


def save_figure(path: str | os.PathLike, drawn) -> None:
    """Writes what is drawn on a `figure` as a PNG; folders are made, and readers never see half a file."""
    write_whole(path, lambda temporary: drawn.savefig(temporary, format="png"))


def _bytes(x: np.ndarray) -> np.ndarray:
    """[0, 1] → 0..255, rounded; NaN → 128."""
    x = np.nan_to_num(x.astype(np.float32), nan=0.5, posinf=1, neginf=0)
    return np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)

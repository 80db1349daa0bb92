"""Images as conditions: what a network of image to video is told of the frame with which its samples begin."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from rcm_jax import convert
from rcm_jax.media.clips import probe, read_image
from rcm_jax.media.first_frame import first_frame
from rcm_jax.models import network_of
from rcm_jax.run.pixels import open_weights

MOST_CUT = 0.1  # of an image, around its middle, before it is refused


def taken(model, shape) -> set[str]:
    """The conditions, beside text, of a network for samples of that shape."""
    return set(network_of(model).conditions(model, tuple(shape))) - {"text"}


def size_like(run: Any, image: str | os.PathLike) -> tuple[int, int]:
    """(width, height) in pixels in the shape of an image, of about the area of a run's data, as Wan's own samplers
    choose it: whole tokens, rounded down."""
    shown, (_, h, w, _), stride = probe(image), run.data.shape, run.media.vae.stride
    patch = network_of(run.model).patch(run.model)
    area, shape = h * stride[1] * w * stride[2], shown.height / shown.width

    def side(length: float, axis: int) -> int:
        unit = stride[axis] * patch[axis]
        return max(unit, int(length // unit * unit))

    return side(math.sqrt(area / shape), 2), side(math.sqrt(area * shape), 1)


def read(generator: Any, paths: Sequence[str | os.PathLike], count: int) -> UInt8[np.ndarray, "n H W 3"] | None:
    """The images of `count` prompts, one file for all or one each, in the size of the samples; None for a network that
    takes none. ValueError where there are too few or too many, or one has another shape than the samples."""
    wanted = taken(generator.run.model, generator.shape)
    if not wanted:
        if paths:
            raise ValueError(f"--image={paths[0]}: this network takes text alone")
        return None
    if len(paths) not in (1, count):
        given = f"{len(paths)} are given" if paths else "none is given"
        raise ValueError(
            f"this network makes videos that begin with an image, and {given} for {count} prompts: --image=FILE, once "
            "for all of them or once for each"
        )
    stride, (_, h, w, _) = generator.media.vae.stride, generator.shape
    size = w * stride[2], h * stride[1]
    for path in paths:
        _check_shape(path, size)
    frames = np.stack([read_image(path, size) for path in paths])
    return np.broadcast_to(frames, (count, *frames.shape[1:]))


def _check_shape(path: str | os.PathLike, size: tuple[int, int]) -> None:
    """ValueError where much of an image would be cut off."""
    shown = probe(path)
    ratio = (size[0] / size[1]) / (shown.width / shown.height)
    if (cut := 1 - min(ratio, 1 / ratio)) > MOST_CUT:
        raise ValueError(
            f"{path} has {shown.width}x{shown.height} pixels, and samples of {size[0]}x{size[1]} would cut {cut:.0%} "
            "of it off: choose a --size in its shape, leave --size out for that of the first image, or crop it first"
        )


def conditions(generator: Any, frames: UInt8[np.ndarray, "n H W 3"]) -> dict[str, np.ndarray]:
    """{name: [n, ...]}: what the network takes beside text, of the first frames; each frame that comes again is encoded
    once."""
    media, t = generator.media, generator.shape[0]
    config = media.vae
    params = convert.from_reference(convert.name_of(config), open_weights(config, generator.path("vae")), config)
    params = jax.device_put({"encoder": params["encoder"]})
    different, places = np.unique(frames, axis=0, return_inverse=True)
    known = np.stack([first_frame(config, params, one.astype(np.float32) / 127.5 - 1, t) for one in different])
    return {"y": known[places.reshape(-1)]}

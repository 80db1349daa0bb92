"""Images as conditions: what a network is told of the frames with which its samples begin."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from rcm_jax import convert
from rcm_jax.media import vae
from rcm_jax.media.clip import clip_features
from rcm_jax.media.clips import probe, read_clip, read_image
from rcm_jax.media.first_frame import first_frame
from rcm_jax.models import network_of
from rcm_jax.run.pixels import open_weights
from rcm_jax.run.samples import check_decoder

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


def read(generator: Any, paths: Sequence[str | os.PathLike], count: int) -> UInt8[np.ndarray, "n f H W 3"] | None:
    """What the videos of `count` prompts begin with, one file for all or one each, in the size of the samples: an image
    or, of networks that are given more frames, the end of a video. None for a network that is told nothing.

    ValueError where there are too few or too many, or one has another shape than the samples.
    """
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
    check_decoder(generator)
    if "clip_features" in wanted:
        open_weights(generator.media.image_encoder, generator.path("clip"))
    stride, (_, h, w, _) = generator.media.vae.stride, generator.shape
    size, known = (w * stride[2], h * stride[1]), 1 + (max(generator.known_frames, 1) - 1) * stride[0]
    frames = np.stack([_read(path, size, known, generator.media.fps) for path in paths])
    return np.broadcast_to(frames, (count, *frames.shape[1:]))


def _read(path: str | os.PathLike, size: tuple[int, int], frames: int, fps: int) -> UInt8[np.ndarray, "f H W 3"]:
    """An image or, of a video, its last frames; ValueError where it is too short or much of it would be cut off."""
    shown = probe(path)
    ratio = (size[0] / size[1]) / (shown.width / shown.height)
    if (cut := 1 - min(ratio, 1 / ratio)) > MOST_CUT:
        raise ValueError(
            f"{path} has {shown.width}x{shown.height} pixels, and samples of {size[0]}x{size[1]} would cut {cut:.0%} "
            "of it off: choose a --size in its shape, leave --size out for that of the first image, or crop it first"
        )
    if shown.seconds is None and frames == 1:
        return read_image(path, size)[None]
    if shown.seconds is None:
        raise ValueError(f"{path} is an image, and this network goes on with {frames} frames: name a video")
    start = shown.seconds - (frames - 1) / fps - 1e-3
    if start < 0:
        raise ValueError(f"{path} has {shown.seconds:.3f} s, less than the {frames} frames at {fps} per second needed")
    return read_clip(path, start, frames, fps, size)


def conditions(generator: Any, frames: UInt8[np.ndarray, "n f H W 3"]) -> dict[str, np.ndarray]:
    """{name: [n, ...]}: what the network takes beside text, of the first frames; what comes again is encoded once."""
    different, places = np.unique(frames, axis=0, return_inverse=True)
    pixels = different.astype(np.float32) / 127.5 - 1
    wanted = taken(generator.run.model, generator.shape)
    return {name: CONDITIONS[name](generator, pixels)[places.reshape(-1)] for name in sorted(wanted)}


def _encoder(generator: Any) -> Any:
    """The parameters of half the autoencoder, on the device."""
    config = generator.media.vae
    params = convert.from_reference(convert.name_of(config), open_weights(config, generator.path("vae")), config)
    return jax.device_put({"encoder": params["encoder"]})


def _y(generator: Any, pixels: np.ndarray) -> np.ndarray:
    params, t = _encoder(generator), generator.shape[0]
    return np.stack([first_frame(generator.media.vae, params, frames[0], t) for frames in pixels])


def _clip_features(generator: Any, pixels: np.ndarray) -> np.ndarray:
    config = generator.media.image_encoder
    tensors = open_weights(config, generator.path("clip"))
    params = jax.device_put(convert.from_reference(convert.name_of(config), tensors, config))
    return np.concatenate([clip_features(config, params, frames[:1]) for frames in pixels])


def _known(generator: Any, pixels: np.ndarray) -> np.ndarray:
    params = _encoder(generator)
    return np.concatenate([vae.encode(generator.media.vae, params, frames[None]) for frames in pixels])


# By the names that networks have for them: (generator, pixels [n, f, H, W, 3] in [-1, 1]) -> [n, ...].
CONDITIONS = {"y": _y, "clip_features": _clip_features, "known": _known}

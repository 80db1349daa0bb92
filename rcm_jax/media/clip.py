"""Frames to the features of CLIP that Wan2.1's image to video is told of the first frame (wan/modules/clip.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.models import IMAGE_ENCODERS
from rcm_jax.models.records import record_of

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the colours that CLIP was trained on, from 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)
CUBIC = -0.75  # the slope of torch's bicubic kernel one pixel away from its middle; that of most others is -0.5


def clip_pixels(frame: Float[Array | np.ndarray, "H W 3"], side: int = 224) -> Float[np.ndarray, "side side 3"]:
    """A frame in [-1, 1] as CLIP takes it, float32: side × side pixels whatever its shape, colours normalised.

    As torch's interpolate(mode="bicubic", align_corners=False): each new pixel is made of the 4×4 around its place, so
    large frames are not smoothed (antialias is off), and values may leave [-1, 1] a little.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"a frame must be [H, W, 3], none of them 0, got {tuple(frame.shape)}")
    rows, columns = (_bicubic(n, side) for n in frame.shape[:2])
    small = np.einsum("yh,hwc,xw->yxc", rows, np.asarray(frame, np.float64), columns, optimize=True)
    return ((small / 2 + 0.5 - MEAN) / STD).astype(np.float32)


def _bicubic(size: int, side: int) -> Float[np.ndarray, "side size"]:
    """What each of `side` pixels takes of `size`; beyond the border the last one is repeated."""
    place = (np.arange(side) + 0.5) * size / side - 0.5
    weights = np.zeros((side, size))
    for step in range(-1, 3):
        taken = np.floor(place) + step
        distance = np.abs(place - taken)
        near = (CUBIC + 2) * distance**3 - (CUBIC + 3) * distance**2 + 1
        far = CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        share = np.where(distance <= 1, near, far)
        np.add.at(weights, (np.arange(side), np.clip(taken, 0, size - 1).astype(int)), share)
    return weights


def clip_features(config, params, frames: Float[Array | np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b k width"]:
    """The condition clip_features of Wan2.1's image to video, float32: of the published encoder [b, 257, 1280].

    Args:
      config: of an encoder in IMAGE_ENCODERS.
      params: its parameters; what is on the host goes to the device once.
      frames: in [-1, 1], of any size.
    """
    pixels = np.stack([clip_pixels(frame, config.image_size) for frame in frames])
    return np.asarray(_apply(config)(params, pixels), np.float32)


@functools.cache
def _apply(config):
    """Compiled (params, normalised images) -> features."""
    module = record_of(IMAGE_ENCODERS, config).module(config)
    return jax.jit(lambda params, images: module.apply({"params": params}, jnp.asarray(images, config.dtype)))

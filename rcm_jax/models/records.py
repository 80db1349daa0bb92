"""What each module of this folder exports of itself: all that the rest must know of a network, in one record."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

NONE: Mapping[str, Any] = MappingProxyType({})


class Network(NamedTuple):
    """A diffusion network: module(config) is applied to (x [b, *shape], its own time [b], **conditions)."""

    config: type
    module: type[nn.Module]
    conditions: Callable[[Any, tuple], dict[str, jax.ShapeDtypeStruct]]  # (config, shape of x) -> those of one sample
    smallest: Callable[[Any], tuple]  # config -> a shape of x that it takes; parameters depend on no other
    patch: Callable[[Any], Any] = lambda config: None  # frames, rows, columns of latents in a token; None: no tokens
    known_frames: Callable[[Any], int] = lambda config: 0  # given before x as the condition "known"
    parametrization: str = "trigflow"  # what it predicts unless a config says otherwise; rcm_jax.method.denoiser
    time_scale: float = 1.0  # it is given time_scale × its own time
    adapted: tuple[str, ...] = ()  # modules that have adapters unless a config names others; (): none of it can
    optional: tuple[str, ...] = ()  # conditions that it can do without: "guidance", "dropout"
    normalised: Callable[[Any], Any] | None = None  # parameters -> those that a training step starts from
    published: Mapping[str, Any] = NONE


def known_condition(frames: int, shape) -> dict[str, jax.ShapeDtypeStruct]:
    """{"known": of one sample} for a network that is given so many frames [k, h, w, c] before x [t, h, w, c], or {}."""
    return {"known": jax.ShapeDtypeStruct((frames, *shape[1:]), np.float32)} if frames else {}


def check_known(frames: int, x, known) -> None:
    """ValueError unless known is the so many frames [b, k, h, w, c] before x [b, t, h, w, c], or None for 0."""
    wanted, found = (x.shape[0], frames, *x.shape[2:]) if frames else None, None if known is None else known.shape
    if wanted != found:
        raise ValueError(f"known must be {wanted}, the frames before x, got {found}")


class TextEncoder(NamedTuple):
    """module(config) is applied to (tokens [b, l], mask [b, l]): embeddings [b, l, width(config)]."""

    config: type
    module: type[nn.Module]
    width: Callable[[Any], int]
    tokens: Callable[[Any], int]  # how many there are
    published: Mapping[str, Any] = NONE


class ImageEncoder(NamedTuple):
    """module(config) is applied to normalised images [b, h, w, 3]: features [b, tokens of the config, its width]."""

    config: type
    module: type[nn.Module]
    published: Mapping[str, Any] = NONE


class Autoencoder(NamedTuple):
    """Both halves are applied to (chunk of a video, cache) and return (chunk, cache).

    check_pixels(config, shape) and check_latents(config, shape) raise ValueError for what cannot be.
    """

    config: type
    encoder: type[nn.Module]
    decoder: type[nn.Module]
    check_pixels: Callable
    check_latents: Callable
    published: Mapping[str, Any] = NONE


def record_of(table: Mapping, config):
    """The record of a config in a table of records; ValueError if there is none."""
    for record in table.values():
        if record.config is type(config):
            return record
    raise ValueError(f"{type(config).__name__} is of none of {', '.join(table)}: it has no line in that table")

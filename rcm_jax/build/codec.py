"""What the autoencoder does for a set besides making it: the round trip of the official runs, and contact sheets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rcm_jax import convert
from rcm_jax.build.source import Example, Item
from rcm_jax.media import vae
from rcm_jax.media.picture import captioned, grid, save_png
from rcm_jax.run.experiment import MediaConfig
from rcm_jax.run.pixels import TIMES, frames, open_weights, with_frames

WIDTH = 320  # pixels of a frame on a sheet, at most
CAPTION = 100  # letters of a prompt


class Codec(NamedTuple):
    """An autoencoder, its parameters on the device, and how many latents a side it takes at once (None: all)."""

    media: MediaConfig
    params: Any
    tile: int | None = None


def open_codec(media: MediaConfig, path, tile: int | None = None) -> Codec:
    """From published weights; ValueError if they are others."""
    tensors = open_weights(media.vae, path)
    params = convert.from_reference(convert.name_of(media.vae), tensors, media.vae)
    return Codec(media, jax.device_put(params), tile)


def round_trip(codec: Codec, x0: np.ndarray) -> np.ndarray:
    """Latents x0 [t, h, w, c] or [h, w, c] decoded, clamped to [−1, 1] and encoded again, as the official runs do."""
    config, params, tile = codec
    one = x0.astype(np.float32).reshape(1, *with_frames(x0.shape))
    pixels = np.clip(vae.decode(config.vae, params, one, tile=tile), -1, 1)
    return np.asarray(vae.encode(config.vae, params, pixels, tile=tile)).reshape(x0.shape)


def write_sheet(codec: Codec, path, items: Sequence[Item], examples: Sequence[Example]) -> None:
    """A picture of some frames of examples, decoded, under their prompts."""
    rows = []
    for item, example in zip(items, examples, strict=True):
        video = list(frames(codec.media, codec.params, example["x0"].astype(np.float32), codec.tile))
        places = sorted({round(time * (len(video) - 1)) for time in TIMES})
        some = np.stack([video[place] for place in places]).astype(np.float32) / 255
        thin = -(-some.shape[2] // WIDTH)
        short = item.prompt[:CAPTION] + ("…" if len(item.prompt) > CAPTION else "")
        rows.append(captioned(grid(some[:, ::thin, ::thin], len(places), separator=4, background=1.0), short))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    save_png(path, np.concatenate(padded))

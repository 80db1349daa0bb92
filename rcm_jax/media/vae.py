"""Videos to latents and back with a Wan autoencoder: in chunks of frames and, if wanted, in tiles.

Device memory is that of one chunk (4 frames of pixels, 1 of latents) and of the cache, however long the video is; the
whole video stays where it is, and what comes out whole is a numpy array on the host. Compiled once for each shape of a
tile, twice because of the first chunk.

Tiles bound the memory by their size instead of the video's. They change the numbers a little: the attention at the
lowest resolution and the borders of convolutions see one tile. A tile that covers the whole video changes nothing.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.models import AUTOENCODERS
from rcm_jax.models.records import record_of

Pixels = Float[Array | np.ndarray, "b t h w 3"]
Latents = Float[Array | np.ndarray, "b t h w z_dim"]


def encode(config, params, pixels: Pixels, *, tile: int | None = None, overlap: int | None = None) -> Latents:
    """The latents x0 of videos, of unit variance by the statistics in the config; in numpy, float32 at least.

    Args:
      config: of the network.
      params: its parameters {"encoder": …}; what is on the host goes to the device once.
      pixels: in [-1, 1], t = 1 + 4n, h and w multiples of 8 (Wan2.2: 16), for x0 [b, 1 + n, h/8, w/8, z_dim]; best a
        numpy array.
      tile: most rows and columns of latents at once; None: all.
      overlap: rows and columns of latents over which neighbouring tiles are blended linearly; None: tile // 4.

    Raises:
      ValueError: sizes that cannot be encoded, with the nearest that can; pixels that are no floating point numbers.
    """
    record_of(AUTOENCODERS, config).check_pixels(config, pixels.shape)
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(f"pixels must be floating point numbers in [-1, 1], got {pixels.dtype}: take x / 127.5 - 1")
    b, t, h, w, _ = pixels.shape
    step, *units = config.stride
    params = jax.device_put(params["encoder"])

    def stream(part):
        chunks = (part[:, max(0, end - step) : end] for end in range(1, t + 1, step))
        return _stream(_encode_chunk(config), params, chunks)

    shape = (b, 1 + (t - 1) // step, h // units[0], w // units[1], config.z_dim)
    return _blend(stream, pixels, np.zeros(shape, config.wide), tile, overlap)


def decode_chunks(config, params, x0: Latents) -> Iterator[Pixels]:
    """The videos of latents x0 of unit variance, frame of latents by frame of latents.

    Yields pixels [b, 1, 8h, 8w, 3], then t − 1 times [b, 4, 8h, 8w, 3], in [-1, 1] but for what the network overshoots,
    float32 at least. They lie on the device until they are let go. ValueError for x0 of another shape.
    """
    record_of(AUTOENCODERS, config).check_latents(config, x0.shape)
    chunks = (x0[:, i : i + 1] for i in range(x0.shape[1]))
    return _stream(_decode_chunk(config), jax.device_put(params["decoder"]), chunks)


def decode(config, params, x0: Latents, *, tile: int | None = None, overlap: int | None = None) -> Pixels:
    """The whole of decode_chunks, [b, 1 + 4(t − 1), 8h, 8w, 3] in numpy; tile and overlap as in encode."""
    record_of(AUTOENCODERS, config).check_latents(config, x0.shape)
    b, t, h, w, _ = x0.shape
    step, *units = config.stride
    params = {"decoder": jax.device_put(params["decoder"])}
    shape = (b, 1 + step * (t - 1), h * units[0], w * units[1], 3)
    return _blend(functools.partial(decode_chunks, config, params), x0, np.zeros(shape, config.wide), tile, overlap)


@functools.cache
def _encode_chunk(config):
    """Compiled (params, pixels, cache) -> (x0, cache); the cache is given up."""

    def step(params, pixels, cache):
        mean, cache = record_of(AUTOENCODERS, config).encoder(config).apply({"params": params}, pixels, cache)
        return (mean - np.asarray(config.latents_mean, mean.dtype)) / np.asarray(config.latents_std, mean.dtype), cache

    return jax.jit(step, donate_argnums=2)


@functools.cache
def _decode_chunk(config):
    """Compiled (params, x0, cache) -> (pixels, cache); the cache is given up."""

    def step(params, x0, cache):
        x0 = x0.astype(config.wide)
        mean = x0 * np.asarray(config.latents_std, x0.dtype) + np.asarray(config.latents_mean, x0.dtype)
        return record_of(AUTOENCODERS, config).decoder(config).apply({"params": params}, mean, cache)

    return jax.jit(step, donate_argnums=2)


def _stream(step, params, chunks: Iterable) -> Iterator[jax.Array]:
    """What a step makes of chunks of a video, one after the other."""
    cache = {}
    for chunk in chunks:
        out, cache = step(params, chunk, cache)
        yield out


def _blend(stream, video, out: np.ndarray, tile, overlap) -> np.ndarray:
    """out (zeros) plus the chunks of stream(tile of video) for all tiles, each by its share of every place.

    Either of video and out is latents: tile and overlap are rows and columns of those.
    """
    sizes = [min(n, m) for n, m in zip(video.shape[2:4], out.shape[2:4], strict=True)]
    tile = max(sizes) if tile is None else tile
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise ValueError(f"tile {tile} must be above 0, and overlap {overlap} from 0 up to, not including, tile")
    axes = [_tiles(size, tile, overlap, scale=n // size) for size, n in zip(sizes, out.shape[2:4], strict=True)]
    for (row, down), (column, across) in itertools.product(*axes):
        places = [slice(row, row + len(down)), slice(column, column + len(across))]
        sources = [
            slice(place.start * n // m, place.stop * n // m)
            for place, n, m in zip(places, video.shape[2:4], out.shape[2:4], strict=True)
        ]
        share = np.multiply.outer(down, across)[..., None].astype(out.dtype)
        end = 0
        for chunk in stream(video[:, :, *sources]):
            start, end = end, end + chunk.shape[1]
            out[:, start:end, *places] += share * np.asarray(chunk)
    return out


def _tiles(size: int, tile: int, overlap: int, scale: int) -> list[tuple[int, np.ndarray]]:
    """(start, share of each place) of tiles of one length that cover 0..size, all times scale; shares sum to 1."""
    tile = min(tile, size)
    starts = [*range(0, size - tile, max(1, tile - overlap)), size - tile]
    ramp = np.minimum(np.arange(tile * scale) + 0.5, max(0.5, overlap * scale))
    weights = np.minimum(ramp, ramp[::-1])
    total = np.zeros(size * scale)
    for start in starts:
        total[start * scale :][: len(weights)] += weights
    return [(start * scale, weights / total[start * scale :][: len(weights)]) for start in starts]

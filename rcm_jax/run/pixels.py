"""Latents to pixels: published weights of an autoencoder, the frames that it makes, and files of them."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from rcm_jax import convert
from rcm_jax.convert.files import open_tensors
from rcm_jax.media import vae, video
from rcm_jax.media.picture import captioned, grid, save_png
from rcm_jax.models import AUTOENCODERS
from rcm_jax.models.records import record_of
from rcm_jax.run.experiment import MediaConfig
from rcm_jax.util.files import as_path

GAP = 4  # pixels between videos side by side; even, as their sides must be
TIMES = (0, 0.5, 1)  # of the frames that stand for a video
WIDTH = 1600  # of the picture of them, at most


def open_weights(config, path) -> dict:
    """The tensors of a published file or folder, not read yet; ValueError unless they are that model of that config."""
    tensors = open_tensors(path)
    convert.recognise(convert.name_of(config), tensors, config)
    return tensors


def check(media: MediaConfig | None, shape) -> None:
    """ValueError or FileNotFoundError unless media.vae_path is empty, or its weights can decode samples of that shape
    and these can be written. Nothing but names and shapes is read."""
    if media is None or not media.vae_path:
        return
    named = f"config.media.vae_path={media.vae_path}"
    if not as_path(media.vae_path).exists():
        raise FileNotFoundError(f"{named}: no such file or folder")
    try:
        open_weights(media.vae, media.vae_path)
        record_of(AUTOENCODERS, media.vae).check_latents(media.vae, (1, *with_frames(shape)))
        if suffix(shape) == ".mp4":
            video.check_video()
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from None


def read_decoder(media: MediaConfig) -> dict:
    """The parameters of the decoder at media.vae_path, in numpy: they stay on the host until they are used."""
    tensors = open_weights(media.vae, media.vae_path)
    return {"decoder": convert.from_reference(convert.name_of(media.vae), tensors, media.vae)["decoder"]}


def with_frames(shape) -> tuple[int, ...]:
    """[t, h, w, c] of the latents of a video, or [1, h, w, c] of those of an image, [h, w, c], as autoencoders want."""
    return (1, *shape) if len(shape) == 3 else tuple(shape)


def whole(x0, cond: Mapping) -> np.ndarray:
    """Latents x0 [n, t, h, w, c] behind those that were given, if there is the condition "known"."""
    return np.concatenate([cond["known"], x0], axis=1) if "known" in cond else x0


def frames(media: MediaConfig, params, x0, tile: int | None = None) -> Iterator[np.ndarray]:
    """The frames [h, w, 3] of latents x0 [t, h, w, c], or the one of [h, w, c], in 0..255: one by one, or (tile:
    latents a side) in tiles."""
    x0 = x0.reshape(with_frames(x0.shape))
    if tile is None:
        chunks = vae.decode_chunks(media.vae, params, x0[None])
    else:
        chunks = [vae.decode(media.vae, params, x0[None], tile=tile)]
    for chunk in chunks:
        pixels = np.asarray(chunk[0], np.float32)
        yield from np.round(np.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def write(path: pathlib.Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """The frames in a file, by its suffix: .mp4, or .png for one frame."""
    if path.suffix == ".mp4":
        video.write_video(path, frames, fps)
    else:
        (frame,) = frames
        save_png(path, frame)


def suffix(shape) -> str:
    """Of the file of samples of that shape, [t, h, w, c] or [h, w, c]."""
    return ".mp4" if with_frames(shape)[0] > 1 else ".png"


def first_frames(media: MediaConfig, params, cond: Mapping) -> np.ndarray | None:
    """uint8 [n, H, W, 3]: the images of which the condition "y" [n, t, h, w, c] tells; None if there is none."""
    if "y" not in cond:
        return None
    latents = cond["y"][:, :1, ..., -media.vae.z_dim :]
    return np.stack([next(iter(frames(media, params, one))) for one in latents])


def write_together(stem: pathlib.Path, media: MediaConfig, params: Mapping[str, Any], x0, caption: str, beside=None):
    """Writes latents x0 [n, t, h, w, c] or [n, h, w, c] side by side under a caption: stem.mp4 or, of one frame, .png.

    Returns (path, picture): uint8 [H, W, 3] of that frame, or of some frames with a row for each sample. They are
    decoded one after another: the device holds one, the host the pixels of all. beside: uint8 [n, H, W, 3], images that
    stand left of them.
    """
    decoded = np.stack([np.stack(list(frames(media, params, one))) for one in x0], axis=1)  # [t, n, h, w, 3]
    if beside is not None:
        decoded = np.concatenate([np.broadcast_to(beside, decoded.shape), decoded], axis=3)
    columns = int(np.ceil(np.sqrt(len(x0))))

    def page(images, columns):
        return captioned(grid(np.float32(images) / 255, columns, separator=GAP, background=1.0), caption)

    path = stem.with_suffix(suffix(x0.shape[1:]))
    write(path, (page(images, columns) for images in decoded), media.fps)
    if len(decoded) == 1:
        return path, page(decoded[0], columns)
    places = [round(time * (len(decoded) - 1)) for time in TIMES]
    thin = -(-len(places) * decoded.shape[3] // WIDTH)
    some = decoded[places].swapaxes(0, 1)[:, :, ::thin, ::thin]
    return path, page(some.reshape(-1, *some.shape[2:]), len(places))

"""Videos and images with captions as a source: clips of them, encoded by the autoencoder of an experiment."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from rcm_jax import convert
from rcm_jax.build.source import Example, Item, Source
from rcm_jax.media import vae
from rcm_jax.media.clip import clip_features
from rcm_jax.media.clips import THREADS, Footage, bucket_of, list_files, probe, read_captions, read_clip
from rcm_jax.media.first_frame import check_conditions
from rcm_jax.media.first_frame import first_frame as condition_of
from rcm_jax.models import network_of
from rcm_jax.models.clip_vision import ClipVisionConfig
from rcm_jax.models.records import known_condition
from rcm_jax.run.experiment import Experiment
from rcm_jax.run.generate import latents_shape, prompts_dataset
from rcm_jax.run.pixels import open_weights
from rcm_jax.util.files import as_path

# (shape of x0) -> its shape, and (first frame [H, W, 3] in [-1, 1]) -> its value.
Condition = tuple[Callable[[tuple], tuple], Callable[[np.ndarray], np.ndarray]]


def videos(
    run: Experiment, vae_path: str | os.PathLike, folder: str | os.PathLike, *,
    captions: str | os.PathLike | None = None, buckets: Sequence[tuple[int, int]] = (), fps: float | None = None,
    frames: int | None = None, clips: int = 1, first_frame: bool = False, tile: int | None = None,
    clip: str | os.PathLike | None = None,
) -> Source:  # fmt: skip
    """Clips of all videos and images of a folder, by path and then by time: x0 float32 and, if asked for, conditions.

    Args:
      run: what says how pixels become latents: its media, and the shape of its data.
      vae_path: published weights of the autoencoder, any layout; read when the first clip is made.
      folder: with .mp4, .png, …, also in folders below.
      captions: a table of them; None: name.txt beside each file (rcm_jax.media.clips.read_captions).
      buckets: (width, height) in pixels among which each file is put (rcm_jax.media.clips.bucket_of); (): the run's.
      fps: frames of a clip in a second; None: media.fps.
      frames: of pixels in a clip; None: as many as the run's data have. 1 takes images, and stills of videos.
      clips: most clips of a video, one after the other from its beginning, none cut short.
      first_frame: each example has y, the condition of image to video.
      tile: bounds the memory of the device, as in vae.encode.
      clip: published weights of media.image_encoder, of CLIP: each example has clip_features, of its start.

    Files that cannot be read or are too short are `bad`. ValueError for sizes that cannot be, other conditions than the
    network takes, captions that are missing or left over: those are named.
    """
    t, h, w, _ = prompts_dataset(run, None, frames).sample_shape
    media: Any = run.media
    known = network_of(run.model).known_frames(run.model)
    config, stride, place, names = media.vae, media.vae.stride, as_path(folder), list_files(folder)
    count, rate = 1 + (known + t - 1) * stride[0], media.fps if fps is None else fps
    if rate <= 0 or clips < 1:
        raise ValueError(f"fps {rate} must be above 0, and clips {clips} at least 1")
    sizes = [(width, height) for width, height in buckets] or [(w * stride[2], h * stride[1])]
    shapes = {size: latents_shape(run, size, count) for size in sizes}
    encoder = _encoder(config, vae_path)
    told = _of_first_frame(config, encoder, t, tile) if first_frame else {}
    told |= _of_clip(media.image_encoder, clip) if clip is not None else {}
    _check_brought(run.model, shapes.values(), told)
    shapes = {size: (known + shape[0], *shape[1:]) for size, shape in shapes.items()}
    prompts = dict(zip(names, read_captions(place, names, captions), strict=True))
    items, bad = [], {}
    for name, found in zip(names, _probe_all(place, names, count, rate), strict=True):
        if isinstance(found, str):
            bad[name] = found
        else:
            shape = shapes[bucket_of(found.width, found.height, sizes)]
            items += [_item(name, prompts[name], shape, found, start) for start in _starts(found, count, rate)[:clips]]

    def prepare(item: Item) -> np.ndarray:
        size = item.shape[2] * stride[2], item.shape[1] * stride[1]
        return read_clip(place / item.origin["file"], item.origin["start"], count, rate, size)

    def make(items, prepared, texts) -> list[Example]:
        pixels = prepared[0].astype(np.float32) / 127.5 - 1
        x0 = np.asarray(vae.encode(config, encoder(), pixels[None], tile=tile)[0], np.float32)
        return [{"x0": x0} | {name: value(pixels[0]) for name, (_, value) in told.items()}]

    settings = {"kind": "videos", "frames": count, "fps": rate, "clips": clips, "buckets": [list(s) for s in sizes]}
    settings |= {"first_frame": first_frame, "tile": tile, "vae": os.fspath(vae_path), "vae_bytes": _bytes(vae_path)}
    settings |= {} if clip is None else {"clip": os.fspath(clip), "clip_bytes": _bytes(clip)}
    return Source(items, settings, make, prepare, bad=bad)


def _check_brought(model, shapes, told: dict[str, Condition]) -> None:
    """ValueError unless a network takes what a set will have: known frames are the first of its x0."""
    frames = network_of(model).known_frames(model)
    for shape in shapes:
        brought = {name: leaf.shape for name, leaf in known_condition(frames, shape).items()}
        check_conditions(model, shape, brought | {name: shape_of(shape) for name, (shape_of, _) in told.items()})


def _encoder(config, path) -> Callable[[], Any]:
    """What reads the weights of an encoder, when they are needed; ValueError unless they are there and fit."""
    tensors = open_weights(config, path)

    @functools.cache
    def encoder():
        params = convert.from_reference(convert.name_of(config), tensors, config)
        return jax.device_put({"encoder": params["encoder"]} if "encoder" in params else params)

    return encoder


def _of_first_frame(config, encoder, t: int, tile: int | None) -> dict[str, Condition]:
    """The condition y of an autoencoder for t frames of latents."""
    return {
        "y": (
            lambda shape: (*shape[:-1], config.stride[0] + config.z_dim),
            lambda frame: condition_of(config, encoder(), frame, t, tile=tile),
        )
    }


def _of_clip(config: ClipVisionConfig | None, path) -> dict[str, Condition]:
    """The condition clip_features of an image encoder."""
    if config is None:
        raise ValueError(f"--clip={path}: this config has no media.image_encoder: its network takes no clip_features")
    encoder = _encoder(config, path)
    return {
        "clip_features": (
            lambda shape: (config.tokens, config.hidden_size),
            lambda frame: clip_features(config, encoder(), frame[None])[0],
        )
    }


def _item(name: str, prompt: str, shape: tuple[int, ...], found: Footage, start: float) -> Item:
    key = name if found.seconds is None else f"{name}@{start:.3f}s"
    return Item(key, prompt, shape, {"file": name, "start": start})


def _bytes(path: str | os.PathLike) -> int:
    """Of a file, or of those in a folder."""
    given = epath.Path(path)
    return sum(file.stat().length for file in (given.iterdir() if given.is_dir() else [given]))


def _starts(found: Footage, frames: int, fps: float) -> list[float]:
    """Seconds at which the whole clips of a file begin; the last frame of one need only begin before the end."""
    if found.seconds is None:
        return [0.0] if frames == 1 else []
    return [i * frames / fps for i in range(int(((found.seconds - 1e-3) * fps + 1) // frames))]


def _probe_all(folder, names: Sequence[str], frames: int, fps: float) -> list[Footage | str]:
    """What every file shows, or why it cannot be used: it cannot be read, or has no whole clip."""

    def look(name: str) -> Footage | str:
        try:
            found = probe(folder / name)
        except (ValueError, OSError) as error:
            return str(error)
        if _starts(found, frames, fps):
            return found
        had = "is an image" if found.seconds is None else f"has {found.seconds:.3f} s"
        needs = f"{frames} frames at {fps:g} per second take {(frames - 1) / fps:.3f} s"
        return f"{folder / name} {had}, and {needs}: take it out, or ask for fewer frames or more fps"

    with futures.ThreadPoolExecutor(THREADS) as pool:
        return list(tqdm(pool.map(look, names), "looking at files", len(names), unit="file", mininterval=1))

"""Images with classes as a source: a folder for each class, encoded by the autoencoder of an experiment."""

import functools
import os

import numpy as np

from rcm_jax.build.codec import open_codec
from rcm_jax.build.source import Example, Item, Source
from rcm_jax.media import vae
from rcm_jax.media.clips import IMAGES, list_files, read_image
from rcm_jax.run.experiment import Experiment
from rcm_jax.run.pixels import open_weights
from rcm_jax.util.files import as_path


def images(run: Experiment, vae_path: str | os.PathLike, folder: str | os.PathLike, *, batch: int = 1) -> Source:
    """All images of a folder, by path: x0 [h, w, c], the mean of their latents, float32; label [], int32.

    The folders in it are the classes, and their sorted names the labels from 0. Images are scaled and cut to the size
    of the run's data (rcm_jax.media.clips.read_image), and not flipped. `batch` of them are encoded at once.

    Files that cannot be read are skipped by the engine, or end it. ValueError for a run without an autoencoder or of
    other latents, for files that are no images or in no folder, and for another number of classes than the network's.
    """
    media, shape, place, names = run.media, tuple(run.data.shape), as_path(folder), list_files(folder)
    if media is None or len(shape) != 3 or shape[-1] != media.vae.z_dim:
        raise ValueError(
            f"latents of images have the shape [h, w, c], c = media.vae.z_dim; data.shape is {list(shape)}"
        )
    if strange := [name for name in names if "/" not in name or not name.lower().endswith(IMAGES)]:
        raise ValueError(f"{place / strange[0]} is no image in the folder of a class: take it out")
    classes = {name: label for label, name in enumerate(sorted({name.partition("/")[0] for name in names}))}
    if len(classes) != run.model.num_classes:
        raise ValueError(
            f"{folder} has {len(classes)} folders of classes, but config.model.num_classes is {run.model.num_classes}"
        )
    open_weights(media.vae, vae_path)
    codec = functools.cache(lambda: open_codec(media, vae_path))
    size = shape[1] * media.vae.stride[2], shape[0] * media.vae.stride[1]

    def item(name: str) -> Item:
        kind = name.partition("/")[0]
        return Item(name, kind, shape, {"file": name, "label": classes[kind]})

    def prepare(item: Item) -> np.ndarray:
        return read_image(place / item.origin["file"], size)

    def make(items, prepared, texts) -> list[Example]:
        full = np.arange(batch) % len(items)  # every batch is as large: one compilation
        pixels = np.stack(prepared)[full, None].astype(np.float32) / 127.5 - 1
        x0 = vae.encode(media.vae, codec().params, pixels)[: len(items), 0]
        return [
            {"x0": row, "label": np.array(item.origin["label"], np.int32)} for row, item in zip(x0, items, strict=True)
        ]

    settings = {"kind": "images", "size": list(size), "classes": list(classes), "vae": os.fspath(vae_path)}
    null = {"label": np.asarray(len(classes), np.int32)}
    return Source([item(name) for name in names], settings, make, prepare, batch=batch, uncond=null)

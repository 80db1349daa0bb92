"""What a network samples while it trains: workdir/samples/STEP.png or .mp4, and statistics of latents, as the data say.

All processes sample together, with the parameters where they are: on the mesh of the training, a few samples at a time.
The first process draws, decodes and writes.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from rcm_jax.data.dataset import Dataset, random_access
from rcm_jax.media.picture import SIZE, captioned, grid, save_png, scatter, strokes
from rcm_jax.method import samplers
from rcm_jax.parallel import distributed
from rcm_jax.parallel.sharding import batch_shards, replicated
from rcm_jax.run import latents, pixels
from rcm_jax.run.program import Program
from rcm_jax.train.console import say
from rcm_jax.train.metrics import Shown
from rcm_jax.util.files import as_path

BATCH = 400  # sampled at once
EACH, CLASSES = 8, 10  # in a grid: samples of a class; classes, at most
POINTS = 2_000  # in a scatter
WIDTH, GAP = 400, 3  # of a grid in a preview, about; of the paper between its images


def draw(sampler, params, key, labels, shape, batch: int | None = None) -> np.ndarray:
    """Samples [n, *shape] for class labels [n], so many at a time (None: BATCH); sample i depends on key, i and its
    label alone."""
    labels = np.asarray(labels, np.int32)
    size = min(batch or BATCH, len(labels))
    padded = np.pad(labels, (0, -len(labels) % size))
    parts = [
        np.asarray(sampler(params, key, np.arange(i, i + size), {"label": padded[i : i + size]}, shape))
        for i in range(0, len(padded), size)
    ]
    return np.concatenate(parts)[: len(labels)]


class Asked(NamedTuple):
    """What is sampled: n samples of a shape, for conditions {name: [n, ...]} in numpy."""

    n: int
    cond: dict
    shape: tuple[int, ...]
    at_once: int = 1  # or more, as many as the mesh needs


def asked_of(run, examples: dict, shape) -> Asked:
    """Samples for the conditions of examples of latents; of a network for less noise, from the noised examples."""
    start = {samplers.START: examples["x0"]} if run.noise_range[1] < 1 else {}
    return Asked(len(examples["x0"]), examples["cond"] | start, shape)


def draw_on_mesh(mesh, sampler, params, key, asked: Asked) -> np.ndarray:
    """Samples [n, *shape], in numpy, in every process; all must call it, with parameters on that mesh.

    Sample i depends on key, i and its conditions alone. At once are drawn at_once samples, or the next multiple of
    data × fsdp, over which they are split as a batch is; what is drawn in excess is thrown away.
    """
    shards = batch_shards(mesh)
    size = -(-asked.at_once // shards) * shards
    mine, parts = distributed.local_rows(size, mesh), []
    with jax.set_mesh(mesh):
        for start in range(0, asked.n, size):
            ids = start + mine
            rows = {name: x[ids % asked.n] for name, x in asked.cond.items()}
            batch = distributed.global_batch({"ids": ids.astype(np.uint32), "cond": rows}, size, mesh)
            x0 = sampler(params, key, batch["ids"], batch["cond"], asked.shape)
            first = jax.jit(_first, static_argnums=1, out_shardings=replicated(mesh))
            parts.append(np.asarray(first(x0, min(size, asked.n - start))))
    return np.concatenate(parts)


def _first(x, n):
    return x[:n]


def labels_by_class(dataset: Dataset, each: int) -> np.ndarray:
    """0, 0, …, 1, 1, …: `each` of every class."""
    return np.repeat(np.arange(dataset.num_classes or 0), each)


def picture(dataset: Dataset, samples, labels, columns: int = EACH, upscale: int = 4) -> np.ndarray:
    """One picture, uint8 [H, W, c], of samples [n, ...] with labels [n]: a grid of so many columns, or a scatter.

    Images that are light strokes on black are drawn as ink on paper. ValueError for data that take a decoder.
    """
    if dataset.to_image is not None:
        some = random_access(dataset.train)[np.arange(min(BATCH, len(random_access(dataset.train))))]["x0"]
        images = np.asarray(dataset.to_image(samples))
        images = 1 - images if strokes(dataset.to_image(some)) else images
        return grid(images, columns, upscale=upscale, separator=GAP, background=1.0)
    if dataset.view == "scatter":
        times = 3 if len(samples) <= POINTS // 4 else 2 if len(samples) <= POINTS else 1  # few dots are drawn large
        return grid(scatter(samples, labels, size=SIZE // times)[None], 1, upscale=times, separator=0)
    raise ValueError("these samples take a decoder to be shown: scripts/sample.py draws them")


class Preview(NamedTuple):
    """What a preview asks for, and what shows its samples: (samples, path without suffix, caption) -> Shown."""

    asked: Asked
    show: Callable[[np.ndarray, pathlib.Path, str], Shown]


def hook(program: Program, sampler: Callable, folder, caption: str, whole=lambda params: params) -> Callable:
    """What `fit` calls now and then: (state, step) -> Shown of the averaged network, None but in the first process.

    caption: what samples, and how. whole: what is averaged -> what the sampler takes. All processes must call this, and
    what it returns.
    """
    dataset, key = program.dataset, jax.random.fold_in(jax.random.key(program.run.seed), 4)
    asked, show = (_of_latents if dataset.view == "video" else _of_classes)(program)

    def preview(state, step) -> Shown | None:
        samples = draw_on_mesh(program.mesh, sampler, whole(state.ema), key, asked)
        if not distributed.first():
            return None
        return show(samples, as_path(folder) / "samples" / f"{step:08d}", f"step {step} · {caption}")

    return preview


def _of_classes(program: Program) -> Preview:
    """Samples of classes: a row of images for each of CLASSES at most, or points in the plane of all."""
    dataset, classes = program.dataset, program.dataset.num_classes or 0
    in_grid = dataset.view == "grid"
    shown = np.unique(np.linspace(0, classes - 1, min(classes, CLASSES)).astype(int)) if in_grid else range(classes)
    labels = np.repeat(shown, EACH if in_grid else POINTS // classes)
    upscale = max(1, WIDTH // (EACH * dataset.sample_shape[1])) if in_grid else 1
    names = [str(label) for label in shown] if in_grid else []

    def show(samples, stem, caption):
        drawn = captioned(picture(dataset, samples, labels, upscale=upscale), caption, names)
        save_png(stem.with_suffix(".png"), drawn)
        return Shown({"samples": drawn})

    return Preview(Asked(len(labels), {"label": labels.astype(np.int32)}, dataset.sample_shape, BATCH), show)


def _of_latents(program: Program) -> Preview:
    """Samples for a few examples of the data: their statistics and, with an autoencoder, their pixels side by side."""
    dataset, run, shape = program.dataset, program.run, program.dataset.sample_shape
    media, examples = run.media, latents.fixed(dataset, run.train.leave_out)
    asked = asked_of(run, examples, shape)
    of_data = {f"preview/{name}_of_data": value for name, value in latents.statistics(examples["x0"]).items()}
    decoder: Any = None
    if media is not None and media.vae_path:
        say(f"previews: {asked.n} samples as samples/STEP{pixels.suffix(shape)}, and statistics")
        if distributed.first():  # half a GB of its host: the file may go, and is not read again and again
            decoder = pixels.read_decoder(media)
    else:
        say("previews: statistics of latents, no pictures: config.media.vae_path names no autoencoder")

    def show(samples, stem, caption):
        values = {f"preview/{name}": value for name, value in latents.statistics(samples).items()} | of_data
        if media is None or decoder is None:
            return Shown(values=values)
        try:
            videos = pixels.whole(samples, examples["cond"])
            beside = pixels.first_frames(media, decoder, examples["cond"])
            path, drawn = pixels.write_together(stem, media, decoder, videos, caption, beside)
        except jax.errors.JaxRuntimeError as error:  # of this process alone, say no memory: training need not end
            logging.warning("no %s: %s", stem.name, str(error).splitlines()[0])
            return Shown(values=values)
        return Shown({"samples": drawn}, {"samples": path} if path.suffix == ".mp4" else {}, values)

    return Preview(asked, show)

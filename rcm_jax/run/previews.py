"""Pictures of what a network samples while it trains: workdir/samples/STEP.png, as the data say how they are shown."""

import contextlib
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from rcm_jax.data.dataset import Dataset
from rcm_jax.media.picture import SIZE, grid, save_png, scatter
from rcm_jax.parallel import distributed
from rcm_jax.run.program import Program

BATCH = 400  # sampled at once
EACH = 8  # samples of a class in a grid
POINTS = 2_000  # in a scatter


def draw(sampler, params, key, labels, shape) -> np.ndarray:
    """Samples [n, *shape] for class labels [n], BATCH at a time; sample i depends on key, i and its label alone."""
    labels = np.asarray(labels, np.int32)
    size = min(BATCH, len(labels))
    padded = np.pad(labels, (0, -len(labels) % size))
    parts = [
        np.asarray(sampler(params, key, np.arange(i, i + size), {"label": padded[i : i + size]}, shape))
        for i in range(0, len(padded), size)
    ]
    return np.concatenate(parts)[: len(labels)]


def labels_by_class(dataset: Dataset, each: int) -> np.ndarray:
    """0, 0, …, 1, 1, …: `each` of every class."""
    return np.repeat(np.arange(dataset.num_classes or 0), each)


def picture(dataset: Dataset, samples, labels, columns: int = EACH, upscale: int = 4) -> np.ndarray:
    """One picture, uint8 [H, W, c], of samples [n, ...] with labels [n]: a grid of so many columns, or a scatter.

    ValueError for data that take a decoder.
    """
    if dataset.to_image is not None:
        return grid(dataset.to_image(samples), columns, upscale=upscale)
    if dataset.view == "scatter":
        times = 1 if len(samples) > POINTS else 3  # few dots are drawn large
        return grid(scatter(samples, labels, size=SIZE // times)[None], 1, upscale=times, separator=0)
    raise ValueError("these samples take a decoder to be shown: scripts/sample.py draws them")


def shown_labels(dataset: Dataset) -> np.ndarray:
    """Of which classes a preview shows samples."""
    if dataset.view == "grid":
        return labels_by_class(dataset, EACH)
    return labels_by_class(dataset, -(-POINTS // (dataset.num_classes or 1)))


def hook(program: Program, sampler: Callable, folder) -> Callable | None:
    """What `fit` calls now and then, (state, step) -> None; None, and a word, for data that cannot be shown here.

    Of several processes the first draws.
    """
    dataset, run = program.dataset, program.run
    if dataset.view == "video":
        if distributed.first():
            logging.warning("no samples while it trains: latents take a decoder; scripts/sample.py draws them")
        return None

    def write(state, step):
        several = distributed.several()
        params = distributed.on_host(state.ema) if several else state.ema
        if not distributed.first():
            return
        key, labels = jax.random.fold_in(jax.random.key(run.seed), 4), shown_labels(dataset)
        with contextlib.nullcontext() if several else jax.set_mesh(program.mesh):
            samples = draw(sampler, params, key, labels, dataset.sample_shape)
        save_png(pathlib.Path(folder) / "samples" / f"{step:08d}.png", picture(dataset, samples, labels))

    return write

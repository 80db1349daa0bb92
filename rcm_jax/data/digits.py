"""scikit-learn's digits: 1,797 real 8×8 images of ten classes that ship with the library (no download)."""

from typing import Annotated

import numpy as np
from PIL import Image

from rcm_jax.data.dataset import Dataset
from rcm_jax.util.extras import require
from rcm_jax.util.ranges import between, config

HELD_OUT = 360


@config
class DigitsConfig:
    """The digits, larger by bicubic interpolation if `size` says so."""

    size: Annotated[int, between(8, 512)] = 8  # rows and columns; 8 are those of the images themselves


def load(config: DigitsConfig) -> Dataset:
    """1,437 training and 360 held-out images, the classes in equal parts, the same split every time.

    x0 is [size, size, 1]. Pixels 0..16 are shifted and scaled by one mean and one deviation, those of the training
    split: unit variance.
    ValueError that says how to install scikit-learn, for it is an extra.
    """
    require("sklearn", "demo", "the digits")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = _larger(pixels.reshape(-1, 8, 8).astype(np.float32) / 16, config.size)[..., None]
    parts = train_test_split(images, labels.astype(np.int32), test_size=HELD_OUT, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = map(np.asarray, parts)
    mean, std = float(train.mean()), float(train.std())
    return Dataset(
        train={"x0": (train - mean) / std, "cond": {"label": train_labels}},
        test={"x0": (test - mean) / std, "cond": {"label": test_labels}},
        uncond={"label": np.int32(10)},
        num_classes=10,
        view="grid",
        to_image=lambda x0: np.clip(np.asarray(x0) * std + mean, 0, 1),
    )


def _larger(images, size: int) -> np.ndarray:
    """[n, 8, 8] -> [n, size, size], in 0..1 as before."""
    if size == images.shape[1]:
        return images
    larger = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    return np.clip(np.stack(larger), 0, 1)

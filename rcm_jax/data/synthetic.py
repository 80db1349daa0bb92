"""Noise in the shapes of real data, without files: for benchmarks, and to see that a config runs on a machine."""

import math
from typing import Annotated

import numpy as np

from rcm_jax.data.dataset import Dataset
from rcm_jax.util.ranges import INT32, Count, Seed, Width, WidthOr0, config, some

SPREAD = 4099  # numbers between the beginnings of neighbouring examples in one long noise


@config
class SyntheticConfig:
    """So many examples of unit normal noise, the same every time (1,024 different ones), and their conditions.

    conditions: their names and shapes; (): those that the network takes. num_classes: "label" is one of so many.
    """

    shape: Annotated[tuple[Width, ...], some] = ()  # of x0, without the batch axis
    conditions: tuple[tuple[str, tuple[Width, ...]], ...] = ()
    num_classes: WidthOr0 | None = None
    examples: Count = 4096
    seed: Seed = 0

    def __post_init__(self):
        for name, shape in (("shape", self.shape), *self.conditions):
            if (size := math.prod(shape)) > INT32:
                raise ValueError(f"{name} {list(shape)} has {size:,} numbers, more than {INT32:,}")


class Noise:
    """Examples by their rows, each a part of one long noise: drawing them anew would take longer than a training step.

    What guidance replaces is zeros, or no class.
    """

    def __init__(self, config: SyntheticConfig):
        self.config = config
        longest = max(math.prod(shape) for shape in (config.shape, *dict(config.conditions).values()))
        rng = np.random.default_rng(config.seed)
        self.noise = rng.standard_normal(longest + SPREAD * min(config.examples, 1024), np.float32)

    def __len__(self):
        return self.config.examples

    def __getitem__(self, rows):
        rows = np.asarray(rows)
        cond: dict = {name: self._some(rows, shape) for name, shape in self.config.conditions if name != "label"}
        if self.config.num_classes:
            cond["label"] = (rows % self.config.num_classes).astype(np.int32)
        return {"x0": self._some(rows, self.config.shape), "cond": cond}

    def _some(self, rows, shape):
        starts = SPREAD * (rows % 1024)
        return np.stack([self.noise[start : start + math.prod(shape)].reshape(shape) for start in starts])


def load(config: SyntheticConfig) -> Dataset:
    """The examples, all for training."""
    kept = {name: np.zeros(shape, np.float32) for name, shape in config.conditions if name == "text"}
    uncond = kept | ({"label": np.int32(config.num_classes)} if config.num_classes else {})
    return Dataset(Noise(config), None, uncond, config.num_classes, view="video")

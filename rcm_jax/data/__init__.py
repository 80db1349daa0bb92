"""Data sets: one file each, with a config and a function that loads it. A new one is a file and a line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rcm_jax.data import digits, latents, mixture, synthetic, tfds
from rcm_jax.data.dataset import Dataset
from rcm_jax.data.digits import DigitsConfig
from rcm_jax.data.latents import LatentsConfig
from rcm_jax.data.mixture import MixtureConfig
from rcm_jax.data.synthetic import SyntheticConfig
from rcm_jax.data.tfds import TfdsConfig
from rcm_jax.util.config import kind_of


class Source(NamedTuple):
    """A config and what it stands for."""

    config: type
    load: Callable[[Any], Dataset]


DATASETS = {
    "digits": Source(DigitsConfig, digits.load),
    "latents": Source(LatentsConfig, latents.load),
    "mixture": Source(MixtureConfig, mixture.load),
    "synthetic": Source(SyntheticConfig, synthetic.load),
    "tfds": Source(TfdsConfig, tfds.load),
}


def load(config) -> Dataset:
    """The data set of a config in DATASETS; ValueError where what it names is not there, or does not fit."""
    return DATASETS[kind_of(DATASETS, config)].load(config)

"""Data sets: the config that names one, and the function that loads it."""

from rcm_jax.data import digits, latents, mixture
from rcm_jax.data.digits import DigitsConfig
from rcm_jax.data.latents import LatentsConfig
from rcm_jax.data.mixture import MixtureConfig

DATASETS = {DigitsConfig: digits.load, LatentsConfig: latents.load, MixtureConfig: mixture.load}

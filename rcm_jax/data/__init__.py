"""Data sets: the config that names one, and the function that loads it."""

from rcm_jax.data import digits, latents
from rcm_jax.data.digits import DigitsConfig
from rcm_jax.data.latents import LatentsConfig

DATASETS = {DigitsConfig: digits.load, LatentsConfig: latents.load}

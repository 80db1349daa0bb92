"""Data sets by name."""

from rcm_jax.data import digits

DATASETS = {"digits": digits.load}

"""Tiny U-Nets of EDM: those of the golden data, and random ones."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from rcm_jax import convert, models
from rcm_jax.convert import edm
from rcm_jax.models.edm_unet import EdmConfig, EdmUNet
from tests import tiny

# With everything that the sCM paper adds, at one resolution and at two.
SMALL = EdmConfig(
    img_resolution=4,
    label_dim=3,
    model_channels=8,
    channel_mult=(1,),
    num_blocks=1,
    attn_resolutions=(4,),
    adaptive_scale=True,
    double_norm=True,
    guidance_input=True,
)
SCM = {"img_resolution": 8, "channel_mult": (1, 2), "dropout_resolution": 4}


def golden_config(path: pathlib.Path, **changes) -> EdmConfig:
    """That of NAME.config.json."""
    return edm.config_of(json.loads(path.read_text()), **changes)


def golden_params(path: pathlib.Path, config: EdmConfig, dtype="float32") -> dict:
    """Our parameters from NAME.safetensors."""
    return convert.from_reference("edm", load_file(path), config, dtype=dtype)


def channels_last(x):
    """[b, c, h, w] of the golden data -> [b, h, w, c]."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def channels_first(x):
    """[b, h, w, c] -> [b, c, h, w] of the golden data."""
    return np.moveaxis(np.asarray(x), -1, 1)


def labels_of(one_hot):
    """Rows of one-hot labels as ours: a row of zeros is the null class."""
    return jnp.where(one_hot.any(1), one_hot.argmax(1), one_hot.shape[1])


def random_params(config: EdmConfig = SMALL, key: int = 0) -> dict:
    """Parameters of which none is zero (drawn by numpy: nothing to compile)."""
    return tiny.random_params(models.init, config, key)


def apply(config, params, x, t, label=None, **conditions):
    """The network's output."""
    return EdmUNet(config).apply({"params": params}, x, t, label, **conditions)


def inputs(config: EdmConfig = SMALL, batch: int = 2, dtype="float32"):
    """(x, t, label) for a network of that config."""
    rng = np.random.default_rng(0)
    shape = (batch, config.img_resolution, config.img_resolution, config.img_channels)
    label = jnp.arange(batch) % (config.label_dim + 1)
    return jnp.asarray(rng.normal(size=shape), dtype), jnp.linspace(0.2, 1.4, batch, dtype=dtype), label

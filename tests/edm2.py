"""Tiny EDM2 networks: those of the golden data, and a random one."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from rcm_jax import convert, models
from rcm_jax.convert import edm2
from rcm_jax.models.edm2_unet import Edm2Config, Edm2UNet
from tests import tiny

TINY = Edm2Config(
    img_resolution=8,
    img_channels=2,
    label_dim=3,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=8,
    logvar_channels=4,
    embedding_type="positional",
    double_norm=True,
    guidance_input=True,
    dropout_resolution=4,
)


def golden_case(path: pathlib.Path, dtype: str = "float32") -> tuple[Edm2Config, dict]:
    """(config, params) beside NAME.npz."""
    values = json.loads(path.with_suffix(".config.json").read_text())
    config = edm2.config_of(values | {"dtype": dtype})
    return config, convert.from_reference("edm2", load_file(path.with_suffix(".safetensors")), config, dtype=dtype)


def labels(one_hot) -> np.ndarray:
    """Ours of the reference's [b, label_dim]: a row of zeros is the null class, label_dim."""
    return np.where(one_hot.any(-1), one_hot.argmax(-1), one_hot.shape[-1]).astype(np.int32)


def apply(config, params, x, t, cond):
    return Edm2UNet(config).apply({"params": params}, x, t, **cond)


def random_params(config: Edm2Config = TINY, key: int = 0) -> dict:
    """Parameters of which none is zero."""
    return tiny.random_params(models.init, config, key)


def inputs(config: Edm2Config = TINY, batch: int = 2, key: int = 0, dtype="float32"):
    """(x [b, h, w, c], t [b], cond) for a network of that config."""
    x = np.random.default_rng(key).normal(
        size=(batch, config.img_resolution, config.img_resolution, config.img_channels)
    )
    return jnp.asarray(x, dtype), jnp.linspace(0.2, 1.4, batch, dtype=dtype), {"label": jnp.arange(batch) % 4}

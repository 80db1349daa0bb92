"""Tiny Cosmos networks: that of the golden data, and a random one."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from rcm_jax import convert, models
from rcm_jax.models.cosmos import Cosmos, CosmosConfig
from tests import tiny

TINY = CosmosConfig(
    model_channels=24,
    num_blocks=2,
    num_heads=2,
    in_channels=4,
    out_channels=4,
    crossattn_emb_channels=8,
    adaln_lora_dim=4,
)


def golden_config(path, **changes) -> CosmosConfig:
    """That of NAME.config.json."""
    return CosmosConfig(**json.loads(path.read_text()) | changes)


def golden_params(path, config, dtype="float32") -> dict:
    """Our parameters from NAME.safetensors."""
    return convert.from_reference("cosmos", load_file(path), config, dtype=dtype)


def apply(config, params, x, t, cond):
    return Cosmos(config).apply({"params": params}, x, t, **cond)


def random_params(config: CosmosConfig = TINY, key: int = 0) -> dict:
    """Parameters of which none is zero."""
    return tiny.random_params(models.init, config, key)


def inputs(config: CosmosConfig = TINY, batch: int = 2, grid=(1, 4, 6), key: int = 0):
    """(x [b, t, h, w, c], t [b] in 0..1, cond) for a network of that config."""
    rng = np.random.default_rng(key)
    x = jnp.asarray(rng.normal(size=(batch, *grid, config.out_channels)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(batch, 5, config.crossattn_emb_channels)), jnp.float32)
    return x, jnp.linspace(0.1, 0.9, batch), {"text": text}

"""Tiny image encoders: that of the golden data, and a random one for frames of any size."""

import functools
import json

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.models.clip_vision import ClipVision, ClipVisionConfig, init
from tests import tiny

TINY = ClipVisionConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)  # 257 tokens


def golden_config(path, **changes) -> ClipVisionConfig:
    """That of NAME.config.json."""
    return ClipVisionConfig(**json.loads(path.with_suffix(".config.json").read_text()) | changes)


def golden_params(path, config, dtype="float32") -> dict:
    """Our parameters from NAME.safetensors."""
    tensors = load_file(path.with_suffix(".safetensors"))
    return jax.tree.map(jnp.asarray, convert.from_reference("clip_vision", tensors, config, dtype=dtype))


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, images):
    """The features."""
    return ClipVision(config).apply({"params": params}, images)


def random_params(config: ClipVisionConfig = TINY, key: int = 0) -> dict:
    """Parameters of which none is zero."""
    return tiny.random_params(init, config, key)

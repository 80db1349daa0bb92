"""Tiny encoders: those of the golden data, and a random one."""

import dataclasses
import json

from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.models.t5 import T5Config, init
from tests import tiny

TINY = T5Config(
    vocab_size=20, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
    model_type="umt5",
)  # fmt: skip


def config_from(values: dict, **changes) -> T5Config:
    """A T5Config from golden field names: those of transformers, with its class, or of NVlabs/rcm, always umT5."""
    if "dim_attn" not in values:
        known = {field.name for field in dataclasses.fields(T5Config)}
        kind = {"T5EncoderModel": "t5", "UMT5EncoderModel": "umt5"}[values["class"]]
        return T5Config(**{key: value for key, value in values.items() if key in known} | changes, model_type=kind)
    assert not values["shared_pos"]
    return T5Config(
        vocab_size=values.get("vocab") or values["vocab_size"],
        d_model=values["dim"],
        d_kv=values["dim_attn"] // values["num_heads"],
        d_ff=values["dim_ffn"],
        num_layers=values["num_layers"],
        num_heads=values["num_heads"],
        relative_attention_num_buckets=values["num_buckets"],
        feed_forward_proj="gated-gelu",
        model_type="umt5",
        **changes,
    )


def golden_config(path, **changes) -> T5Config:
    """That of NAME.config.json."""
    return config_from(json.loads(path.read_text()), **changes)


def golden_params(path, config, dtype="float32") -> dict:
    """Our parameters from NAME.safetensors."""
    return convert.from_reference(config.model_type, load_file(path), config, dtype=dtype)


def random_params(config: T5Config = TINY, key: int = 0) -> dict:
    """Parameters of which none is zero."""
    return tiny.random_params(init, config, key)

"""Tiny video autoencoders: that of the golden data, and a random one."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.models.wan_vae import Decoder, Encoder, WanVAEConfig, init
from tests import tiny
from tests.tiny import cases

TINY = WanVAEConfig(dim=4, dim_mult=(1, 2, 1, 3), num_res_blocks=1)
NETWORKS = {"encoder": Encoder, "decoder": Decoder}


def input_sets():
    """(file, prefix of its arrays) of every recorded set."""
    last = "pixels"
    return [(p, k.removesuffix(last)) for p in cases("wan_vae/*.npz") for k in np.load(p).files if k.endswith(last)]


def recorded_set(path, prefix) -> dict:
    """The arrays of a set, channels last, under names without the prefix."""
    data = np.load(path)
    return {k.removeprefix(prefix): np.moveaxis(data[k], 1, -1) for k in data.files if k.startswith(prefix)}


def golden_config(path, **changes) -> WanVAEConfig:
    """That of NAME.config.json."""
    return WanVAEConfig(**json.loads(path.read_text()) | changes)


@functools.cache
def recorded_network(path, dtype):
    """(config, params) beside an .npz; to be used under `precision` of the dtype."""
    config = golden_config(path.with_suffix(".config.json"), dtype=dtype)
    params = convert.from_reference("wan_vae", load_file(path.with_suffix(".safetensors")), config, dtype=dtype)
    return config, jax.tree.map(jnp.asarray, params)


@functools.cache
def step(config: WanVAEConfig, half: str):
    """Compiled (params, x, cache) -> (y, cache) of a half of the network; quickly, as far as that pays."""
    options = {"xla_backend_optimization_level": int(config.dtype == "float64")}

    def call(params, x, cache):
        return NETWORKS[half](config).apply({"params": params[half]}, x, cache)

    return jax.jit(call, compiler_options=options)


def in_chunks(config, half, params, x, lengths) -> np.ndarray:
    """The network on chunks of x of so many frames, one after the other."""
    cache, end, parts = {}, 0, []
    for length in lengths:
        start, end = end, end + length
        y, cache = step(config, half)(params, x[:, start:end], cache)
        parts.append(np.asarray(y))
    assert end == x.shape[1]
    return np.concatenate(parts, axis=1)


def random_params(config: WanVAEConfig = TINY, key: int = 0) -> dict:
    """Parameters of which none is zero."""
    return tiny.random_params(init, config, key)


def normal(*shape, key: int = 0) -> np.ndarray:
    """Pixels or latents."""
    return np.random.default_rng(key).normal(size=shape).astype(np.float32)

"""Tiny video autoencoders of Wan2.2: that of the golden data, and a random one."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.models.wan22_vae import Decoder, Encoder, Wan22VAEConfig, init
from tests import tiny

TINY = Wan22VAEConfig(  # 2 frames, 8 rows and columns of pixels to one of latents
    dim=2,
    dec_dim=2,
    z_dim=3,
    dim_mult=(1, 2, 1),
    temperal_downsample=(False, True),
    num_res_blocks=1,
    latents_mean=(0.1, 0, -0.1),
    latents_std=(1, 2, 0.5),
)
NETWORKS = {"encoder": Encoder, "decoder": Decoder}


def golden_config(path, **changes) -> Wan22VAEConfig:
    """That of NAME.config.json, with the statistics of NAME.npz."""
    data, values = np.load(path.with_suffix(".npz")), json.loads(path.with_suffix(".config.json").read_text())
    stats = {f"latents_{name}": data[f"latent_{name}"].tolist() for name in ("mean", "std")}
    return Wan22VAEConfig(**values | stats | changes)


@functools.cache
def recorded_network(path, dtype):
    """(config, params) beside an .npz; to be used under `precision` of the dtype."""
    config = golden_config(path, dtype=dtype)
    params = convert.from_reference("wan22_vae", load_file(path.with_suffix(".safetensors")), config, dtype=dtype)
    return config, jax.tree.map(jnp.asarray, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(config, half: str, params, x, cache):
    """(y, cache) of a half of the network."""
    return NETWORKS[half](config).apply({"params": params[half]}, x, cache)


def in_chunks(config, half, params, x, lengths) -> np.ndarray:
    """The network on chunks of x of so many frames, one after the other."""
    cache, parts = {}, []
    for chunk in np.split(x, np.cumsum(lengths)[:-1], axis=1):
        y, cache = step(config, half, params, chunk, cache)
        parts.append(np.asarray(y))
    return np.concatenate(parts, axis=1)


def random_params(config: Wan22VAEConfig = TINY, key: int = 0) -> dict:
    """Parameters of which none is zero."""
    return tiny.random_params(init, config, key)

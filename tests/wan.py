"""Tiny Wan networks: those of the golden data, and random ones."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from rcm_jax import convert, models
from rcm_jax.method import denoiser
from rcm_jax.models.wan import Wan, WanConfig
from tests import tiny
from tests.conftest import GOLDEN

TINY = WanConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16
)

I2V = dataclasses.replace(TINY, model_type="i2v", in_dim=9)
KINDS = {"t2v": TINY, "i2v": I2V, "i2v_clip": dataclasses.replace(I2V, clip_dim=10)}


def config_from(values: dict, **changes) -> WanConfig:
    """A WanConfig from golden field names ("class" is where the data come from)."""
    return WanConfig(**{key: value for key, value in values.items() if key != "class"} | changes)


def golden_config(path: pathlib.Path, **changes) -> WanConfig:
    """That of NAME.config.json."""
    return config_from(json.loads(path.read_text()), **changes)


def golden_params(path: pathlib.Path, config: WanConfig, dtype="float32") -> dict:
    """Our parameters from NAME.safetensors."""
    return convert.from_reference("wan", load_file(path), config, dtype=dtype)


def channels_last(x):
    """[..., c, t, h, w] of the golden data -> [..., t, h, w, c]."""
    return jnp.moveaxis(jnp.asarray(x), -4, -1)


def channels_first(x):
    """[..., t, h, w, c] -> [..., c, t, h, w] of the golden data."""
    return np.moveaxis(np.asarray(x), -1, -4)


def velocity(config: WanConfig) -> denoiser.Velocity:
    """F of a Wan network, as training uses it."""

    def net(params, x, t, cond):
        return Wan(config).apply({"params": params}, x, t, **cond)

    return denoiser.from_rectified_flow(net, 1000.0)


def random_params(config: WanConfig = TINY, key: int = 0) -> dict:
    """Parameters of which none is zero (drawn by numpy: nothing to compile)."""
    return tiny.random_params(models.init, config, key)


def inputs(config: WanConfig = TINY, batch: int = 2, grid=(2, 4, 6), key: int = 0):
    """(x [b, t, h, w, c], t [b] in 0..1000, cond) for a network of that config."""
    rng = np.random.default_rng(key)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, cond = draw(batch, *grid, config.out_dim), {"text": draw(batch, config.text_len, config.text_dim)}
    if config.model_type == "i2v":
        cond["y"] = draw(batch, *grid, config.in_dim - config.out_dim)
    if config.clip_dim:
        cond["clip_features"] = draw(batch, 5, config.clip_dim)
    return x, jnp.linspace(50.0, 950.0, batch), cond


PRECISIONS = ("float32", "float64")


def precision(dtype: str) -> contextlib.AbstractContextManager:
    """float64 exists inside, if that is the dtype."""
    return tiny.x64() if dtype == "float64" else contextlib.nullcontext()


class Distillation(NamedTuple):
    """The networks of golden/rcm_losses in one precision: F of one config, three sets of parameters, conditions [b]."""

    config: WanConfig
    F: denoiser.Velocity
    student: Any
    teacher: Any
    fake_score: Any
    cond: dict
    uncond: dict


@functools.cache
def golden_distillation(dtype: str) -> Distillation:
    """Parameters, activations and times in that dtype; to be used under `precision` of it."""
    folder = GOLDEN / "rcm_losses"
    values = json.loads((folder / "meta.json").read_text())["net"]
    config = config_from(values, dtype=dtype, time_dtype=dtype)
    params = [golden_params(folder / f"{name}.safetensors", config, dtype) for name in Distillation._fields[2:5]]
    inputs = np.load(folder / "inputs.npz")
    conds = [{"text": jnp.asarray(inputs[f"crossattn_emb_{name}"], dtype)} for name in ("cond", "uncond")]
    return Distillation(config, velocity(config), *jax.tree.map(jnp.asarray, params), *conds)

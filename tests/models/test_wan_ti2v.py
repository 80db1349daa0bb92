"""The network of Wan2.2 TI2V, with a time for each frame: the reference's numbers, and one time for all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.models.wan import PUBLISHED, Wan, WanConfig
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from tests import tiny
from tests.tiny import cases, relative, stem
from tests.wan import (
    TINY,
    channels_first,
    channels_last,
    golden_config,
    golden_params,
    inputs,
    precision,
    random_params,
)

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
TI2V = dataclasses.replace(TINY, model_type="ti2v")
SETS = [
    (path, name.removesuffix("jvp_f64"))
    for path in cases("wan_ti2v/*.npz")
    for name in np.load(path).files
    if name.endswith("jvp_f64")
]
TOLERANCES = {"float64": 1e-12, "float32": 1.5e-5}  # as of the other networks; reached 4e-16 and 2e-6


@functools.partial(jax.jit, static_argnums=0)
def value_and_tangent(config, params, x, t, text, dx, dt):
    return jax.jvp(lambda x, t: Wan(config).apply({"params": params}, x, t, text), (x, t), (dx, dt))


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, x, t, text):
    return Wan(config).apply({"params": params}, x, t, text)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("path", "prefix"), SETS, ids=lambda value: stem(value).strip("_"))
def test_output_and_tangents_are_those_of_the_reference(path, prefix, dtype):
    data = np.load(path)
    with precision(dtype):
        config = golden_config(path.with_suffix(".config.json"), dtype=dtype, time_dtype=dtype)
        params = golden_params(path.with_suffix(".safetensors"), config, dtype)
        found = {name.removeprefix(prefix): jnp.asarray(data[name], dtype) for name in data if name.startswith(prefix)}
        x, dx = (channels_last(found[name]) for name in ("x", "tangent_x"))
        results = value_and_tangent(
            config, params, x, found["timesteps"], found["crossattn_emb"], dx, found["tangent_t"]
        )
    for name, value in zip(("out", "jvp"), results, strict=True):
        assert value.dtype == dtype
        assert relative(channels_first(value), data[f"{prefix}{name}_f64"]) < TOLERANCES[dtype], name


def test_one_time_for_all_frames_is_that_of_the_sample():
    x, t, cond = inputs(TI2V, grid=(3, 4, 6))
    params = random_params(TI2V)
    whole = apply(TI2V, params, x, t, cond["text"])
    each = apply(TI2V, params, x, jnp.broadcast_to(t[:, None], (2, 3)), cond["text"])
    assert relative(each, whole) < 1e-6
    other = apply(TI2V, params, x, jnp.stack([0 * t, t, t], axis=1), cond["text"])
    assert relative(other, whole) > 1e-3


def test_frames_with_times_are_split_over_devices_as_others_are():
    x, t, cond = inputs(TI2V, grid=(3, 4, 4))  # 4 tokens of a frame, 12 in all: 6 on each of two
    params, times = random_params(TI2V), jnp.stack([0 * t, t, t / 2], axis=1)
    alone = apply(TI2V, params, x, times, cond["text"])
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1, seq=2), jax.devices()[:2])):
        split = jax.jit(functools.partial(Wan(TI2V).apply, {"params": params}))(x, times, cond["text"])
    assert relative(split, alone) < 1e-6


def test_sizes_that_do_not_fit_are_refused():
    assert PUBLISHED["wan2.2-ti2v-5b"].dim // PUBLISHED["wan2.2-ti2v-5b"].num_heads == 128
    with pytest.raises(ValueError, match=r"in_dim 36 and out_dim 16 do not fit model_type 'ti2v': they are equal for"):
        WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, model_type="ti2v", in_dim=36)
    with pytest.raises(ValueError, match=r"clip_dim 8 does not fit model_type 'ti2v'"):
        dataclasses.replace(TI2V, clip_dim=8)
    x, t, cond = inputs(TI2V)
    for times in (jnp.zeros((2, 3)), jnp.zeros((1, 2)), jnp.zeros((2, 2, 1))):
        with pytest.raises(ValueError, match=r"its times t \[b\] or \[b, frames\], got \(2, 2, 4, 6, 4\) and"):
            apply(TI2V, random_params(TI2V), x, times, cond["text"])
    with pytest.raises(ValueError, match=r"model_type 'ti2v', clip_dim 0\) takes x and text(\n|$)"):
        Wan(TI2V).apply({"params": random_params(TI2V)}, x, t, cond["text"], y=x)


def test_a_known_frame_is_clean_at_time_0_and_is_not_answered():
    config = dataclasses.replace(TI2V, known_frames=1)
    x, t, cond = inputs(TI2V, grid=(3, 4, 6))
    params = random_params(TI2V)
    times = jnp.stack([0 * t, t, t], axis=1)
    whole = apply(TI2V, params, x, times, cond["text"])
    behind = Wan(config).apply({"params": params}, x[:, 1:], t, text=cond["text"], known=x[:, :1])
    np.testing.assert_allclose(behind, whole[:, 1:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"known must be \(2, 1, 4, 6, 4\), the frames before x, got None"):
        Wan(config).apply({"params": params}, x[:, 1:], t, text=cond["text"])
    with pytest.raises(ValueError, match="known_frames 1 does not fit model_type 't2v'"):
        dataclasses.replace(TINY, known_frames=1)

"""The attention of others behind our signatures: cuDNN, FlashAttention-4 (fa4-jax) and JAX's splash attention."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rcm_jax.kernels import bench, cudnn, fa4, reference, splash
from rcm_jax.kernels.implementations import IMPLEMENTATIONS
from rcm_jax.kernels.masks import BlockCausal
from tests import tiny

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

SCALE = 0.2


@functools.cache
def arrays(l=20, m=12, d=16, dtype="bfloat16"):
    """(q, k, v, dq, dk, dv, g)"""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((2, x, 3, d)), dtype) for x in (l, m, m, l, m, m, l))


def close(actual, expected, tolerance=1e-2):
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


class TestCudnn:
    def test_lowers_for_cuda_inside_shard_map(self, monkeypatch):
        stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
        monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
        mesh, spec = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
        value = functools.partial(IMPLEMENTATIONS["cudnn"].value, scale=SCALE)
        mapped = jax.jit(jax.shard_map(value, mesh=mesh, in_specs=spec, out_specs=spec))
        text = mapped.trace(*arrays()[:3]).lower(lowering_platforms=("cuda",)).as_text()
        assert "__cudnn$fmhaSoftmax" in text and "\\22fmha_scale\\22: 0.2" in text and "NO_MASK" in text

    @pytest.mark.parametrize(
        ("dtype", "mask", "message"),
        [
            ("float32", None, "takes bfloat16 and float16, got float32"),
            ("bfloat16", BlockCausal(4), "takes no mask"),
            ("bfloat16", None, "cuDNN is not detected"),
        ],
    )
    def test_refuses(self, dtype, mask, message):
        q, k, v = arrays(dtype=dtype)[:3]
        with pytest.raises(ValueError, match=message):
            cudnn.value(q, k, v, SCALE, mask)


class TestSplash:
    def test_value_and_gradients(self):
        q, k, v, *_, g = arrays(200, 300, dtype="float32")  # blocks are filled up
        value = functools.partial(splash.value, scale=SCALE, block=128, interpret=True)
        o, pull_back = jax.vjp(value, q, k, v)
        expected, lse = reference.forward(q, k, v, SCALE)
        close(o, expected, 1e-5)
        gradients = reference.backward(q, k, v, expected, lse, g, (True,) * 3, SCALE)
        for actual, wanted in zip(pull_back(g), gradients, strict=True):
            close(actual, wanted, 1e-5)

    def test_is_a_side_of_the_benchmark_on_a_tpu(self):
        device = types.SimpleNamespace(platform="tpu", device_kind="TPU v5p")
        sides = bench.sides(["blockwise"], False, device)
        assert set(sides["splash"]) == {bench.FORWARD, bench.BACKWARD}


class Stand:
    """In the place of fa4-jax: its signatures, with the formulas of the reference. Like its kernels it takes tangents
    that are arrays and an O in the dtype of q, and nothing else."""

    def fwd(self, cfg, q, k, v, aux):
        return self.fwd_lse(cfg, q, k, v, aux)[0]

    def fwd_lse(self, cfg, q, k, v, aux):
        assert (cfg.causal, cfg.local, cfg.window, cfg.mask, aux) == (False, False, (None, None), None, ())
        return reference.forward(q, k, v, cfg.scale)

    def tangent(self, cfg, q, k, v, out, lse, dq, dk, dv, aux):
        assert out.dtype == q.dtype
        return reference.tangent(q, k, v, out, lse, dq, dk, dv, cfg.scale), None

    def vjp(self, cfg, q, k, v, out, lse, d_out, d_lse, aux):
        assert out.dtype == q.dtype and d_lse is None
        return reference.backward(q, k, v, out, lse, d_out, (True,) * 3, cfg.scale)


@pytest.fixture(params=["a stand-in", "its reference"])
def fa4_jax(request, monkeypatch):
    """fa4-jax without its kernels."""
    monkeypatch.setattr(fa4, "BACKEND", "reference")
    if request.param == "its reference":
        pytest.importorskip("fa4_jax")
        return
    names = ("causal", "local", "window", "scale", "mask", "backend")
    config = lambda *values: types.SimpleNamespace(**dict(zip(names, values, strict=True)))  # noqa: E731
    attention = types.SimpleNamespace(AttnConfig=config, get_backend={"reference": Stand()}.get)
    monkeypatch.setitem(sys.modules, "fa4_jax", types.SimpleNamespace(attention=attention))
    monkeypatch.setitem(sys.modules, "fa4_jax.attention", attention)


class TestFa4:
    def test_every_pass(self, fa4_jax):
        q, k, v, dq, dk, dv, g = arrays()
        o, lse = reference.forward(q, k, v, SCALE, True)
        ours = IMPLEMENTATIONS["fa4"]
        assert not fa4.missing()
        value, (wide, rows) = ours.value(q, k, v, SCALE), ours.forward(q, k, v, SCALE, True)
        assert (value.dtype, wide.dtype, rows.dtype, rows.shape) == (q.dtype, lse.dtype, lse.dtype, lse.shape)
        close(value, o)
        close(wide, o)
        close(rows, lse, 1e-4)
        for tangents in ((dq, dk, dv), (dq, None, None)):
            do = ours.tangent(q, k, v, o, lse, *tangents, SCALE)
            close(do, reference.tangent(q, k, v, o, lse, *tangents, SCALE), 2e-2)
        for live in ((True, True, True), (True, False, False)):
            gradients = ours.backward(q, k, v, o, lse, g, live, SCALE)
            wanted = reference.backward(q, k, v, o, lse, g, live, SCALE)
            assert [x is None for x in gradients] == [not alive for alive in live]
            for actual, x in zip(gradients, wanted, strict=True):
                assert x is None or close(actual, x, 2e-2) is None

    def test_inside_shard_map(self, fa4_jax):
        mesh, spec = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
        value = functools.partial(IMPLEMENTATIONS["fa4"].value, scale=SCALE)
        mapped = jax.shard_map(value, mesh=mesh, in_specs=spec, out_specs=spec)
        q, k, v = arrays()[:3]
        close(jax.jit(mapped)(q, k, v), reference.forward(q, k, v, SCALE)[0])

    def test_refuses(self, fa4_jax, monkeypatch):
        q, k, v = arrays()[:3]
        with pytest.raises(ValueError, match="takes no mask"):
            fa4.value(q, k, v, SCALE, BlockCausal(4))
        with pytest.raises(ValueError, match="takes bfloat16 and float16, got float32"):
            fa4.forward(*(x.astype("float32") for x in (q, k, v)), SCALE)
        monkeypatch.setattr(fa4, "BACKEND", "cute")
        with pytest.raises(ValueError, match="needs an NVIDIA GPU, and JAX runs on cpu"):
            fa4.value(q, k, v, SCALE)

    def test_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fa4_jax", None)
        assert fa4.missing().endswith("pip install 'rcm-jax[fa4]', with Python 3.12 or later")
        with pytest.raises(ValueError, match="not installed"):
            fa4.value(*arrays()[:3], SCALE)

"""The Triton kernels as far as a machine without a GPU can tell: their numbers, their machine code, JAX's lowering.

What needs triton or jax-triton is skipped where they are not installed: pip install 'rcm-jax[triton]'. Lowering needs
JAX's CUDA plugin too, of JAX's own version, but no CUDA: pip install --no-deps jax-cuda12-plugin==...
"""

import functools
import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from rcm_jax.kernels import triton, triton_report
from rcm_jax.kernels.attention import flash_attention
from rcm_jax.kernels.masks import BlockCausal
from rcm_jax.kernels.workloads import WORKLOADS

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2, "float16": 2e-3}  # relative to the largest entry
COMPILED = list(itertools.product((80, 86, 90), ("cosmos_0.6b", "wan_14b")))
PRODUCTS = {"forward": 2, "forward_tangent": 6, "tangent": 5, "gradients_of_keys": 4, "gradient_of_queries": 3}


def missing(package):
    return importlib.util.find_spec(package) is None


needs_triton = pytest.mark.skipif(missing("triton"), reason="needs triton")
needs_lowering = pytest.mark.skipif(
    missing("jax_triton") or missing("jax_cuda12_plugin"), reason="needs jax-triton and jax-cuda12-plugin"
)


def shapes(workload, dtype="bfloat16"):
    """(q, k, v) of a workload."""
    w = WORKLOADS[workload]
    q = jax.ShapeDtypeStruct((w.batch, w.q_len, w.heads, w.head_dim), dtype)
    k = jax.ShapeDtypeStruct((w.batch, w.k_len, w.heads, w.head_dim), dtype)
    return q, k, k


@needs_triton
def test_numbers_in_the_interpreter():
    """In a process of its own: Triton decides at its import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    tests = "tests/kernels/test_triton_interpreted.py"
    result = subprocess.run([*command, tests], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, "all", "latest"])
@pytest.mark.parametrize(("capability", "workload"), COMPILED)
def test_nothing_spills_and_everything_fits(capability, workload, mask):
    chunk = WORKLOADS[workload].q_len // 7
    mask = {"all": BlockCausal(chunk), "latest": BlockCausal(chunk, window=3, sink=1)}.get(mask)
    rows = triton_report.report(capability, workload, "bfloat16", mask)
    assert {row.name for row in rows} >= set(PRODUCTS)
    for row in rows:
        assert row.spills == 0, row
        assert row.shared <= triton_report.SHARED_KIB[triton.gpu_of(capability)], row
        assert (row.wgmma > 0) == (capability == 90 and row.name != "delta"), row
        if capability == 90 and row.name in PRODUCTS:  # Ampere's warps may share a product and each make all of it
            made = row.step.operations * row.config.warps
            features = WORKLOADS[workload].head_dim
            assert made == PRODUCTS[row.name] * 2 * row.config.queries * row.config.keys * features, row


@pytest.fixture
def hopper(monkeypatch):
    """Programs are lowered for an H100 that is not there."""
    monkeypatch.setattr(triton, "compute_capability", lambda: 90)


def lower(function, *args):
    """The number of Triton kernels in a function lowered for CUDA, each of them compiled on the way."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("@triton_kernel_call")


@needs_lowering
@pytest.mark.usefixtures("hopper")
class TestLowering:
    attend = staticmethod(functools.partial(flash_attention, implementation="triton"))

    @pytest.mark.parametrize("workload", ["wan_14b", "cosmos_2b_cross"])
    def test_forward_tangent_and_gradients(self, workload):
        args = shapes(workload)
        assert lower(self.attend, *args) == 1
        assert lower(lambda *x: jax.jvp(self.attend, x, x)[1], *args) == 2
        assert lower(lambda q, k, v: jax.jvp(lambda q: self.attend(q, k, v), (q,), (q,)), *args) == 2
        assert lower(lambda q, *x: jax.vjp(self.attend, q, *x)[1](q), *args) == 4
        assert lower(lambda q, k, v: jax.vjp(lambda v: self.attend(q, k, v), v)[1](q), *args) == 2
        assert lower(lambda *x: triton.forward_tangent(*x, *x, 0.1), *args) == 1
        assert lower(lambda q, k, v: triton.forward_tangent(q, k, v, q, None, None, 0.1), *args) == 1

    def test_a_mask(self):
        attend = functools.partial(self.attend, mask=BlockCausal(4680, window=3, sink=1))
        args = shapes("wan_14b")
        assert lower(lambda *x: jax.jvp(attend, x, x)[1], *args) == 2
        assert lower(lambda q, *x: jax.vjp(attend, q, *x)[1](q), *args) == 4

    def test_gradient_of_jvp(self):
        def loss(x):
            f, df = jax.jvp(self.attend, x, x)
            return jnp.sum(jnp.sin(f) * jax.lax.stop_gradient(f + df))

        assert lower(jax.grad(loss), shapes("cosmos_0.6b")) >= 5

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shard_map(self, check_vma):
        mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
        spec = PartitionSpec("data", None, "seq")
        text = PartitionSpec(None, None, "seq")
        attend = jax.shard_map(self.attend, mesh=mesh, in_specs=(spec, text, text), out_specs=spec, check_vma=check_vma)
        q = jax.ShapeDtypeStruct((2, 48, 8, 64), "bfloat16")
        k = jax.ShapeDtypeStruct((1, 7, 8, 64), "bfloat16")

        def everything(q, k, v):
            o, pull_back = jax.vjp(attend, q, k, v)
            return jax.jvp(attend, (q, k, v), (q, k, v)), pull_back(o)

        assert lower(everything, q, k, k) >= 5


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU, and JAX_PLATFORMS=cuda")
class TestOnGpu:
    """JAX_PLATFORMS=cuda python -m pytest -m gpu tests/kernels"""

    SIZES = ((2, 300, 300, 3, 64), (1, 1000, 77, 2, 128), (1, 129, 200, 2, 80), (1, 1, 7, 1, 16))
    MASKED = (((2, 700, 700, 3, 64), BlockCausal(90)), ((1, 300, 900, 2, 128), BlockCausal(90, window=3, sink=1)))

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(("size", "mask"), [*((size, None) for size in SIZES), *MASKED])
    def test_against_the_reference(self, size, mask, dtype):
        b, l, m, n, d = size
        lengths = (l, m, m, l, m, m, l)
        keys = jax.random.split(jax.random.key(0), len(lengths))
        args = [jax.random.normal(key, (b, x, n, d), dtype) for key, x in zip(keys, lengths, strict=True)]

        def everything(implementation, q, k, v, dq, dk, dv, g):
            attend = functools.partial(flash_attention, mask=mask, implementation=implementation)
            return jax.jvp(attend, (q, k, v), (dq, dk, dv)), jax.vjp(attend, q, k, v)[1](g)

        run = jax.jit(everything, static_argnums=0)
        actual, expected = run("triton", *args), run("reference", *(x.astype("float32") for x in args))
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert jnp.abs(x - y).max() <= TOLERANCE[dtype] * jnp.abs(y).max()
        fused = jax.jit(lambda *x: triton.forward_tangent(*x, d**-0.5, mask))(*args[:6])
        for x, y in zip((fused[0], fused[2]), expected[0], strict=True):
            assert jnp.abs(x - y).max() <= TOLERANCE[dtype] * jnp.abs(y).max()
        again = run("triton", *args)
        assert all((x == y).all() for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(again), strict=True))


class TestInputs:
    @pytest.mark.parametrize(
        ("dtype", "features", "scale", "message"),
        [
            ("float64", 64, 1, r"take bfloat16, float16, float32, got float64: cast, or choose .*\"blockwise\""),
            ("bfloat16", 257, 1, r"take 1 to 256 features a head, got 257: choose"),
            ("bfloat16", 64, 0, r"take a scale of at least 1e-30, got 0.0: scale the queries"),
            ("bfloat16", 64, -1, r"take a scale of at least 1e-30, got -1.0"),
        ],
    )
    def test_what_the_kernels_do_not_take(self, dtype, features, scale, message):
        with jax.enable_x64(True), pytest.raises(ValueError, match=message):
            x = jnp.ones((1, 8, 2, features), dtype)
            flash_attention(x, x, x, scale=scale, implementation="triton")

    def test_old_gpus(self):
        with pytest.raises(ValueError, match=r"8\.0 \(Ampere\) or later, got 7\.5: choose"):
            triton.gpu_of(75)

    @needs_lowering
    def test_without_a_gpu(self):
        x = jnp.ones((1, 8, 2, 16))
        with pytest.raises(ValueError, match=r"need an NVIDIA GPU, and JAX finds none: choose"):
            flash_attention(x, x, x, implementation="triton")

    def test_without_jax_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "jax_triton", None)
        triton.modules.cache_clear()
        x = jnp.ones((1, 8, 2, 16))
        with pytest.raises(ValueError, match=r"needs jax-triton, .* not installed: pip install 'rcm-jax\[triton\]'"):
            flash_attention(x, x, x, implementation="triton")

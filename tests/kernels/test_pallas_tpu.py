"""The TPU kernels, interpreted on a CPU against the float64 reference, and compiled for TPUs that are not there.

test_attention.py runs them under JAX's transformations. The tests of class TestCompilation are marked slow and need
libtpu but no TPU (two processes at once need ALLOW_MULTIPLE_LIBTPU_LOAD=1, for libtpu holds a lock file):

    pip install "jax[tpu]" && python -m pytest tests/kernels/test_pallas_tpu.py -m slow -s
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rcm_jax.kernels import pallas_tpu, reference
from rcm_jax.kernels.attention import flash_attention
from rcm_jax.kernels.pallas_tpu import Tiles
from rcm_jax.kernels.workloads import WORKLOADS

TOLERANCE = {"float32": 2e-6, "bfloat16": 1.5e-2}  # relative to the largest entry
SCALE = 0.2
SHAPES = {  # b, queries, keys, n, d, tiles
    "one_tile": (2, 8, 8, 3, 16, None),
    "tiles": (1, 64, 64, 2, 64, Tiles(16, 32)),
    "ragged": (1, 37, 37, 2, 64, Tiles(16, 8)),
    "cross": (2, 41, 23, 2, 128, Tiles(8, 16)),
    "one_query": (1, 1, 19, 2, 16, Tiles(8, 8)),
    "one_key": (1, 19, 1, 2, 16, Tiles(8, 8)),
}
SUBSETS = [live for live in itertools.product((True, False), repeat=3) if any(live)]


@functools.cache
def arrays(shape, dtype):
    """(q, k, v, dq, dk, dv, g), drawn once for each shape and rounded to dtype."""
    b, l, m, n, d, _ = SHAPES[shape]
    rng = np.random.default_rng(0)
    sizes = [(b, l, n, d), (b, m, n, d), (b, m, n, d)]
    return tuple(np.asarray(rng.normal(size=size), jnp.dtype(dtype)) for size in (*sizes, *sizes, sizes[0]))


def only(xs, live):
    return tuple(x if alive else None for x, alive in zip(xs, live, strict=True))


def close(actual, expected, tolerance):
    """Compares two trees of arrays."""

    def compare(a, e):
        a, e = np.asarray(a, np.float64), np.asarray(e)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())

    jax.tree.map(compare, actual, expected)


@functools.cache
def expected_of(shape, dtype, live):
    """((o, lse), do, gradients) of the reference in float64."""
    with jax.enable_x64(True):
        q, k, v, *directions, g = (x.astype(np.float64) for x in arrays(shape, dtype))
        o, lse = reference.forward(q, k, v, SCALE)
        do = reference.tangent(q, k, v, o, lse, *only(directions, live), SCALE)
        gradients = reference.backward(q, k, v, o, lse, g, live, SCALE)
        return jax.tree.map(np.asarray, ((o, lse), do, gradients))


def kernels_of(shape, interpret=True):
    return [
        functools.partial(function, interpret=interpret, tiles=SHAPES[shape][-1])
        for function in (pallas_tpu.forward, pallas_tpu.tangent, pallas_tpu.backward, pallas_tpu.forward_tangent)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def everything(shape, live, q, k, v, dq, dk, dv, g):
    """((o, lse), do, gradients, fused (o, lse, do)) of the kernels."""
    forward, tangent, backward, forward_tangent = kernels_of(shape)
    directions = only((dq, dk, dv), live)
    o, lse = forward(q, k, v, SCALE, wide=True)
    do = tangent(q, k, v, o, lse, *directions, SCALE)
    gradients = backward(q, k, v, o, lse, g, live, SCALE)
    return (o, lse), do, gradients, forward_tangent(q, k, v, *directions, SCALE)


class TestInterpreted:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_against_the_reference(self, shape, dtype):
        live = (True, True, True)
        primal, do, gradients, fused = everything(shape, live, *arrays(shape, dtype))
        assert [x.dtype.name for x in (*primal, do, *gradients)] == ["float32", "float32", *[dtype] * 4]
        expected = expected_of(shape, dtype, live)
        close((primal, do), expected[:2], TOLERANCE[dtype])
        close(fused, (*expected[0], expected[1]), TOLERANCE[dtype])
        if shape == "one_key":  # P is 1: dS, and with it dQ and dK, is the rounding of a difference
            gradients, expected = gradients[2:], (*expected[:2], expected[2][2:])
        close(gradients, expected[2], TOLERANCE[dtype])

    def test_what_all_values_share_cancels_in_the_one_pass(self):
        """As in tests/kernels/test_attention.py. Sums of P and H from before those are rounded: 28 %."""
        q, k, v, dq, dk, dv, _ = arrays("ragged", "bfloat16")
        k, v, dq = (x + np.asarray(shift, x.dtype) for x, shift in ((k, 1), (v, 64), (dq, 1)))
        forward_tangent = functools.partial(kernels_of("ragged")[3], scale=SCALE)
        strict = {"xla_allow_excess_precision": False}  # roundings are what this is about
        do = jax.jit(forward_tangent, compiler_options=strict)(q, k, v, dq, dk, dv)[2]
        with jax.enable_x64(True):
            q, k, v, dq, dk, dv = (x.astype(np.float64) for x in (q, k, v, dq, dk, dv))
            o, lse = reference.forward(q, k, v, SCALE)
            close(do, reference.tangent(q, k, v, o, lse, dq, dk, dv, SCALE), 2e-2)

    @pytest.mark.parametrize("live", SUBSETS[1:])
    def test_any_subset_may_move(self, live):
        _, do, gradients, fused = everything("cross", live, *arrays("cross", "float32"))
        primal, *expected = expected_of("cross", "float32", live)
        assert [x is not None for x in gradients] == list(live)
        close((do, gradients), tuple(expected), TOLERANCE["float32"])
        close(fused, (*primal, expected[0]), TOLERANCE["float32"])

    def test_nothing_moves(self):
        q, k, v, *_, g = arrays("cross", "float32")
        forward, tangent, backward, forward_tangent = kernels_of("cross")
        o, lse = forward(q, k, v, SCALE)
        assert not tangent(q, k, v, o, lse, None, None, None, SCALE).any()
        assert not forward_tangent(q, k, v, None, None, None, SCALE)[2].any()
        assert backward(q, k, v, o, lse, g, (False,) * 3, SCALE) == (None, None, None)

    def test_runs_agree_bit_by_bit(self):
        args = ("ragged", (True, True, True), *arrays("ragged", "bfloat16"))
        jax.tree.map(np.testing.assert_array_equal, everything(*args), everything(*args))

    def test_large_scores(self):
        """Scores near 10⁴, where exp overflows at 89."""
        q, *rest = arrays("ragged", "float32")
        result = everything("ragged", (True, True, True), 1e3 * q, *rest)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))

    def test_the_platform_decides_by_default(self):
        q, k, v, *_ = arrays("one_tile", "float32")
        forward = jax.jit(functools.partial(pallas_tpu.forward, scale=SCALE))
        close(forward(q, k, v), expected_of("one_tile", "float32", (True,) * 3)[0], TOLERANCE["float32"])
        assert "tpu_custom_call" not in forward.lower(q, k, v).as_text()
        assert "tpu_custom_call" in forward.trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()

    @pytest.mark.parametrize(
        ("features", "dtype", "message"),
        [
            (16, "float16", r"takes bfloat16 and float32, got float16: cast"),
            (257, "float32", r"up to 256 features a head, got 257: choose implementation='blockwise'"),
        ],
    )
    def test_inputs(self, features, dtype, message):
        x = jnp.ones((1, 8, 1, features), dtype)
        with pytest.raises(ValueError, match=message):
            flash_attention(x, x, x, implementation="pallas_tpu")

    @pytest.mark.parametrize("length", [1, 127, 128, 1000, 1024, 1025, 4080, 32_760])
    def test_cut(self, length):
        count, size = pallas_tpu._cut(length, 1024)
        assert size <= 1024 and size % 128 == 0
        assert (count - 1) * size < length <= count * size

    def test_every_kernel_has_tiles_for_every_input(self):
        for rows in pallas_tpu.TILES.values():
            assert [limit for limit, _ in rows] == [256, 512, 1024]  # 1024: 256 features in float32
            assert all(tile % 128 == 0 for _, tiles in rows for tile in tiles)


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.cache
def devices_of(chip):
    """Four TPUs to compile for."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud to ask where we are
        return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


def compile_and_report(label, function, args):
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    print(
        f"{label:40} {time.perf_counter() - start:5.1f} s, MiB: temporary {memory.temp_size_in_bytes / 2**20:.1f}, "
        f"arguments {memory.argument_size_in_bytes / 2**20:.1f}, results {memory.output_size_in_bytes / 2**20:.1f}"
    )
    return compiled


PASSES = {
    "forward": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.forward(q, k, v, SCALE),
    "forward, wide": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.forward(q, k, v, SCALE, wide=True),
    "tangent": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.tangent(q, k, v, o, lse, dq, dk, dv, SCALE),
    "tangent of q": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.tangent(q, k, v, o, lse, dq, None, None, SCALE),
    "backward": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.backward(q, k, v, o, lse, q, (True,) * 3, SCALE),
    "fused": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.forward_tangent(q, k, v, dq, dk, dv, SCALE),
    "fused of q": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.forward_tangent(q, k, v, dq, None, None, SCALE),
}
COMPILED = {  # b, queries, keys, n, d, dtype
    **{
        name: (w.batch, w.q_len, w.k_len, w.heads, w.head_dim, "bfloat16")
        for name, w in WORKLOADS.items()
        if name in ("wan_14b", "wan_14b_cross", "cosmos_2b", "cosmos_0.6b")
    },
    "float32": (1, 4080, 4080, 8, 128, "float32"),
    "float32_64": (1, 4080, 4080, 8, 64, "float32"),
    "float32_256": (1, 3001, 1201, 4, 256, "float32"),
    "bfloat16_256": (1, 3001, 1201, 4, 256, "bfloat16"),
    "odd": (1, 1111, 777, 3, 96, "bfloat16"),
    "tiny": (2, 1, 19, 2, 16, "bfloat16"),
}


@pytest.mark.slow
class TestCompilation:
    @pytest.mark.parametrize("name", COMPILED)
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_kernels(self, chip, name):
        b, l, m, n, d, dtype = COMPILED[name]
        mesh = Mesh(np.array(devices_of(chip)[:1]), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec())
        q = jax.ShapeDtypeStruct((b, l, n, d), dtype, sharding=sharding)
        k = jax.ShapeDtypeStruct((b, m, n, d), dtype, sharding=sharding)
        o = jax.ShapeDtypeStruct(q.shape, "float32", sharding=sharding)
        lse = jax.ShapeDtypeStruct((b, n, l), "float32", sharding=sharding)
        largest = b * max(l, m) * n * max(d, 128) * jnp.dtype(dtype).itemsize
        for what, function in PASSES.items():
            compiled = compile_and_report(f"{chip} {name} {what}", function, (q, k, k, q, k, k, o, lse))
            # Every array may be there twice (in two layouts), but nothing grows with the square of the tokens.
            assert compiled.memory_analysis().temp_size_in_bytes < 9 * largest + 2**20
            assert "tpu_custom_call" in compiled.as_text()

    @pytest.mark.parametrize("remat", [False, True])
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_training_step(self, chip, remat):
        """The gradient of a loss of a value and its stopped tangent; batch over two chips and heads over two."""
        mesh = Mesh(np.array(devices_of(chip)).reshape(2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
        spec = PartitionSpec("data", None, "heads")
        attend = jax.shard_map(
            functools.partial(flash_attention, implementation="pallas_tpu"),
            mesh=mesh,
            in_specs=(spec, spec, spec),
            out_specs=spec,
        )

        def block(x, w, text):
            x = x + attend(x @ w[0], x @ w[1], x @ w[2])
            return x + attend(x @ w[3], text, text)

        def step(weights, text, x, dx):
            each = jax.checkpoint(block) if remat else block

            def network(weights, x):
                return jax.lax.scan(lambda x, w: (each(x, w, text), None), x, weights)[0]

            def loss(weights):
                f, df = jax.jvp(functools.partial(network, weights), (x,), (dx,))
                return jnp.sum(jnp.sin(f) * jax.lax.stop_gradient(f + df)).astype(jnp.float32)

            return jax.grad(loss)(weights)

        def shape(size, spec):
            return jax.ShapeDtypeStruct(size, "bfloat16", sharding=NamedSharding(mesh, spec))

        x, text = shape((2, 4080, 16, 128), spec), shape((2, 512, 16, 128), spec)
        weights = shape((2, 4, 128, 128), PartitionSpec())
        compiled = compile_and_report(f"{chip} step, remat {remat}", step, (weights, text, x, x))
        for kernel in ("online", "tangent", "keys", "queries"):
            assert f"attention_{kernel}_kernel" in compiled.as_text()

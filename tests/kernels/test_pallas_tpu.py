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
from rcm_jax.kernels.masks import BlockCausal
from rcm_jax.kernels.pallas_tpu import Pieces, Tiles
from rcm_jax.kernels.workloads import WORKLOADS

TOLERANCE = {"float32": 2e-6, "bfloat16": 1.5e-2}  # relative to the largest entry
SCALE = 0.2
SHAPES = {  # b, queries, keys, n, d, tiles, mask
    "one_tile": (2, 8, 8, 3, 16, None, None),
    "tiles": (1, 64, 64, 2, 64, Tiles(16, 32), None),
    "ragged": (1, 37, 37, 2, 64, Tiles(16, 8), None),
    "odd": (1, 37, 37, 2, 19, Tiles(16, 8), None),
    "cross": (2, 41, 23, 2, 128, Tiles(8, 16), None),
    "one_query": (1, 1, 19, 2, 16, Tiles(8, 8), None),
    "one_key": (1, 19, 1, 2, 16, Tiles(8, 8), None),
    "causal": (1, 64, 64, 2, 16, Tiles(16, 32), BlockCausal(12)),
    "window": (1, 40, 64, 2, 16, Tiles(16, 16), BlockCausal(6, window=2, sink=1)),
}
# Smaller than the tiles; sums by the vector units and by a row of ones.
PIECES = {False: Pieces(16, 8, 1, False), True: Pieces(8, 16, 2, True)}
SUBSETS = [live for live in itertools.product((True, False), repeat=3) if any(live)]


@functools.cache
def arrays(shape, dtype):
    """(q, k, v, dq, dk, dv, g), drawn once for each shape and rounded to dtype."""
    b, l, m, n, d, *_ = SHAPES[shape]
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
    mask = SHAPES[shape][-1]
    with jax.enable_x64(True):
        q, k, v, *directions, g = (x.astype(np.float64) for x in arrays(shape, dtype))
        o, lse = reference.forward(q, k, v, SCALE, mask=mask)
        do = reference.tangent(q, k, v, o, lse, *only(directions, live), SCALE, mask=mask)
        gradients = reference.backward(q, k, v, o, lse, g, live, SCALE, mask=mask)
        return jax.tree.map(np.asarray, ((o, lse), do, gradients))


def kernels_of(shape, ones=False, interpret=True):
    *_, tiles, mask = SHAPES[shape]
    return [
        functools.partial(function, mask=mask, interpret=interpret, tiles=tiles, pieces=PIECES[ones] if tiles else None)
        for function in (pallas_tpu.forward, pallas_tpu.tangent, pallas_tpu.backward, pallas_tpu.forward_tangent)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def everything(shape, live, ones, q, k, v, dq, dk, dv, g):
    """((o, lse), do, gradients, fused (o, lse, do)) of the kernels."""
    forward, tangent, backward, forward_tangent = kernels_of(shape, ones)
    directions = only((dq, dk, dv), live)
    o, lse = forward(q, k, v, SCALE, wide=True)
    do = tangent(q, k, v, o, lse, *directions, SCALE)
    gradients = backward(q, k, v, o, lse, g, live, SCALE)
    return (o, lse), do, gradients, forward_tangent(q, k, v, *directions, SCALE, wide=True)


class TestInterpreted:
    @pytest.mark.parametrize(
        ("shape", "dtype", "ones"),
        [
            *((shape, "float32", shape in ("cross", "causal")) for shape in SHAPES),
            *((shape, "bfloat16", shape in ("tiles", "odd", "window")) for shape in SHAPES),
        ],
    )
    def test_against_the_reference(self, shape, dtype, ones):
        live = (True, True, True)
        primal, do, gradients, fused = everything(shape, live, ones, *arrays(shape, dtype))
        assert [x.dtype.name for x in (*primal, do, *gradients)] == ["float32", "float32", *[dtype] * 4]
        expected = expected_of(shape, dtype, live)
        close((primal, do), expected[:2], TOLERANCE[dtype])
        close(fused, (*expected[0], expected[1]), TOLERANCE[dtype])
        if shape == "one_key":  # P is 1: dS, and with it dQ and dK, is the rounding of a difference
            gradients, expected = gradients[2:], (*expected[:2], expected[2][2:])
        close(gradients, expected[2], TOLERANCE[dtype])

    @pytest.mark.parametrize("ones", [False, True])
    def test_what_all_values_share_cancels_in_the_one_pass(self, ones):
        """As in tests/kernels/test_attention.py. Sums of P and H from before those are rounded: 28 %."""
        q, k, v, dq, dk, dv, _ = arrays("ragged", "bfloat16")
        k, v, dq = (x + np.asarray(shift, x.dtype) for x, shift in ((k, 1), (v, 64), (dq, 1)))
        forward_tangent = functools.partial(kernels_of("ragged", ones)[3], scale=SCALE)
        strict = {"xla_allow_excess_precision": False}  # roundings are what this is about
        do = jax.jit(forward_tangent, compiler_options=strict)(q, k, v, dq, dk, dv)[2]
        with jax.enable_x64(True):
            q, k, v, dq, dk, dv = (x.astype(np.float64) for x in (q, k, v, dq, dk, dv))
            o, lse = reference.forward(q, k, v, SCALE)
            close(do, reference.tangent(q, k, v, o, lse, dq, dk, dv, SCALE), 2e-2)

    @pytest.mark.parametrize("live", SUBSETS[1:])
    def test_any_subset_may_move(self, live):
        _, do, gradients, fused = everything("cross", live, False, *arrays("cross", "float32"))
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
        args = ("ragged", (True, True, True), False, *arrays("ragged", "bfloat16"))
        jax.tree.map(np.testing.assert_array_equal, everything(*args), everything(*args))

    def test_large_scores(self):
        """Scores near 10⁴, where exp overflows at 89."""
        q, *rest = arrays("ragged", "float32")
        result = everything("ragged", (True, True, True), False, 1e3 * q, *rest)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))

    @pytest.mark.parametrize("shape", ["ragged", "window"])
    def test_the_queries_of_a_head_in_parts(self, shape, monkeypatch):
        """As where dQ of all of them is too much for VMEM: gradients of keys are summed over the parts in float32."""
        monkeypatch.setattr(pallas_tpu, "_most_queries", lambda q: 24)
        q, k, v, *_, g = arrays(shape, "float32")
        (o, lse), _, expected = expected_of(shape, "float32", (True,) * 3)
        backward = jax.jit(functools.partial(kernels_of(shape)[2], live=(True,) * 3, scale=SCALE))
        close(backward(q, k, v, o.astype("float32"), lse.astype("float32"), g), expected, TOLERANCE["float32"])

    def test_how_many_queries_are_a_part(self):
        sizes = {("bfloat16", 128): 32_768, ("bfloat16", 64): 32_768, ("float32", 256): 10_922}
        for (dtype, d), most in sizes.items():
            assert pallas_tpu._most_queries(jax.ShapeDtypeStruct((1, 75_600, 8, d), dtype)) == most

    def test_only_tiles_that_are_seen_are_visited(self):
        q, k, *_ = arrays("causal", "float32")
        *_, tiles, mask = SHAPES["causal"]
        plan = pallas_tpu._plan("online", q, k, SCALE, mask, tiles, PIECES[False])
        visits = plan.visits()
        pairs = [(int(plan.tile("queries", x)), int(plan.tile("keys", x))) for x in visits]
        # Chunks of 12: queries 0 to 15 see keys to 23, 16 to 31 keys to 35, 32 to 47 keys to 47, 48 to 63 all.
        assert pairs == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
        assert [x >> 2 & 1 for x in visits] == [1, 1, 0, 1, 0, 1, 0]  # first of the queries' tile
        assert [x >> 3 & 1 for x in visits] == [1, 0, 1, 0, 1, 0, 1]  # last of it
        assert [x & 3 for x in visits] == [1, 1, 1, 2, 1, 2, 1]  # partly or wholly

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

    @pytest.mark.parametrize("piece", [128, 512])
    @pytest.mark.parametrize("length", [1, 127, 128, 1000, 2048, 2049, 4080, 31_200, 32_760, 75_600])
    def test_cut(self, length, piece):
        size = pallas_tpu._cut(length, 2048, piece)
        assert size <= 2048 and size % min(piece, 128) == 0
        filled = -(-length // size) * size
        assert length <= filled < length + (128 if length <= 2048 else size)
        if length > 4000:  # the real ones: little is made for nothing
            assert filled < 1.04 * length

    def test_every_kernel_has_a_cut_for_every_chip(self):
        kinds = {"TPU v5 lite": 128, "TPU v5": 128, "TPU v6 lite": 256, "TPU7x": 256}
        for kind, width in kinds.items():
            with pallas_tpu.compiling_for(kind):
                assert pallas_tpu.matrix_width() == width
        assert pallas_tpu.matrix_width() == 128  # no TPU here
        for cuts in pallas_tpu.CUTS.values():
            assert set(cuts) == {"online", "fused", "tangent", "backward"}
            for tiles, pieces in (*cuts.values(), pallas_tpu.OTHERS):
                assert not any(tile % piece or piece % 128 for tile, piece in zip(tiles, pieces[:2], strict=True))


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


def masked(q, k):
    """A window with a sink, where queries may be the last of the keys."""
    return BlockCausal(1000, window=2, sink=1) if q.shape[1] <= k.shape[1] else None


PASSES = {
    "forward": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.forward(q, k, v, SCALE),
    "forward, wide": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.forward(q, k, v, SCALE, wide=True),
    "tangent": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.tangent(q, k, v, o, lse, dq, dk, dv, SCALE),
    "tangent of q": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.tangent(q, k, v, o, lse, dq, None, None, SCALE),
    "backward": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.backward(q, k, v, o, lse, q, (True,) * 3, SCALE),
    "fused": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.forward_tangent(q, k, v, dq, dk, dv, SCALE),
    "forward, window": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.forward(q, k, v, SCALE, mask=masked(q, k)),
    "backward, window": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.backward(
        q, k, v, o, lse, q, (True,) * 3, SCALE, masked(q, k)
    ),
    "fused of q": lambda q, k, v, dq, dk, dv, o, lse: pallas_tpu.forward_tangent(q, k, v, dq, None, None, SCALE),
}
COMPILED = {  # b, queries, keys, n, d, dtype
    **{
        name: (w.batch, w.q_len, w.k_len, w.heads, w.head_dim, "bfloat16")
        for name, w in WORKLOADS.items()
        if name in ("wan_14b", "wan_14b_cross", "cosmos_2b", "cosmos_0.6b")
    },
    "wan_14b_720p": (1, 75_600, 75_600, 4, 128, "bfloat16"),
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
            with pallas_tpu.compiling_for(devices_of(chip)[0].device_kind):
                compiled = compile_and_report(f"{chip} {name} {what}", function, (q, k, k, q, k, k, o, lse))
            # Every array may be there twice (in two layouts), and a part of the queries has gradients of keys in
            # float32; but nothing grows with the square of the tokens.
            parts = -(-l // pallas_tpu._most_queries(q))
            assert compiled.memory_analysis().temp_size_in_bytes < (9 + 3 * (parts - 1)) * largest + 2**20
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
        for kernel in ("online", "tangent", "backward"):
            assert f"attention_{kernel}" in compiled.as_text()

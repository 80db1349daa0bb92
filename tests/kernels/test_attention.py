"""flash_attention, every implementation of it, against plain float64 attention differentiated by JAX.

Errors are relative to the largest entry of the expected array. Where a test does not say otherwise it runs in float64,
in which a wrong formula shows and rounding does not; in float32 for the TPU kernels, which take no more.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rcm_jax.kernels import attention, bench, blockwise, pallas_tpu
from rcm_jax.kernels.attention import flash_attention
from rcm_jax.kernels.workloads import WORKLOADS

# Relative to the largest entry. bfloat16 has 8 bits: results are rounded to 2⁻⁹, and factors of products in kernels.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 1.5e-2}
DEEP_TOLERANCE = {"float64": 1e-11, "float32": 1e-4}  # of several layers, and of sums that cancel

SHAPES = {  # b, queries, keys, n, d
    "one_tile": (2, 8, 8, 3, 16),
    "tiles": (2, 32, 32, 3, 32),
    "ragged": (1, 37, 37, 2, 64),
    "cross": (2, 41, 23, 2, 128),
    "one_query": (1, 1, 19, 2, 16),
}
CASES = [(shape, "float64") for shape in SHAPES]
CASES += [(shape, dtype) for shape in ("ragged", "cross") for dtype in ("float32", "bfloat16")]
SUBSETS = [live for live in itertools.product((True, False), repeat=3) if any(live)]

# Small tiles of two sizes, so that both loops run and both lengths leave a ragged tail.
SMALL = blockwise.Tiles(queries=8, keys=16)
CANDIDATES = {
    **{name: attention.IMPLEMENTATIONS[name] for name in ("reference", "blockwise")},
    "blockwise_small": attention.Implementation(
        *(functools.partial(f, tiles=SMALL) for f in attention.IMPLEMENTATIONS["blockwise"][:3])
    ),
    "pallas_tpu": attention.Implementation(
        *(
            functools.partial(f, interpret=True, tiles=pallas_tpu.Tiles(queries=16, keys=16))
            for f in attention.IMPLEMENTATIONS["pallas_tpu"][:3]
        )
    ),
}
REMAT = {
    "no remat": lambda f: f,
    "remat": jax.checkpoint,
    "remat but o and lse": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    ),
}


# These programs are compiled often and run once, for microseconds.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


# XLA may leave out the rounding of what it casts back and forth, which is what some tests are about.
strict_jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})


def plain(q, k, v, scale=None):
    """The oracle, independent of the package: JAX differentiates it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = jnp.einsum("blnd,bmnd->bnlm", q, k) * scale
    return jnp.einsum("bnlm,bmnd->blnd", jax.nn.softmax(s, axis=-1), v)


@functools.cache
def arrays(shape, dtype="float64"):
    """(q, k, v, dq, dk, dv, g) as numpy arrays, drawn once for each shape and rounded to dtype."""
    b, l, m, n, d = SHAPES[shape]
    rng = np.random.default_rng(0)
    sizes = [(b, l, n, d), (b, m, n, d), (b, m, n, d)]
    return tuple(np.asarray(rng.normal(size=size), jnp.dtype(dtype)) for size in (*sizes, *sizes, sizes[0]))


def exact(x):
    return np.asarray(x, np.float64)


def rounded(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def close(actual, expected, tolerance):
    """Compares two trees of arrays."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(exact(a), exact(e), rtol=0, atol=tolerance * np.abs(exact(e)).max()),
        actual,
        expected,
    )


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def count(primitive, function, *args):
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return sum(equation.primitive.name == primitive for equation in equations(jaxpr))


def value_tangent_gradient(attend, q, k, v, dq, dk, dv, g):
    o, do = jax.jvp(attend, (q, k, v), (dq, dk, dv))
    return o, do, jax.vjp(attend, q, k, v)[1](g)


@functools.cache
def expected_of(shape, dtype):
    """The oracle's value, tangent and gradients, in float64, of inputs rounded to dtype."""
    with jax.enable_x64(True):
        args = (exact(x) for x in arrays(shape, dtype))
        return jax.tree.map(np.asarray, quick_jit(functools.partial(value_tangent_gradient, plain))(*args))


def tangent_and_gradients(attend, q, k, v, dq, dk, dv, g):
    """Ȯ, along q alone where dk is None, and the gradients."""
    if dk is None:
        do = jax.jvp(lambda q: attend(q, k, v), (q,), (dq,))[1]
    else:
        do = jax.jvp(attend, (q, k, v), (dq, dk, dv))[1]
    return do, jax.vjp(attend, q, k, v)[1](g)


@functools.cache
def sharing_values(shape, mean):
    """(bfloat16 inputs, the oracle's tangent_and_gradients of them in float64).

    V has a mean of so many deviations, and the scores of a query move by 8 or 11 together: that is
    rowsum(H), and Ȯ is what is left of sums `mean` times 8 times as large. Text (cross) has no tangent.
    """
    q, k, v, dq, dk, dv, g = arrays(shape, "bfloat16")
    k, v, dq = (x + np.asarray(shift, x.dtype) for x, shift in ((k, 1), (v, mean), (dq, 1)))
    inputs = (q, k, v, dq, *((None, None) if shape == "cross" else (dk, dv)), g)
    with jax.enable_x64(True):
        expected = quick_jit(functools.partial(tangent_and_gradients, plain))(*jax.tree.map(exact, inputs))
        return inputs, jax.tree.map(np.asarray, expected)


def unrolled(step, x, weights):
    """lax.scan as a Python loop."""
    for w in weights:
        x, _ = step(x, w)
    return x, None


def network(attend, remat, parameters, x, scan=jax.lax.scan):
    """Blocks of self- and cross-attention under scan; parameters (weights [blocks, 4, d, d], text)."""
    weights, text = parameters

    @remat
    def block(x, w):
        x = x + attend(x @ w[0], x @ w[1], x @ w[2])
        return x + attend(x @ w[3], text, text), None

    return scan(block, x, weights)[0]


def gradient_of_jvp(attend, remat, parameters, x, dx):
    """(gradient, tangent) of a loss like the consistency loss: of a network's value and its stopped tangent."""

    def loss(parameters):
        f, df = jax.jvp(lambda x: network(attend, remat, parameters, x), (x,), (dx,))
        return jnp.sum(jnp.sin(f) * jax.lax.stop_gradient(f + df)), df

    return jax.grad(loss, has_aux=True)(parameters)


@pytest.fixture(scope="module")
def consistency():
    """((parameters, x, dx), the oracle's gradient_of_jvp of them)."""
    rng = np.random.default_rng(1)
    parameters = 0.3 * rng.normal(size=(2, 4, 16, 16)), rng.normal(size=(1, 11, 2, 16))
    inputs = (parameters, rng.normal(size=(1, 21, 2, 16)), rng.normal(size=(1, 21, 2, 16)))
    with jax.enable_x64(True):
        expected = quick_jit(functools.partial(gradient_of_jvp, plain, REMAT["no remat"]))(*inputs)
        return inputs, jax.tree.map(np.asarray, expected)


@pytest.fixture(params=CANDIDATES)
def attend(request, monkeypatch):
    """flash_attention of each implementation."""
    monkeypatch.setitem(attention.IMPLEMENTATIONS, request.param, CANDIDATES[request.param])
    return functools.partial(flash_attention, implementation=request.param)


@pytest.fixture
def finest(attend):
    """The finest dtype that the implementation takes."""
    return "float32" if attend.keywords["implementation"].startswith("pallas") else "float64"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
class TestEveryImplementation:
    @pytest.mark.parametrize(("shape", "dtype"), CASES)
    def test_value_tangent_and_gradients(self, attend, finest, shape, dtype):
        dtype = finest if dtype == "float64" else dtype
        args = arrays(shape, dtype)
        actual = quick_jit(functools.partial(value_tangent_gradient, attend))(*args)
        assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype(dtype)}
        close(actual, expected_of(shape, dtype), TOLERANCE[dtype])

    @pytest.mark.parametrize("live", SUBSETS)
    def test_any_subset_may_move(self, attend, finest, live):
        *primals, dq, dk, dv, g = arrays("cross", finest)
        moving = [x for x, alive in zip(primals, live, strict=True) if alive]
        directions = [x for x, alive in zip((dq, dk, dv), live, strict=True) if alive]

        def partial(*moving):
            rest = iter(moving)
            return attend(*(next(rest) if alive else x for x, alive in zip(primals, live, strict=True)))

        def derivatives():
            return jax.jvp(partial, moving, directions)[1], jax.vjp(partial, *moving)[1](g)

        still = [x if alive else np.zeros_like(x) for x, alive in zip((dq, dk, dv), live, strict=True)]
        with_zeros = jax.jvp(plain, [*map(exact, primals)], [*map(exact, still)])[1]
        gradients = tuple(x for x, alive in zip(expected_of("cross", finest)[2], live, strict=True) if alive)
        close(quick_jit(derivatives)(), (with_zeros, gradients), TOLERANCE[finest])

    @pytest.mark.parametrize("live", SUBSETS)
    def test_backward_is_the_transpose_of_tangent(self, attend, finest, live):
        q, k, v, *directions, g = (jnp.asarray(x) for x in arrays("cross", finest))
        implementation = attention.IMPLEMENTATIONS[attend.keywords["implementation"]]
        directions = [x if alive else None for x, alive in zip(directions, live, strict=True)]

        @quick_jit
        def both_ways(q, k, v, directions, g):
            residuals = (q, k, v, *implementation.forward(q, k, v, 0.1))
            do = implementation.tangent(*residuals, *directions, 0.1)
            return do, implementation.backward(*residuals, g, live, 0.1)

        do, gradients = both_ways(q, k, v, directions, g)
        assert [x is not None for x in gradients] == list(live)
        pairs = [(exact(x), exact(y)) for x, y in zip(gradients, directions, strict=True) if x is not None]
        close(sum((x * y).sum() for x, y in pairs), (exact(g) * exact(do)).sum(), DEEP_TOLERANCE[finest])

    @pytest.mark.parametrize("mean", [8, 64])
    @pytest.mark.parametrize("shape", ["ragged", "cross"])
    def test_what_all_values_share_cancels_in_the_derivatives(self, attend, shape, mean):
        """Ȯ and gradients where an error of O counts `mean` and |rowsum(H)| times.

        With O rounded to bfloat16 the errors of Ȯ were 10 to 26 % (mean 8) and 79 to 212 % (64). They are
        0.3 % in float32, and 0.6 to 1.6 % in kernels, whose products have bfloat16 factors; there they
        were 4 to 67 % with a wide O and sums of P and H from before the rounding of these factors.
        """
        inputs, expected = sharing_values(shape, mean)
        actual = strict_jit(functools.partial(tangent_and_gradients, attend))(*inputs)
        close(actual, expected, 2e-2)

    def test_o_is_wide_for_derivatives_alone(self, attend, monkeypatch):
        q, k, v, *_ = arrays("one_tile", "bfloat16")
        name = attend.keywords["implementation"]
        implementation = attention.IMPLEMENTATIONS[name]
        made = []

        def forward(q, k, v, scale, wide):
            o, lse = implementation.forward(q, k, v, scale, wide)
            made.append(o)
            return o, lse

        monkeypatch.setitem(attention.IMPLEMENTATIONS, name, implementation._replace(forward=forward))
        results = attend(q, k, v), jax.jvp(attend, (q, k, v), (q, k, v))[0], jax.vjp(attend, q, k, v)[0]
        assert [x.dtype.name for x in made] == ["bfloat16", "float32", "float32"]
        assert all((x == made[0]).all() and x.dtype == made[0].dtype for x in results)

    def test_derivatives_take_an_o_of_either_dtype(self, attend):
        q, k, v, *directions, g = (jnp.asarray(x) for x in arrays("one_tile", "bfloat16"))
        implementation = attention.IMPLEMENTATIONS[attend.keywords["implementation"]]
        for wide in (False, True):
            residuals = (q, k, v, *implementation.forward(q, k, v, 0.25, wide))
            do = implementation.tangent(*residuals, *directions, 0.25)
            gradients = implementation.backward(*residuals, g, (True,) * 3, 0.25)
            assert {x.dtype.name for x in (do, *gradients)} == {"bfloat16"}
            close((do, gradients), expected_of("one_tile", "bfloat16")[1:], TOLERANCE["bfloat16"])

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
    def test_products_of_wide_inputs_are_not_rounded(self, attend, finest, dtype):
        """Accelerators round factors to bfloat16 or tf32 where a program does not ask for more."""
        dtype = finest if dtype == "float64" else dtype
        jaxpr = jax.make_jaxpr(functools.partial(value_tangent_gradient, attend))(*arrays("ragged", dtype)).jaxpr
        products = [e.params["precision"] for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        highest = [x == (jax.lax.Precision.HIGHEST,) * 2 for x in products]
        assert len(products) >= 2 + 5 + 5
        if dtype == "bfloat16" and attend.keywords["implementation"] != "reference":
            assert not any(highest)
        else:
            assert all(highest)

    def test_scale(self, attend, finest):
        q, k, v, *_ = arrays("ragged", finest)
        close(attend(q, k, v, scale=0.7), plain(exact(q), exact(k), exact(v), 0.7), TOLERANCE[finest])

    def test_large_scores(self, attend):
        """Scores near 10⁴ in float32, where exp overflows at 89."""
        q, *rest = arrays("ragged", "float32")
        result = quick_jit(functools.partial(value_tangent_gradient, attend))(1e3 * q, *rest)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))
        close(result[0], plain(1e3 * exact(q), *map(exact, rest[:2])), 5e-3)  # scores are rounded to 10⁻³

    def test_eager(self, attend, finest):
        expected = expected_of("one_tile", finest)
        close(value_tangent_gradient(attend, *arrays("one_tile", finest)), expected, TOLERANCE[finest])

    @pytest.mark.parametrize("remat", REMAT)
    def test_gradient_of_jvp(self, attend, finest, consistency, remat):
        inputs, expected = consistency
        actual = quick_jit(functools.partial(gradient_of_jvp, attend, REMAT[remat]))(*rounded(inputs, finest))
        close(actual, expected, DEEP_TOLERANCE[finest])

    def test_jvp_of_vjp(self, attend, finest, consistency):
        """The same gradient with value and pull-back differentiated forwards."""
        inputs, expected = consistency
        # lax.scan's partial evaluation drops the rule of a custom_jvp, and kernels have no other.
        scan = unrolled if attend.keywords["implementation"].startswith("pallas") else jax.lax.scan

        def gradient(parameters, x, dx):
            def value_and_pull_back(x):
                return jax.vjp(lambda parameters: network(attend, jax.checkpoint, parameters, x, scan), parameters)

            (f, pull_back), (df, _) = jax.jvp(value_and_pull_back, (x,), (dx,))
            return pull_back(jnp.cos(f) * (f + df))[0], df

        close(quick_jit(gradient)(*rounded(inputs, finest)), expected, DEEP_TOLERANCE[finest])

    def test_tangent_is_a_linear_function(self, attend, finest):
        """With constant q, k, v, the gradient of ⟨g, ȯ⟩ with respect to the tangents is that of ⟨g, o⟩."""
        q, k, v, dq, dk, dv, g = arrays("ragged", finest)
        inner = jax.grad(lambda *tangents: jnp.vdot(g, jax.jvp(attend, (q, k, v), tangents)[1]), argnums=(0, 1, 2))
        close(quick_jit(inner)(dq, dk, dv), expected_of("ragged", finest)[2], TOLERANCE[finest])

    @pytest.mark.parametrize(("text", "check_vma"), [("sharded", True), ("replicated", True), ("replicated", False)])
    def test_shard_map(self, attend, finest, text, check_vma):
        """Heads over four devices, batch over two; replicated keys and values need their cotangents summed."""
        rng = np.random.default_rng(2)
        q, k, v = (rng.normal(size=(4, l, 4, 16)) for l in (21, 19, 19))
        dq, dk, dv, g = (rng.normal(size=x.shape) for x in (q, k, v, q))
        if text == "replicated":
            k, v, dk, dv = (x[:2] for x in (k, v, dk, dv))
        mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
        spec = PartitionSpec("data", None, "seq")
        text_spec = spec if text == "sharded" else PartitionSpec(None, None, "seq")
        sharded = jax.shard_map(
            attend, mesh=mesh, in_specs=(spec, text_spec, text_spec), out_specs=spec, check_vma=check_vma
        )

        def whole(q, k, v):
            k, v = (jnp.concatenate([x] * (4 // x.shape[0])) for x in (k, v))
            return plain(q, k, v)

        args = (q, k, v, dq, dk, dv, g)
        close(
            quick_jit(functools.partial(value_tangent_gradient, sharded))(*rounded(args, finest)),
            quick_jit(functools.partial(value_tangent_gradient, whole))(*args),
            TOLERANCE[finest],
        )

    def test_constants_cost_nothing(self, attend, finest):
        """Products of [tokens, tokens] or [tokens, features]: two in the value, one in P, and one or two a tangent."""
        q, k, v, dq, dk, dv, g = arrays("one_tile", finest)

        def moving_q(q, dq):
            return jax.jvp(lambda q: attend(q, k, v), (q,), (dq,))

        def moving_v(v, dv):
            return jax.jvp(lambda v: attend(q, k, v), (v,), (dv,))

        def moving_all(*tangents):
            return jax.jvp(attend, (q, k, v), tangents)

        assert count("dot_general", attend, q, k, v) == 2
        assert count("dot_general", moving_all, dq, dk, dv) == 2 + 5
        assert count("dot_general", moving_q, q, dq) == 2 + 3
        assert count("dot_general", moving_v, v, dv) == 2 + 2

        def products_of_gradient(argnums):
            extra = 0
            if attend.keywords["implementation"] == "reference" and argnums != (2,):
                extra = 1  # a small one: rowsum(G∘O)
            loss = jax.grad(lambda *x: jnp.sum(g * attend(*x)), argnums)
            return count("dot_general", loss, q, k, v) - extra

        assert products_of_gradient((0, 1, 2)) == 2 + 5
        assert products_of_gradient((0,)) == 2 + 3
        assert products_of_gradient((2,)) == 2 + 2

    def test_saved_names_spare_the_second_forward_pass(self, attend, finest):
        q, k, v, *_, g = arrays("one_tile", finest)

        def products(remat):
            return count("dot_general", jax.grad(lambda q: jnp.sum(g * REMAT[remat](attend)(q, k, v))), q)

        assert products("remat but o and lse") == products("no remat") == products("remat") - 2

    def test_saved_names_spare_the_second_forward_pass_in_the_gradient_of_a_jvp(self, attend, finest):
        q, k, v, dq, *_ = arrays("one_tile", finest)

        def products(remat):
            def loss(q):
                f, df = jax.jvp(lambda q: REMAT[remat](attend)(q, k, v), (q,), (dq,))
                return jnp.sum(jnp.sin(f) * jax.lax.stop_gradient(f + df))

            return str(jax.jit(jax.grad(loss)).lower(q).compile().as_text()).count(" dot(")

        assert products("remat but o and lse") < products("remat")


class TestBlockwise:
    @pytest.mark.parametrize("name", ["wan_14b", "cosmos_2b", "wan_14b_cross", "cpu_8192", "cpu_2048"])
    def test_no_array_outgrows_the_tokens(self, name):
        w = WORKLOADS[name]
        q = jax.ShapeDtypeStruct((w.batch, w.q_len, w.heads, w.head_dim), "bfloat16")
        k = jax.ShapeDtypeStruct((w.batch, w.k_len, w.heads, w.head_dim), "bfloat16")
        for function in bench.passes(flash_attention, w.cross).values():
            jaxpr = jax.make_jaxpr(function)(q, k, k, q, k, k, q).jaxpr
            largest = max(np.prod(x.aval.shape) for e in equations(jaxpr) for x in e.outvars)
            tile = w.batch * w.heads * np.prod(blockwise.TILES)
            assert largest <= max(1.05 * q.size, tile)

    def test_one_tile_has_neither_loop_nor_padding(self):
        for function in bench.passes(flash_attention, cross=False).values():
            args = [jnp.ones((2, 17, 2, 8), "float32")] * 7
            assert count("scan", function, *args) == count("pad", function, *args) == 0

    @pytest.mark.parametrize("length", [1, 8, 9, 31, 32, 33, 100, 1000])
    def test_cut(self, length):
        count, size = blockwise._cut(length, 32)
        assert size <= 32
        assert (count - 1) * size < length <= count * size
        assert count == -(-length // 32)

    def test_memory_at_8192_tokens(self):
        """At most a tenth of the plain jvp's scratch memory, by XLA's analysis of the compiled programs."""
        rows = bench.report(WORKLOADS["cpu_8192"], "float32", ["blockwise"], repeats=0)["rows"]
        ratios = [row["memory_ratio"] for row in rows if row["side"] == "blockwise"]
        assert len(ratios) == 3
        assert min(ratios) >= 10

"""flash_attention under a mask, every implementation that takes one, against plain float64 attention."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels import attention, blockwise, masks, reference
from rcm_jax.kernels.attention import flash_attention
from rcm_jax.kernels.masks import BlockCausal
from rcm_jax.models import layers
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from tests.kernels import test_attention as unmasked
from tests.kernels.test_attention import (
    CANDIDATES,
    DEEP_TOLERANCE,
    REMAT,
    SMALL,
    SUBSETS,
    TOLERANCE,
    close,
    equations,
    exact,
    quick_jit,
    rounded,
    unrolled,
    value_tangent_gradient,
)

WITH_MASKS = ("reference", "blockwise_small", "pallas_tpu")
in_tiles = pytest.mark.parametrize("attend", [x for x in WITH_MASKS if x != "reference"], indirect=True)
# mask, queries, keys; the small tiles have 8 queries and 16 keys
CASES = {
    "chunks_cut_tiles": (BlockCausal(5), 21, 21),
    "chunks_of_tiles": (BlockCausal(16), 48, 48),
    "window": (BlockCausal(6, window=2), 41, 41),
    "sink": (BlockCausal(7, window=1, sink=1), 45, 45),
    "wide_sink": (BlockCausal(4, window=2, sink=5), 40, 40),
    "cache": (BlockCausal(8, window=2), 13, 61),
    "cache_and_sink": (BlockCausal(6, window=2, sink=1), 15, 63),
    "one_chunk": (BlockCausal(64), 21, 21),
    "one_query": (BlockCausal(4, window=3), 1, 37),
    "tokens": (BlockCausal(1), 19, 19),
}


def plain(mask, q, k, v):
    """The oracle, independent of the kernels but for what a mask says of each pair."""
    s = jnp.einsum("blnd,bmnd->bnlm", q, k) * q.shape[-1] ** -0.5
    s = jnp.where(mask.seen(q.shape[1], k.shape[1]), s, -1e30)
    return jnp.einsum("bnlm,bmnd->blnd", jax.nn.softmax(s, axis=-1), v)


@functools.cache
def arrays(case, dtype="float64"):
    """(q, k, v, dq, dk, dv, g)"""
    _, l, m = CASES[case]
    rng = np.random.default_rng(0)
    return tuple(np.asarray(rng.normal(size=(2, x, 2, 16)), jnp.dtype(dtype)) for x in (l, m, m, l, m, m, l))


@functools.cache
def expected_of(case, dtype):
    with jax.enable_x64(True):
        args = [exact(x) for x in arrays(case, dtype)]
        run = quick_jit(functools.partial(value_tangent_gradient, functools.partial(plain, CASES[case][0])))
        return jax.tree.map(np.asarray, run(*args))


@pytest.fixture(params=WITH_MASKS)
def attend(request, monkeypatch):
    """flash_attention of each implementation."""
    monkeypatch.setitem(attention.IMPLEMENTATIONS, request.param, CANDIDATES[request.param])
    return functools.partial(flash_attention, implementation=request.param)


@pytest.fixture
def finest(attend):
    """The finest dtype that the implementation takes."""
    return "float32" if attend.keywords["implementation"].startswith("pallas") else "float64"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("case", CASES)
def test_value_tangent_and_gradients(attend, finest, case):
    actual = quick_jit(functools.partial(value_tangent_gradient, functools.partial(attend, mask=CASES[case][0])))
    close(actual(*arrays(case, finest)), expected_of(case, finest), TOLERANCE[finest])


def test_a_sequence_of_one_tile():
    """Neither padded nor looped over."""
    attend = functools.partial(flash_attention, mask=CASES["cache_and_sink"][0], implementation="blockwise")
    actual = quick_jit(functools.partial(value_tangent_gradient, attend))
    close(actual(*arrays("cache_and_sink")), expected_of("cache_and_sink", "float64"), TOLERANCE["float64"])
    assert unmasked.count("scan", attend, *arrays("cache_and_sink")[:3]) == 0


@in_tiles
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_inputs(attend, dtype):
    mask = CASES["cache_and_sink"][0]
    actual = quick_jit(functools.partial(value_tangent_gradient, functools.partial(attend, mask=mask)))
    results = actual(*arrays("cache_and_sink", dtype))
    assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype(dtype)}
    close(results, expected_of("cache_and_sink", dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("live", [x for x in SUBSETS if sum(x) == 1])
def test_what_does_not_move(attend, finest, live):
    """Along one of q, k, v, the others constant: a cache that carries no tangent."""
    mask = CASES["cache"][0]
    *primals, dq, dk, dv, g = arrays("cache", finest)
    (i,) = np.flatnonzero(live)

    def partial(moving):
        return attend(*primals[:i], moving, *primals[i + 1 :], mask=mask)

    direction = (dq, dk, dv)[i]
    still = [x if alive else np.zeros_like(x) for x, alive in zip((dq, dk, dv), live, strict=True)]
    do = jax.jvp(functools.partial(plain, mask), [*map(exact, primals)], [*map(exact, still)])[1]
    run = quick_jit(lambda x, dx: (jax.jvp(partial, (x,), (dx,))[1], jax.vjp(partial, x)[1](g)[0]))
    close(run(primals[i], direction), (do, expected_of("cache", finest)[2][i]), TOLERANCE[finest])


@pytest.fixture(scope="module")
def consistency():
    """((parameters, x, dx), the oracle's gradient_of_jvp of them): self-attention under a mask, text without."""
    rng = np.random.default_rng(1)
    parameters = 0.3 * rng.normal(size=(2, 4, 16, 16)), rng.normal(size=(1, 11, 2, 16))
    inputs = (parameters, rng.normal(size=(1, 21, 2, 16)), rng.normal(size=(1, 21, 2, 16)))

    def oracle(q, k, v):
        return plain(MASK, q, k, v) if q.shape == k.shape else unmasked.plain(q, k, v)

    with jax.enable_x64(True):
        gradient = functools.partial(unmasked.gradient_of_jvp, oracle, REMAT["no remat"])
        return inputs, jax.tree.map(np.asarray, quick_jit(gradient)(*inputs))


MASK = BlockCausal(5, window=2, sink=1)


def video_and_text(attend):
    """attend, under MASK where it is self-attention."""
    return lambda q, k, v: attend(q, k, v, mask=MASK if q.shape == k.shape else None)


@in_tiles
def test_gradient_of_jvp(attend, finest, consistency):
    inputs, expected = consistency
    gradient = functools.partial(unmasked.gradient_of_jvp, video_and_text(attend), REMAT["remat but o and lse"])
    close(quick_jit(gradient)(*rounded(inputs, finest)), expected, DEEP_TOLERANCE[finest])


@in_tiles
def test_jvp_of_vjp(attend, finest, consistency):
    inputs, expected = consistency
    scan = unrolled if attend.keywords["implementation"].startswith("pallas") else jax.lax.scan

    def gradient(parameters, x, dx):
        def value_and_pull_back(x):
            network = functools.partial(unmasked.network, video_and_text(attend), jax.checkpoint)
            return jax.vjp(lambda parameters: network(parameters, x, scan), parameters)

        (f, pull_back), (df, _) = jax.jvp(value_and_pull_back, (x,), (dx,))
        return pull_back(jnp.cos(f) * (f + df))[0], df

    close(quick_jit(gradient)(*rounded(inputs, finest)), expected, DEEP_TOLERANCE[finest])


@in_tiles
class TestTilesThatNobodySees:
    """NaN in them would show if they were computed with: even P = 0 times NaN is NaN."""

    def test_of_a_cache(self, attend, finest):
        """12 queries of a window of 2 chunks see from key 40 on, of 64: two tiles of 16 keys are behind."""
        mask, rng = BlockCausal(8, window=2), np.random.default_rng(3)
        q, k, v, dq, dk, dv, g = (rng.normal(size=(1, x, 2, 16)).astype(finest) for x in (12, 64, 64, 12, 64, 64, 12))
        unseen = slice(0, 32)
        clean = quick_jit(functools.partial(value_tangent_gradient, functools.partial(attend, mask=mask)))
        expected = clean(q, k, v, dq, dk, dv, g)
        for x in (k, v, dk, dv):
            x[:, unseen] = np.nan
        actual = clean(q, k, v, dq, dk, dv, g)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        assert all((x[:, unseen] == 0).all() and (x[:, 40:] != 0).all() for x in actual[2][1:])

    def test_of_later_chunks(self, attend, finest):
        """What is wrong in the last chunk reaches its own queries alone, and what they alone have seen."""
        mask, rng = BlockCausal(16, window=2), np.random.default_rng(3)
        q, k, v, dq, dk, dv, g = (rng.normal(size=(1, 64, 2, 16)).astype(finest) for _ in range(7))
        run = quick_jit(functools.partial(value_tangent_gradient, functools.partial(attend, mask=mask)))
        o, do, (gq, gk, gv) = run(q, k, v, dq, dk, dv, g)
        for x in (k, v, dk, dv):
            x[:, 48:] = np.nan
        wrong, wrong_do, gradients = run(q, k, v, dq, dk, dv, g)
        for x, y in ((wrong, o), (wrong_do, do), (gradients[0], gq)):
            np.testing.assert_array_equal(x[:, :48], y[:, :48])
            assert np.isnan(x[:, 48:]).all()
        for x, y in zip(gradients[1:], (gk, gv), strict=True):
            np.testing.assert_array_equal(x[:, :32], y[:, :32])


@pytest.mark.parametrize("case", CASES)
def test_blockwise_visits_only_what_is_seen(case):
    mask, l, m = CASES[case]
    implementation = CANDIDATES["blockwise_small"]
    q, k, v, *_ = arrays(case)
    jaxpr = jax.make_jaxpr(lambda *x: implementation.forward(*x, 0.25, mask=mask))(q, k, v).jaxpr
    steps = [e.params["length"] for e in equations(jaxpr) if e.primitive.name == "scan"]
    l_size, m_size = (blockwise._cut(x, most)[1] for x, most in zip((l, m), SMALL, strict=True))
    table = masks.tile_table(mask, l, m, l_size, m_size)
    assert sorted(steps) == sorted(x for x in ((table == 1).sum(), (table == 2).sum()) if x > 1)


def test_the_formula_for_jax_to_differentiate():
    attend = functools.partial(reference.attention, mask=CASES["cache_and_sink"][0])
    actual = quick_jit(functools.partial(value_tangent_gradient, attend))(*arrays("cache_and_sink"))
    close(actual, expected_of("cache_and_sink", "float64"), TOLERANCE["float64"])


def test_on_a_mesh():
    """Under Ulysses a device has the whole sequence and some heads, and so the mask of the whole sequence."""
    mask, args = CASES["chunks_of_tiles"][0], arrays("chunks_of_tiles")
    with jax.set_mesh(make_mesh(MeshConfig(data=1, seq=2), jax.devices()[:2])):
        actual = quick_jit(functools.partial(value_tangent_gradient, functools.partial(layers.attend, mask=mask)))(
            *args
        )
    close(actual, expected_of("chunks_of_tiles", "float64"), TOLERANCE["float64"])


def test_more_queries_than_keys():
    q, k = jnp.ones((1, 9, 1, 8)), jnp.ones((1, 8, 1, 8))
    with pytest.raises(ValueError, match="the queries are the last of the keys, got 9 queries and 8 keys: give"):
        flash_attention(q, k, k, mask=BlockCausal(4))


@pytest.mark.parametrize("mask", [np.ones((8, 8), bool), "causal", 4])
def test_masks_of_other_kinds(mask):
    x = jnp.ones((1, 8, 1, 8))
    message = (
        f"None or a rcm_jax.kernels.masks.BlockCausal, got a {type(mask).__module__}.{type(mask).__name__}: a mask"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        flash_attention(x, x, x, mask=mask)

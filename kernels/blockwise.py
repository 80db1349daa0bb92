"""The attention of `kernels.reference`, tile by tile with lax.scan: O(L) memory on every backend.

Queries and keys are cut into tiles; an outer loop over query tiles runs an inner loop over key tiles, and only one
[b, n, tile, tile] block of scores exists at a time. A sequence that fits one tile is neither padded nor looped over.

The three functions share one layout (`_split`), one loop (`_loop`) and one way to multiply tiles (`_product_of`).
The forward pass is the online softmax of Milakov and Gimelshein (arXiv 1805.02867); the tangent and its transpose
know lse already and rebuild P = exp(S − lse) directly, the way FlashAttention's backward pass does (arXiv 2205.14135).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .reference import Gradients, K, Live, Q, Row, compute_dtype


class Tiles(NamedTuple):
    """The most tokens in one tile: multiples of 8."""

    queries: int
    keys: int


# On a CPU the block of scores (1 MiB a head) stays in the cache: twice as many queries slow the backward pass down.
TILES = Tiles(queries=512, keys=512)


def forward(q: Q, k: K, v: K, scale, wide=False, *, tiles=TILES) -> tuple[Q, Row]:
    """O in the dtype of q, or `wide` in that of the computation, which lse has."""
    dtype, product = compute_dtype(q.dtype), _product_of(q.dtype)

    def query_tile(_, q):
        q = scale * q.astype(dtype)

        def key_tile(carry, xs):
            top, total, o = carry
            k, v, bias = xs
            s = _mask(product(q, k.mT), bias)
            new_top = jnp.maximum(top, s.max(-1, keepdims=True))
            p = jnp.exp(s - new_top)
            shrink = jnp.exp(top - new_top)
            return (new_top, shrink * total + p.sum(-1, keepdims=True), shrink * o + product(p, v)), None

        row = jnp.zeros_like(q[..., :1])
        (top, total, o), _ = _loop(key_tile, (row - jnp.inf, row, jnp.zeros_like(q)), keys)
        return None, (o / total, top + jnp.log(total))

    keys = (_split(k, tiles.keys), _split(v, tiles.keys), _bias(k, tiles.keys, dtype))
    _, (o, lse) = _loop(query_tile, None, _split(q, tiles.queries))
    return _merge(o, jax.ShapeDtypeStruct(q.shape, dtype if wide else q.dtype)), _merge_rows(lse, q)


def tangent(q: Q, k: K, v: K, o: Q, lse: Row, dq: Q | None, dk: K | None, dv: K | None, scale, *, tiles=TILES) -> Q:
    """Ȯ along (dq, dk, dv), of which None stands for zero and costs nothing."""
    dtype, product = compute_dtype(q.dtype), _product_of(q.dtype)
    moving_scores = dq is not None or dk is not None

    def query_tile(_, xs):
        q, o, dq, lse = xs
        q = scale * q.astype(dtype)
        dq = None if dq is None else scale * dq.astype(dtype)

        def key_tile(carry, xs):
            do, r = carry  # Ȯ = do − r∘O in the end
            k, v, dk, dv, bias = xs
            p = jnp.exp(_mask(product(q, k.mT), bias) - lse)
            if dv is not None:
                do += product(p, dv)
            if moving_scores:
                h = p * sum(product(x, y.mT) for x, y in ((dq, k), (q, dk)) if x is not None and y is not None)
                do += product(h, v)
                r += h.sum(-1, keepdims=True)
            return (do, r), None

        (do, r), _ = _loop(key_tile, (jnp.zeros_like(q), jnp.zeros_like(q[..., :1])), keys)
        return None, do - r * o.astype(dtype)

    # Under jax.tree.map a None stays None.
    keys = (*jax.tree.map(lambda x: _split(x, tiles.keys), (k, v, dk, dv)), _bias(k, tiles.keys, dtype))
    queries = (*jax.tree.map(lambda x: _split(x, tiles.queries), (q, o, dq)), _split_rows(lse, tiles.queries))
    _, do = _loop(query_tile, None, queries)
    return _merge(do, q)


def backward(q: Q, k: K, v: K, o: Q, lse: Row, g: Q, live: Live, scale, *, tiles=TILES) -> Gradients:
    """From g, the cotangent of Ȯ, to those of (dq, dk, dv), None where `live` is False: the transpose of `tangent`."""
    dtype, product = compute_dtype(q.dtype), _product_of(q.dtype)
    live_q, live_k, live_v = live

    def query_tile(key_gradients, xs):
        q, o, g, lse = xs
        q, g = scale * q.astype(dtype), g.astype(dtype)
        row = (g * o.astype(dtype)).sum(-1, keepdims=True)

        def key_tile(dq, xs):
            (k, v, bias), (dk, dv) = xs
            p = jnp.exp(_mask(product(q, k.mT), bias) - lse)
            if live_v:
                dv += product(p.mT, g)
            if live_q or live_k:
                ds = p * (product(g, v.mT) - row)
                if live_q:
                    dq += product(ds, k)
                if live_k:
                    dk += product(ds.mT, q)
            return dq, (dk, dv)

        dq, key_gradients = _loop(key_tile, jnp.zeros_like(q) if live_q else None, (keys, key_gradients))
        return key_gradients, scale * dq if live_q else None

    keys = (_split(k, tiles.keys), _split(v, tiles.keys), _bias(k, tiles.keys, dtype))
    zeros = tuple(jnp.zeros_like(x, dtype) if alive else None for x, alive in zip(keys[:2], live[1:], strict=True))
    queries = (*(_split(x, tiles.queries) for x in (q, o, g)), _split_rows(lse, tiles.queries))
    (dk, dv), dq = _loop(query_tile, zeros, queries)
    dq, dk, dv = (None if x is None else _merge(x, like) for x, like in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv


def _product_of(dtype):
    """X Y of two tiles, in the dtype of X, for attention over inputs of that dtype.

    float32 is not rounded on the way: unless asked not to, a TPU rounds it to bfloat16 and a GPU to tf32.
    Narrower inputs, cast up for the computation, are multiplied as the backend likes best.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == compute_dtype(dtype) else None
    return lambda x, y: jnp.matmul(x, y.astype(x.dtype), precision=precision)


def _mask(s: Float[Array, "b n l m"], bias: Float[Array, " m"] | None) -> Float[Array, "b n l m"]:
    return s if bias is None else s + bias


def _loop(step, carry, xs):
    """lax.scan, without its loop where there is a single step to make."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, xs)
    carry, y = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], y)


def _cut(length, most):
    """(number of tiles, tokens in each): as few tiles of at most `most` tokens as possible, evenly filled."""
    if length <= most:
        return 1, length
    size = -(-length // -(-length // most))
    size = -(-size // 8) * 8  # whole vector registers
    return -(-length // size), size


def _split(x: Float[Array, "b l n d"], most) -> Float[Array, "tiles b n tile d"]:
    """Tiles of at most `most` tokens, zeros in the tail of the last."""
    b, l, n, d = x.shape
    count, size = _cut(l, most)
    if count * size > l:
        x = jnp.pad(x, ((0, 0), (0, count * size - l), (0, 0), (0, 0)))
    return x.reshape(b, count, size, n, d).transpose(1, 0, 3, 2, 4)


def _merge(x: Float[Array, "tiles b n tile d"], like) -> Float[Array, "b l n d"]:
    """The inverse of `_split`, in the shape and dtype of the array `like`."""
    b, l, n, d = like.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(b, -1, n, d)[:, :l].astype(like.dtype)


def _split_rows(x: Row, most) -> Float[Array, "tiles b n tile 1"]:
    return _split(x.swapaxes(1, 2)[..., None], most)


def _merge_rows(x: Float[Array, "tiles b n tile 1"], q: Q) -> Row:
    """The inverse of `_split_rows`."""
    b, l, n, _ = q.shape
    return _merge(x, jax.ShapeDtypeStruct((b, l, n, 1), x.dtype))[..., 0].swapaxes(1, 2)


def _bias(k: K, most, dtype) -> Float[Array, "tiles tile"] | None:
    """0 for a key, −inf for the padding behind the last; None where there is no padding."""
    count, size = _cut(k.shape[1], most)
    if count * size == k.shape[1]:
        return None
    return jnp.where(jnp.arange(count * size) < k.shape[1], 0, -jnp.inf).astype(dtype).reshape(count, size)

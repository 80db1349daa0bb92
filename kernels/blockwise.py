"""The attention of `kernels.reference`, tile by tile with lax.scan: O(L) memory on every backend.

Queries and keys are cut into tiles. One loop goes over the pairs of a tile of queries and a tile of keys of which
something is seen, and only one [b, n, tile, tile] block of scores exists at a time; pairs that a mask hides are not in
the loop and cost nothing. A second loop goes over the pairs that are seen in part: those at the edges of a mask and
the ragged tail of the keys. A sequence that fits one tile is neither padded nor looped over.

The three functions share one layout (`_split`), one way through it (`_visit`) and one way to multiply tiles
(`_product_of`). The forward pass is the online softmax of Milakov and Gimelshein (arXiv 1805.02867), whose sums may be
made in any order; the tangent and its transpose know lse already and rebuild P = exp(S − lse) directly, the way
FlashAttention's backward pass does (arXiv 2205.14135).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from . import masks
from .masks import BlockCausal
from .reference import Gradients, K, Live, Q, Row, compute_dtype


class Tiles(NamedTuple):
    """The most tokens in one tile: multiples of 8."""

    queries: int
    keys: int


# On a CPU the block of scores (1 MiB a head) stays in the cache: twice as many queries slow the backward pass down.
TILES = Tiles(queries=512, keys=512)


def forward(q: Q, k: K, v: K, scale, wide=False, mask: BlockCausal | None = None, *, tiles=TILES) -> tuple[Q, Row]:
    """O in the dtype of q, or `wide` in that of the computation, which lse has."""
    dtype, product = compute_dtype(q.dtype), _product_of(q.dtype)

    def step(sums, queries, keys, hidden):
        (top, total, o), _ = sums
        (q,), (k, v) = queries, keys
        s = _hide(product(scale * q.astype(dtype), k.mT), hidden)
        new_top = jnp.maximum(top, s.max(-1, keepdims=True))
        p = jnp.exp(s - new_top)
        shrink = jnp.exp(top - new_top)
        return (new_top, shrink * total + p.sum(-1, keepdims=True), shrink * o + product(p, v)), ()

    queries, keys = (_split(q, tiles.queries),), (_split(k, tiles.keys), _split(v, tiles.keys))
    o = jnp.zeros_like(queries[0], dtype)
    row = o[..., :1]
    # A finite maximum, so that a query that sees nothing of a tile adds exp(−∞) to its sums.
    sums = (row + jnp.finfo(dtype).min, row, o), ()
    (top, total, o), _ = _visit(step, sums, queries, keys, mask, (q.shape[1], k.shape[1]))
    o = _merge(o / total, jax.ShapeDtypeStruct(q.shape, dtype if wide else q.dtype))
    return o, _merge_rows(top + jnp.log(total), q)


def tangent(
    q: Q,
    k: K,
    v: K,
    o: Q,
    lse: Row,
    dq: Q | None,
    dk: K | None,
    dv: K | None,
    scale,
    mask: BlockCausal | None = None,
    *,
    tiles=TILES,
) -> Q:
    """Ȯ along (dq, dk, dv), of which None stands for zero and costs nothing."""
    dtype, product = compute_dtype(q.dtype), _product_of(q.dtype)

    def step(sums, queries, keys, hidden):
        (do, r), _ = sums  # Ȯ = do − r∘O in the end
        (q, dq, lse), (k, v, dk, dv) = queries, keys
        q = scale * q.astype(dtype)
        p = jnp.exp(_hide(product(q, k.mT), hidden) - lse)
        if dv is not None:
            do += product(p, dv)
        if dq is not None or dk is not None:
            dq = None if dq is None else scale * dq.astype(dtype)
            h = p * sum(product(x, y.mT) for x, y in ((dq, k), (q, dk)) if x is not None and y is not None)
            do += product(h, v)
            r += h.sum(-1, keepdims=True)
        return (do, r), ()

    # Under jax.tree.map a None stays None.
    keys = jax.tree.map(lambda x: _split(x, tiles.keys), (k, v, dk, dv))
    q_tiles, dq, o = jax.tree.map(lambda x: _split(x, tiles.queries), (q, dq, o))
    queries = q_tiles, dq, _split_rows(lse, tiles.queries)
    do = jnp.zeros_like(q_tiles, dtype)
    sums = (do, do[..., :1]), ()
    (do, r), _ = _visit(step, sums, queries, keys, mask, (q.shape[1], k.shape[1]))
    return _merge(do - r * o.astype(dtype), q)


def backward(
    q: Q, k: K, v: K, o: Q, lse: Row, g: Q, live: Live, scale, mask: BlockCausal | None = None, *, tiles=TILES
) -> Gradients:
    """From g, the cotangent of Ȯ, to those of (dq, dk, dv), None where `live` is False: the transpose of `tangent`."""
    dtype, product = compute_dtype(q.dtype), _product_of(q.dtype)
    live_q, live_k, live_v = live

    def step(sums, queries, keys, hidden):
        dq, (dk, dv) = sums
        (q, g, lse, row), (k, v) = queries, keys
        q, g = scale * q.astype(dtype), g.astype(dtype)
        p = jnp.exp(_hide(product(q, k.mT), hidden) - lse)
        if live_v:
            dv += product(p.mT, g)
        if live_q or live_k:
            ds = p * (product(g, v.mT) - row)
            if live_q:
                dq += product(ds, k)
            if live_k:
                dk += product(ds.mT, q)
        return dq, (dk, dv)

    row = (g.astype(dtype) * o.astype(dtype)).sum(-1, keepdims=True)
    q_tiles, g, row = (_split(x, tiles.queries) for x in (q, g, row))
    queries = q_tiles, g, _split_rows(lse, tiles.queries), row
    keys = _split(k, tiles.keys), _split(v, tiles.keys)
    zeros = [jnp.zeros_like(x, dtype) if alive else None for x, alive in zip((q_tiles, *keys), live, strict=True)]
    dq, (dk, dv) = _visit(step, (zeros[0], tuple(zeros[1:])), queries, keys, mask, (q.shape[1], k.shape[1]))
    dq = None if dq is None else scale * dq
    dq, dk, dv = (None if x is None else _merge(x, like) for x, like in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv


def _visit(step, sums, queries, keys, mask: BlockCausal | None, lengths):
    """Runs `step` over each pair of tiles of which something is seen: the sums in the end.

    sums is (those of queries, those of keys); they, `queries` and `keys` are trees of arrays cut into tiles.
    step(sums, queries, keys, hidden) -> sums takes one tile of each, and [tile, tile] where it must hide keys, or None.
    """
    l, m = lengths
    q_size, k_size = (jax.tree.leaves(x)[0].shape[3] for x in (queries, keys))
    # Queries behind the last see what the last does, so that nothing is undefined.
    positions = np.minimum(np.arange(m - l, m - l + -(-l // q_size) * q_size), m - 1).reshape(-1, q_size, 1)

    def visit(whole, sums, pair):
        of_queries, of_keys = pair
        hidden = None
        if not whole:
            hidden = masks.hides(mask, _take(positions, of_queries), of_keys * k_size + jnp.arange(k_size), m)
        old = tuple(_take(x, at) for x, at in zip(sums, pair, strict=True))
        new = step(old, _take(queries, of_queries), _take(keys, of_keys), hidden)
        return tuple(_put(x, y, at) for x, y, at in zip(sums, new, pair, strict=True)), None

    table = masks.tile_table(mask, l, m, q_size, k_size)
    for kind in (masks.WHOLLY, masks.PARTLY):
        of_queries, of_keys = np.nonzero(table == kind)
        visit_one = functools.partial(visit, kind == masks.WHOLLY)
        if len(of_keys) > 1:
            sums, _ = jax.lax.scan(visit_one, sums, (of_queries.astype(np.int32), of_keys.astype(np.int32)))
        elif len(of_keys):
            sums, _ = visit_one(sums, (of_queries[0], of_keys[0]))
    return sums


def _take(tree, at):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), tree)


def _put(tree, tile, at):
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, at, 0), tree, tile)


def _product_of(dtype):
    """X Y of two tiles, in the dtype of X, for attention over inputs of that dtype.

    float32 is not rounded on the way: unless asked not to, a TPU rounds it to bfloat16 and a GPU to tf32.
    Narrower inputs, cast up for the computation, are multiplied as the backend likes best.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == compute_dtype(dtype) else None
    return lambda x, y: jnp.matmul(x, y.astype(x.dtype), precision=precision)


def _hide(s: Float[Array, "b n l m"], hidden: Bool[Array, "l m"] | None) -> Float[Array, "b n l m"]:
    return s if hidden is None else jnp.where(hidden, -jnp.inf, s)


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

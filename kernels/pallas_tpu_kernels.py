"""The bodies of the TPU kernels of kernels.pallas_tpu: what is done with one tile of queries and one tile of keys.

Each takes (plan, visit, refs, out, acc): how the work is cut, where this step of the grid stands, and references in
VMEM by name. Arrays of a tile are [tokens, d], rows [1, tokens], and those called "…_turned" [features, tokens].

A tile is worked off in pieces (`_pipelined`): the products of later pieces are written before the exponentials of
earlier ones, so that the compiler's schedule keeps the matrix units busy while the vector units work on the others.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from . import masks

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # of a maximum over no scores yet: finite, so that what is masked gives exp2(-inf - LOWEST) = 0


def online(plan, visit, refs, out, acc):
    """Softmax over the keys that stream by, rescaled when a score exceeds the largest so far; Ȯ too if asked for.

    All that is accumulated over the keys is rescaled together: Σ P̃, Σ P̃ V and, of Ȯ, Σ (P̃ V̇ + H̃ V) and r = Σ H̃.
    """

    @pl.when(visit.first)
    def _():
        for name, ref in acc.items():
            ref[...] = jnp.full(ref.shape, LOWEST if name == "top" else 0, ref.dtype)

    at = functools.partial(_piece, plan, visit, refs)

    def products(queries, keys):
        s = _scores(at("k", keys), at("q", queries))
        return s, _moving_scores(refs, at, queries, keys) if "do" in out else None

    def add(queries, keys, hidden, made):
        s, ds = made
        s = s * (plan.scale * LOG2_E)
        if hidden is not None:
            s = jnp.where(hidden, -jnp.inf, s)
        old = acc["top"][:, queries]
        top = jnp.maximum(old, s.max(0, keepdims=True))
        shrink = jnp.exp2(old - top)
        p = jnp.exp2(s - top)
        acc["top"][:, queries] = top
        more = dict(zip(("o", "total"), _weigh_and_sum(plan, at("v_turned", keys), p), strict=True))
        if "do" in out:
            more |= _flow(plan, refs, at, keys, p, ds)
        for name, x in more.items():
            acc[name][:, queries] = shrink * acc[name][:, queries] + x

    _pipelined(plan, visit, products, add)

    @pl.when(visit.last)
    def _():
        total = acc["total"][...]
        o = acc["o"][: plan.features] / total
        out["o"][...] = o.T.astype(out["o"].dtype)
        out["lse"][...] = (acc["top"][...] + jnp.log2(total)) / LOG2_E
        if "do" in out:
            do = acc["do"][: plan.features]
            if "r" in acc:
                do -= acc["r"][...] * o
            out["do"][...] = (do / total).T.astype(out["do"].dtype)


def tangent(plan, visit, refs, out, acc):
    """Ȯ = (P V̇ + H V) − rowsum(H)∘O, the keys streaming by."""

    @pl.when(visit.first)
    def _():
        for ref in acc.values():
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    at = functools.partial(_piece, plan, visit, refs)

    def products(queries, keys):
        return _scores(at("k", keys), at("q", queries)), _moving_scores(refs, at, queries, keys)

    def add(queries, keys, hidden, made):
        s, ds = made
        p = _probabilities(plan, refs, queries, hidden, s)
        for name, x in _flow(plan, refs, at, keys, p, ds).items():
            acc[name][:, queries] += x

    _pipelined(plan, visit, products, add)

    @pl.when(visit.last)
    def _():
        do = acc["do"][: plan.features]
        if "r" in acc:
            do -= acc["r"][...] * refs["o"][...].astype(do.dtype).T
        out["do"][...] = do.T.astype(out["do"].dtype)


def backward(plan, visit, refs, out, acc):
    """dK = scale·dSᵀ Q and dV = Pᵀ G of the keys that stay, dQ = scale·dS K of all queries of a head."""

    @pl.when(visit.first)
    def _():
        for name in ("dk", "dv"):
            if name in acc:
                acc[name][...] = jnp.zeros(acc[name].shape, jnp.float32)

    if "dq" in acc:

        @pl.when(visit.starts)
        def _():
            def clear(tokens):
                acc["dq"][:, tokens] = jnp.zeros((acc["dq"].shape[0], tokens.size), jnp.float32)

            _each_tile(plan, clear)

    at = functools.partial(_piece, plan, visit, refs)

    def products(queries, keys):
        s = _scores(at("k", keys), at("q", queries))
        return s, _scores(at("v", keys), at("g", queries)) if "v" in refs else None

    def add(queries, keys, hidden, made):
        s, dp = made
        p = _probabilities(plan, refs, queries, hidden, s)
        if "dv" in acc:
            acc["dv"][keys] += _product(p, at("g", queries), (1, 0))
        if dp is None:
            return
        ds = p * (dp - at("row", queries))
        if "dk" in acc:
            acc["dk"][keys] += _product(ds, at("q", queries), (1, 0))
        if "dq" in acc:
            tokens = _tokens(plan, visit.query_tile, queries.start, queries.size)
            acc["dq"][:, tokens] += _weigh(at("k_turned", keys), ds)

    _pipelined(plan, visit, products, add)

    @pl.when(visit.last)
    def _():
        for name, factor in (("dk", plan.scale), ("dv", 1)):
            if name in out:
                out[name][...] = (factor * acc[name][...]).astype(out[name].dtype)

    if "dq" in acc:

        @pl.when(visit.ends)
        def _():
            def store(tokens):
                out["dq"][tokens] = (plan.scale * acc["dq"][: plan.features, tokens]).T.astype(out["dq"].dtype)

            _each_tile(plan, store)


def _pipelined(plan, visit, products, add):
    """Works off the pieces of a tile, `plan.pieces.ahead` of them with their products made and not yet added."""

    def run(partly):
        at = [
            (pl.ds(query, plan.pieces.queries), pl.ds(key, plan.pieces.keys))
            for key in range(0, plan.tiles.keys, plan.pieces.keys)
            for query in range(0, plan.tiles.queries, plan.pieces.queries)
        ]
        made = []
        for i in range(len(at) + plan.pieces.ahead):
            if i < len(at):
                made.append(products(*at[i]))
            if i >= plan.pieces.ahead:
                queries, keys = at[i - plan.pieces.ahead]
                add(queries, keys, _hidden(plan, visit, queries, keys, partly), made.pop(0))

    # Under pl.when even without a mask: inside shard_map an interpreted kernel is checked op by op, and constants at
    # its outermost level then do not vary as they should.
    pl.when(visit.seen == masks.WHOLLY)(lambda: run(partly=False))
    if plan.mask is not None:
        pl.when(visit.seen == masks.PARTLY)(lambda: run(partly=True))


def _piece(plan, visit, refs, name, tokens):
    """Those tokens of the tile of an array, the ones behind the last as zeros.

    Queries that stay are as they come: what they give is dropped.
    """
    x, axis = (refs[name][tokens], 0) if plan.is_upright(name) else (refs[name][:, tokens], 1)
    side = plan.side(name)
    if (side == "queries" and plan.stays == side) or plan.is_full(side, tokens):
        return x
    index = visit.tile(side) * getattr(plan.tiles, side) + tokens.start
    real = index + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < getattr(plan, side)
    return jnp.where(real, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _hidden(plan, visit, queries, keys, partly):
    """[keys, queries] of a piece: what the mask hides and what is behind the last of what streams; None for nothing."""
    mask = plan.mask if partly else None
    key = visit.key_tile * plan.tiles.keys + keys.start
    key += jax.lax.broadcasted_iota(jnp.int32, (keys.size, queries.size), 0)
    query = visit.query_tile * plan.tiles.queries + queries.start
    hidden = None
    if mask is not None or not plan.is_full("keys", keys):
        query_row = query + jax.lax.broadcasted_iota(jnp.int32, (1, queries.size), 1)
        hidden = masks.hides(mask, plan.first_position + query_row, key, plan.keys)
    if plan.stays == "keys" and not plan.is_full("queries", queries):
        behind = query + jax.lax.broadcasted_iota(jnp.int32, (keys.size, queries.size), 1) >= plan.queries
        hidden = behind if hidden is None else hidden | behind
    return hidden


def _each_tile(plan, do):
    """do(slice of tokens) for each tile of all the queries of a head, in a loop."""

    jax.lax.fori_loop(0, plan.query_tiles, lambda i, _: do(_tokens(plan, i, 0, plan.tiles.queries)), None)


def _tokens(plan, tile, start, size):
    """Queries of a head, counted from `start` of a tile on."""
    at = tile * plan.tiles.queries + start
    return pl.ds(pl.multiple_of(at, math.gcd(plan.tiles.queries, plan.pieces.queries)), size)


def _product(x, y, axes):
    """x and y summed over axes[0] of x and axes[1] of y, into float32; x is rounded to the dtype of y first."""
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x.astype(y.dtype), y, numbers, precision=precision, preferred_element_type=jnp.float32)


def _scores(keys, queries):
    """K Qᵀ [keys, queries], not scaled."""
    return _product(keys, queries, (1, 1))


def _weigh(values, weights):
    """Vᵀ W [features, queries] of values turned [features, keys] and weights [keys, queries]."""
    return _product(values, weights.astype(values.dtype), (1, 0))


def _moving_scores(refs, at, queries, keys):
    """Q̇ Kᵀ + Q K̇ᵀ turned [keys, queries], not scaled; None where neither moves."""
    pairs = [(x, y) for x, y in (("k", "dq"), ("dk", "q")) if x in refs and y in refs]
    return sum(_scores(at(x, keys), at(y, queries)) for x, y in pairs) if pairs else None


def _probabilities(plan, refs, queries, hidden, s):
    """P [keys, queries], from lse."""
    p = jnp.exp2(s * (plan.scale * LOG2_E) - refs["lse"][:, queries] * LOG2_E)
    return p if hidden is None else jnp.where(hidden, 0.0, p)


def _flow(plan, refs, at, keys, p, ds):
    """{"do": V̇ᵀP + VᵀH [features, queries], "r": the sums of H [1, queries]} of a piece; ds: Ṡ, not scaled."""
    made: dict[str, Any] = {"do": 0.0}
    if ds is not None:
        made["do"], made["r"] = _weigh_and_sum(plan, at("v_turned", keys), plan.scale * p * ds)
    if "dv_turned" in refs:
        made["do"] += _weigh(at("dv_turned", keys), p)
    return made


def _weigh_and_sum(plan, values, weights):
    """(Vᵀ W [features, queries], the sums of W over the keys [1, queries]) of a piece.

    O is a mean of V and Ȯ a difference from it: what all rows of V share cancels if the weights that are summed are
    those that V is multiplied by, rounded as they are. Where the vector units are the busier ones, a row of ones below
    Vᵀ sums them in the product.
    """
    weights = weights.astype(values.dtype)
    product = _weigh(values, weights)
    if plan.pieces.ones:
        return product[: plan.feature_rows], product[plan.feature_rows :][:1]
    return product, weights.astype(jnp.float32).sum(0, keepdims=True)

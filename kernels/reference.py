"""Attention in plain jnp: the specification of every implementation in this package.

    S = Q Kᵀ·scale     P = softmax(S)     O = P V     lse = log Σ exp S (over the keys)

and, with H = P∘Ṡ and Ṡ = (Q̇ Kᵀ + Q K̇ᵀ)·scale, the tangent (the rCM paper, arXiv 2510.08431)

    Ȯ = P V̇ + H V − rowsum(H)∘O.

Every array of tokens is [b, l, n, d]: batch, tokens, heads, features; Q may have another number of tokens than K and V.
Everything is computed in float32 at least (float64 inputs stay float64) and O, Ȯ and the gradients are returned in the
dtype of the inputs; lse [b, n, l] is kept in the dtype of the computation.

These functions hold whole [b, n, l, m] arrays (l queries, m keys) and are here to be read and compared with.
"""

import jax
import jax.numpy as jnp


def compute_dtype(dtype):
    """The dtype attention is computed in: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def _product(equation, x, y):
    """einsum in the dtype of the computation, without the reduced precision that accelerators default to."""
    dtype = compute_dtype(jnp.result_type(x, y))
    return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def _scores(q, k, scale):
    return scale * _product("blnd,bmnd->bnlm", q, k)


def _per_query(x):
    """[b, n, l] → [b, l, n, 1], to stand beside O."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def attention(q, k, v, scale=None):
    """softmax(Q Kᵀ·scale) V, [b, l, n, d], in the dtype of q; scale is d**-0.5 if None. For JAX to differentiate."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _product("bnlm,bmnd->blnd", jax.nn.softmax(_scores(q, k, scale), axis=-1), v).astype(q.dtype)


def forward(q, k, v, scale):
    """O [b, l, n, d] in the dtype of q, and lse [b, n, l] in the dtype of the computation."""
    s = _scores(q, k, scale)
    lse = jax.nn.logsumexp(s, axis=-1)
    p = jnp.exp(s - lse[..., None])
    return _product("bnlm,bmnd->blnd", p, v).astype(q.dtype), lse


def tangent(q, k, v, o, lse, dq, dk, dv, scale):
    """Ȯ [b, l, n, d] along (dq, dk, dv), each shaped like its primal or None for zero, whose products are left out."""
    p = jnp.exp(_scores(q, k, scale) - lse[..., None])
    do = jnp.zeros(o.shape, lse.dtype)
    if dv is not None:
        do += _product("bnlm,bmnd->blnd", p, dv)
    if dq is not None or dk is not None:
        h = p * sum(_scores(x, y, scale) for x, y in ((dq, k), (q, dk)) if x is not None and y is not None)
        do += _product("bnlm,bmnd->blnd", h, v) - _per_query(h.sum(-1)) * o
    return do.astype(q.dtype)


def backward(q, k, v, o, lse, g, live, scale):
    """The transpose of `tangent`: from g [b, l, n, d], the cotangent of Ȯ, to those of (dq, dk, dv).

    `live` holds three booleans; where one is False the tangent was None and so is the result.
    """
    live_q, live_k, live_v = live
    dq = dk = dv = None
    p = jnp.exp(_scores(q, k, scale) - lse[..., None])
    if live_v:
        dv = _product("bnlm,blnd->bmnd", p, g).astype(v.dtype)
    if live_q or live_k:
        row = _product("blnd,blnd->bnl", g, o)
        ds = scale * p * (_product("blnd,bmnd->bnlm", g, v) - row[..., None])
        if live_q:
            dq = _product("bnlm,bmnd->blnd", ds, k).astype(q.dtype)
        if live_k:
            dk = _product("bnlm,blnd->bmnd", ds, q).astype(k.dtype)
    return dq, dk, dv

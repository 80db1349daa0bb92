"""Attention in plain jnp: the specification of every implementation in this package.

    S = Q Kᵀ·scale     P = softmax(S)     O = P V     lse = log Σ exp S (over the keys)

and, with H = P∘Ṡ and Ṡ = (Q̇ Kᵀ + Q K̇ᵀ)·scale, the tangent (the rCM paper, arXiv 2510.08431)

    Ȯ = P V̇ + H V − rowsum(H)∘O.

Everything is computed in float32 at least (float64 inputs stay float64) and O, Ȯ and the gradients are returned in the
dtype of the inputs; lse is kept in the dtype of the computation. So is the O that derivatives get,
`wide`: what all rows of V share cancels in H V − rowsum(H)∘O, but the rounding of O would not, and
counts rowsum(H) times.

Under a mask (`kernels.masks`) the scores of the keys that a query does not see are −∞ in S.

Axes are b batch, l queries, m keys, n heads, d features. These functions hold whole [b, n, l, m] arrays and are here to
be read and compared with.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .masks import BlockCausal

Q = Float[Array, "b l n d"]  # and what is shaped like it: O, Ȯ, their cotangents, dQ
K = Float[Array, "b m n d"]  # and V
Row = Float[Array, "b n l"]  # a number for each query
Live = tuple[bool, bool, bool]  # whether Q, K and V move
Gradients = tuple[Q | None, K | None, K | None]  # of Q, K and V, None where they do not move


def compute_dtype(dtype):
    """The dtype attention is computed in: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def _product(equation, x: Array, y: Array) -> Array:
    """einsum in the dtype of the computation, without the reduced precision that accelerators default to."""
    dtype = compute_dtype(jnp.result_type(x, y))
    return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def _scores(q: Q, k: K, scale) -> Float[Array, "b n l m"]:
    return scale * _product("blnd,bmnd->bnlm", q, k)


def _masked_scores(q: Q, k: K, scale, mask: BlockCausal | None) -> Float[Array, "b n l m"]:
    """S."""
    s = _scores(q, k, scale)
    return s if mask is None else jnp.where(mask.seen(q.shape[1], k.shape[1]), s, -jnp.inf)


def _per_query(x: Row) -> Float[Array, "b l n 1"]:
    """To stand beside O."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def attention(q: Q, k: K, v: K, scale=None, mask: BlockCausal | None = None) -> Q:
    """softmax(Q Kᵀ·scale) V in the dtype of q; scale is d**-0.5 if None. For JAX to differentiate."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _product("bnlm,bmnd->blnd", jax.nn.softmax(_masked_scores(q, k, scale, mask), axis=-1), v).astype(q.dtype)


def forward(q: Q, k: K, v: K, scale, wide=False, mask: BlockCausal | None = None) -> tuple[Q, Row]:
    """O in the dtype of q, or `wide` in that of the computation, which lse has."""
    s = _masked_scores(q, k, scale, mask)
    lse = jax.nn.logsumexp(s, axis=-1)
    p = jnp.exp(s - lse[..., None])
    return _product("bnlm,bmnd->blnd", p, v).astype(lse.dtype if wide else q.dtype), lse


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
) -> Q:
    """Ȯ along (dq, dk, dv), of which None stands for zero and costs nothing."""
    p = jnp.exp(_masked_scores(q, k, scale, mask) - lse[..., None])
    do = jnp.zeros(q.shape, lse.dtype)
    if dv is not None:
        do += _product("bnlm,bmnd->blnd", p, dv)
    if dq is not None or dk is not None:
        h = p * sum(_scores(x, y, scale) for x, y in ((dq, k), (q, dk)) if x is not None and y is not None)
        do += _product("bnlm,bmnd->blnd", h, v) - _per_query(h.sum(-1)) * o
    return do.astype(q.dtype)


def backward(q: Q, k: K, v: K, o: Q, lse: Row, g: Q, live: Live, scale, mask: BlockCausal | None = None) -> Gradients:
    """From g, the cotangent of Ȯ, to those of (dq, dk, dv), None where `live` is False: the transpose of `tangent`."""
    live_q, live_k, live_v = live
    dq = dk = dv = None
    p = jnp.exp(_masked_scores(q, k, scale, mask) - lse[..., None])
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

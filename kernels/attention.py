"""flash_attention: softmax attention with its own forward- and reverse-mode derivatives.

With the formulas of `kernels.reference`, the derivative rule is

    o, lse = forward(q, k, v)
    ȯ      = linear_call(tangent, backward)(q, k, v, o, lse; those of q̇, k̇, v̇ that are not symbolically zero)

in which o is wide: in float32 at least. So one op serves jax.jvp, jax.grad, the gradient of a jvp
and the jvp of a vjp, eagerly and under jit, lax.scan, jax.checkpoint and jax.shard_map. An
implementation is plain functions (`kernels.implementations`) and needs no rule of its own: the jvp
of a vjp of lax.scan alone needs a forward function that JAX can differentiate (partial evaluation
drops the rule), which kernels are not. The passes may come from several (`kernels.choice`).

- Constants cost nothing: text keys and values carry no tangent in a jvp with respect to the image, so their two of
  the five products of the tangent are left out.
- The result is o rounded to the dtype of q. Calls that nobody differentiates (a teacher, a rollout)
  make no wide o and no lse: they have a function of their own, `value`.
- For jax.checkpoint, the wide o and lse carry the names "attention_out" and "attention_lse": a policy
  that saves these two spares the second forward pass,
  save_only_these_names("attention_out", "attention_lse").
- Second derivatives are dropped: ȯ is differentiated as a linear function of the tangents, and how it depends on
  q, k and v is ignored. A loss must stop the gradient of a tangent, as the consistency loss does.
- There is no promise to work under jax.vmap: batch and heads are axes of the op, and kernels have no batching rule.

The kernels that make o and ȯ in one pass (`forward_tangent` of kernels.triton and kernels.pallas_tpu) stay out of the
op. They make 6 products instead of 2 + 5, and the TPU's compiler schedules them well (docs/benchmarks.md). But where
blocks are recomputed (remat "full", as in the real runs) the backward pass would make all 6 again for the sake of o,
17 products in place of 14, as JAX cannot drop one output of a kernel. Where o is saved it would be 11 in place of 12,
for an opt-in at each call: a custom_jvp rule also serves jax.grad, whose tangents must stay transposable.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, linear_call
from jaxtyping import Array

from . import choice
from .choice import choices, settle
from .implementations import IMPLEMENTATIONS, Implementation, seeing
from .masks import BlockCausal
from .reference import K, Q, Row

__all__ = ["IMPLEMENTATIONS", "Implementation", "choices", "flash_attention", "settle"]


def flash_attention(
    q: Q,
    k: K,
    v: K,
    *,
    scale: float | None = None,
    mask: BlockCausal | None = None,
    implementation: str = "auto",
) -> Q:
    """softmax(Q Kᵀ·scale) V.

    Args:
      q: [b, l, n, d], any float dtype.
      k: [b, m, n, d], same dtype; m may differ from l (cross-attention).
      v: [b, m, n, d], same dtype.
      scale: multiplies Q Kᵀ; d**-0.5 if None. A Python number, not differentiated.
      mask: which keys a query sees, a `kernels.masks.BlockCausal`; all of them if None. The queries
        are the last l of the m keys. What nobody sees is neither computed nor loaded.
      implementation: "auto", which takes for each pass what is right and fastest here, or one of choices().

    Returns:
      [b, l, n, d] in the dtype of q; computed in float32 at least. Products are made at
      Precision.HIGHEST for float32 and float64 inputs, for narrower ones as the backend does by
      default: it may round the factors, P too.

    Raises:
      ValueError: unknown implementation, one that does not run here or on such inputs, shapes that do not fit, or
        under a mask more queries than keys.
      TypeError: dtypes that are not floating point, or differ; a mask that is no BlockCausal.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    _check(q, k, v)
    _check_mask(mask, q.shape[1], k.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = choice.implementation(implementation, q.shape[-1], q.dtype, q.shape[1], mask is not None)
    o, _ = _attend(chosen, scale, mask, False, *_vary_alike(q, k, v))
    return o


def _check(q: Array, k: Array, v: Array):
    """Raises where q, k, v are not what flash_attention's docstring asks for."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"attention takes [batch, tokens, heads, features] arrays, got {shapes}: reshape them to four axes"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention takes one dtype, got q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"attention takes floating point arrays, got {q.dtype}: cast with .astype(jnp.float32)")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"keys and values must pair up, got {k.shape[1]} keys and {v.shape[1]} values: {shapes}")
    for axis, what in ((0, "batch sizes"), (2, "numbers of heads"), (3, "feature sizes")):
        if not q.shape[axis] == k.shape[axis] == v.shape[axis]:
            raise ValueError(
                f"attention takes equal {what} (axis {axis}) in q, k and v, got {shapes}: "
                "broadcast, repeat or project them before the call"
            )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"attention over nothing is undefined, got {shapes}: every axis must be at least 1 long")


def _check_mask(mask, l, m):
    """Raises where a mask is not what flash_attention's docstring asks for."""
    if mask is None:
        return
    if not isinstance(mask, BlockCausal):
        wanted, got = (f"{x.__module__}.{x.__qualname__}" for x in (BlockCausal, type(mask)))  # kernels has two names
        raise TypeError(
            f"attention takes a mask that is None or a {wanted}, got a {got}: "
            "a mask is static and never an array, so that kernels can skip what it hides"
        )
    if l > m:
        raise ValueError(
            f"under a mask the queries are the last of the keys, got {l} queries and {m} keys: "
            "give the keys of the queries too, behind those of the cache"
        )


def _vary_alike(*arrays: Array):
    """Inside shard_map, marks arrays as varying over every mesh axis that one of them varies over; else does nothing.

    JAX marks the operands of its own primitives so, and then sums cotangents over the added axes; the operands of a
    custom rule are ours to mark. It matters for text keys that are replicated where the queries are sharded.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(sorted(frozenset().union(*varying) - axes)) for axes in varying]
    return [jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing, strict=True)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _attend(implementation: Implementation, scale, mask, wide: bool, q: Q, k: K, v: K) -> tuple[Q, Row | None]:
    """(o, lse), differentiable: lse has no tangent. It is None unless o is wide: the value alone."""
    if not wide:
        return implementation.does("value")(q, k, v, scale, **seeing(mask)), None
    return implementation.forward(q, k, v, scale, wide, **seeing(mask))


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(implementation, scale, mask, wide, primals, tangents):
    # The op itself, not its forward function: an outer derivative (of a jvp, of a vjp) differentiates the value made
    # here, and its residuals are that inner value. So every level names its own; a policy keeps o once for each.
    o, lse = _attend(implementation, scale, mask, True, *primals)
    o, lse = checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")
    live = tuple(None if isinstance(t, SymbolicZero) else t for t in tangents)
    do = _push_forward(implementation, scale, mask, jax.lax.stop_gradient((*primals, o, lse)), live)
    if not wide:
        return (o.astype(primals[0].dtype), None), (do.astype(primals[0].dtype), None)
    return (o, lse), (do.astype(o.dtype), SymbolicZero(jax.typeof(lse).to_tangent_aval()))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _push_forward(implementation: Implementation, scale, mask, residuals, tangents) -> Q:
    """ȯ from residuals (q, k, v, o, lse) and tangents (dq, dk, dv), None for zero: linear in the tangents."""
    live = tuple(t is not None for t in tangents)
    return linear_call(
        lambda residuals, tangents: implementation.tangent(*residuals, *tangents, scale, **seeing(mask)),
        lambda residuals, g: implementation.backward(*residuals, g, live, scale, **seeing(mask)),
        residuals,
        tangents,
    )


@_push_forward.defjvp
def _push_forward_jvp(implementation, scale, mask, primals, tangents):
    # linear_call refuses residuals with tangents, even tangents that are arrays of zeros (as scan makes them).
    residuals, live = primals
    _, live_tangents = tangents
    do = _push_forward(implementation, scale, mask, residuals, live)
    return do, _push_forward(implementation, scale, mask, residuals, live_tangents)

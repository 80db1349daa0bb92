"""What a dense layer computes: products of operands as narrow as asked for, gradients of its parameters in float32.

A gradient is a sum over the rows of a batch, and so over devices. Products of bfloat16 would give it in bfloat16, and
XLA would add it up so: an error of 1 to 2 % over a hundred devices. JAX's own transposition of wider ones would make
products of float32 operands, at half the rate or less. So the derivative is spelled out here.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call
from jaxtyping import Array, Float

Rows = Float[Array, "... c"]
Kernel = Float[Array, "c f"]
Bias = Float[Array, " f"]
Out = Float[Array, "... f"]


def precision_of(dtype) -> jax.lax.Precision:
    """What makes products of that dtype exact to it. TPUs round float32 to bfloat16 unless asked, GPUs to TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else jax.lax.Precision.DEFAULT


def affine(x: Rows, kernel: Kernel, bias: Bias | None, dtype) -> Out:
    """x·kernel + bias in `dtype`, to which all are rounded; differentiable in both modes, any number of times.

    The gradients of kernel and bias are in their own dtypes, and never in one that is narrower.
    """
    x, narrow = x.astype(dtype), (kernel.astype(dtype), None if bias is None else bias.astype(dtype))
    if jnp.dtype(dtype).itemsize >= 4:
        return _value(x, *narrow)
    return _narrow(x, (kernel, bias), narrow)


def _value(x: Rows, kernel: Kernel, bias: Bias | None) -> Out:
    y = jnp.matmul(x, kernel, precision=precision_of(x.dtype))
    return y if bias is None else y + bias


@jax.custom_jvp
def _narrow(x: Rows, wide: tuple, narrow: tuple) -> Out:
    """The value is of what is narrow; the tangents of what is wide: `narrow` is made of it and counts once."""
    return _value(x, *narrow)


@functools.partial(_narrow.defjvp, symbolic_zeros=True)
def _narrow_jvp(primals, tangents):
    x, _, narrow = primals
    dx, (dkernel, dbias), _ = tangents
    live = tuple(None if isinstance(t, SymbolicZero) else t for t in (dx, dkernel, dbias))
    return _narrow(*primals), _push_forward((x, narrow[0]), live)


@jax.custom_jvp
def _push_forward(factors, tangents) -> Out:
    """dx·kernel + x·dkernel + dbias of factors (x, kernel), linear in the tangents (dx, dkernel, dbias). None is zero.

    A tangent is None where its factor is; one that is wide is rounded here, and its cotangent is wide.
    """

    def forward(factors, tangents):
        (x, kernel), (dx, dkernel, dbias) = factors, tangents
        terms = [] if dx is None else [_value(dx, kernel, None)]
        terms += [] if dkernel is None else [_value(x, dkernel.astype(x.dtype), None)]
        terms += [] if dbias is None else [jnp.broadcast_to(dbias, (*x.shape[:-1], *dbias.shape)).astype(x.dtype)]
        return sum(terms[1:], terms[0])

    def transposed(factors, g):
        (x, kernel), (dx, dkernel, dbias) = factors, tangents
        rows, last = tuple(range(g.ndim - 1)), g.ndim - 1
        # The kernel as it is, not turned: what is gathered from other devices is then one array in both passes.
        to_x = None if dx is None else jax.lax.dot_general(g, kernel, (((last,), (1,)), ((), ()))).astype(dx.dtype)
        to_kernel = None if dkernel is None else jax.lax.dot_general(
            x, g, ((rows, rows), ((), ())), preferred_element_type=dkernel.dtype
        )  # fmt: skip
        to_bias = None if dbias is None else jnp.sum(g, rows, dtype=dbias.dtype)
        return to_x, to_kernel, to_bias

    return linear_call(forward, transposed, factors, tangents)


@functools.partial(_push_forward.defjvp, symbolic_zeros=True)
def _push_forward_jvp(primals, tangents):
    live = jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t, tangents, is_leaf=lambda t: isinstance(t, SymbolicZero)
    )
    (x, kernel), (dx, dkernel, _) = primals
    (x_dot, kernel_dot), moved = live
    # Linear in its tangents, and so in its factors: there with the tangents in the place of the factors.
    crossed = (x_dot if dkernel is not None else None, kernel_dot if dx is not None else None, None)
    pairs = ((x, kernel), moved), ((dx, None if dkernel is None else dkernel.astype(_dtype((x, kernel)))), crossed)
    out = _push_forward(*primals)
    terms = [_push_forward(*pair) for pair in pairs if any(tangent is not None for tangent in pair[1])]
    return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)


def _dtype(factors):
    return next(factor.dtype for factor in factors if factor is not None)

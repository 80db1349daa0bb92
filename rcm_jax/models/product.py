"""The product of a dense layer: operands as narrow as asked for, every sum in float32 at least.

A sum over the rows of a batch is also one over devices. With narrow outputs XLA would add the gradients of kernels up
in bfloat16 there: an error of 1 to 2 % over a hundred devices. JAX's own transposition would make products of float32
operands of them, which run at a half of the rate or less: so the derivative is spelled out here.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call
from jaxtyping import Array, Float

Rows = Float[Array, "... c"]
Kernel = Float[Array, "c f"]
Out = Float[Array, "... f"]


def precision_of(dtype) -> jax.lax.Precision:
    """What makes products of that dtype exact to it. TPUs round float32 to bfloat16 unless asked, GPUs to TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else jax.lax.Precision.DEFAULT


def product(x: Rows, kernel: Kernel, dtype) -> Out:
    """x·kernel of operands rounded to `dtype`, in float32 at least; both modes, any number of derivatives."""
    if jnp.dtype(dtype).itemsize >= 4:
        return _contract(dtype, x, kernel, -1, 0)
    return _narrow(dtype, x, kernel)


def _contract(dtype, x: Array, y: Array, x_axes: int | Sequence[int], y_axes: int | Sequence[int]) -> Array:
    """The sum over those axes, as many of each."""
    axes = [[a % z.ndim for a in ([at] if isinstance(at, int) else at)] for z, at in ((x, x_axes), (y, y_axes))]
    return jax.lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (axes, ((), ())),
        precision=precision_of(dtype),
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _narrow(dtype, x: Rows, kernel: Kernel) -> Out:
    return _contract(dtype, x, kernel, -1, 0)


@functools.partial(_narrow.defjvp, symbolic_zeros=True)
def _narrow_jvp(dtype, primals, tangents):
    return _narrow(dtype, *primals), _push_forward(dtype, primals, _live(tangents))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _push_forward(dtype, factors, tangents) -> Out:
    """dx·kernel + x·dkernel of factors (x, kernel), linear in the tangents (dx, dkernel). None is zero.

    A tangent is None where the other factor is.
    """

    def forward(factors, tangents):
        (x, kernel), (dx, dkernel) = factors, tangents
        terms = [_contract(dtype, a, b, -1, 0) for a, b in ((dx, kernel), (x, dkernel)) if _are_there(a, b)]
        return sum(terms[1:], terms[0])

    def transposed(factors, g):
        (x, kernel), (dx, dkernel) = factors, tangents
        rows = range(g.ndim - 1)
        to_x = None if dx is None else _contract(dtype, g, kernel, -1, 1).astype(dx.dtype)
        to_kernel = None if dkernel is None else _contract(dtype, x, g, rows, rows).astype(dkernel.dtype)
        return to_x, to_kernel

    return linear_call(forward, transposed, factors, tangents)


@functools.partial(_push_forward.defjvp, symbolic_zeros=True)
def _push_forward_jvp(dtype, primals, tangents):
    # As it is linear in its tangents, it is in its factors: with the tangents in their place.
    out, terms = _push_forward(dtype, *primals), []
    for (x, kernel), (dx, dkernel) in zip(primals, (_live(tangents[1]), _live(tangents[0])), strict=True):
        both = dx if _are_there(dx, kernel) else None, dkernel if _are_there(x, dkernel) else None
        if any(tangent is not None for tangent in both):
            terms.append(_push_forward(dtype, (x, kernel), both))
    return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)


def _live(tangents):
    return tuple(None if isinstance(t, SymbolicZero) else t for t in tangents)


def _are_there(*arrays) -> bool:
    return all(array is not None for array in arrays)

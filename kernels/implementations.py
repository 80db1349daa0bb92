"""The implementations of attention by name: for each pass of `kernels.attention` a function, or none."""

import functools
from typing import Any, NamedTuple

import jax

from . import blockwise, cudnn, fa4, pallas_tpu, reference, triton

PASSES: tuple[str, ...] = ("value", "forward", "tangent", "backward")


class Implementation(NamedTuple):
    """Functions with the signatures of those of `kernels.reference`; None: it has none.

    forward(q, k, v, scale, wide, mask=None) -> (o, lse), with o in the dtype of q or, wide, in that of lse
    tangent(q, k, v, o, lse, dq, dk, dv, scale, mask=None) -> do, where a None tangent is zero and costs nothing
    backward(q, k, v, o, lse, g, live, scale, mask=None) -> (dq, dk, dv), None where `live` is False: the transpose
    value(q, k, v, scale, mask=None) -> o in the dtype of q, where nobody differentiates; by default that of forward

    The derivatives take an o of either dtype; a wide one spares them an error (`kernels.reference`).
    mask is a `kernels.masks.BlockCausal`, or left out: all keys are seen.
    """

    forward: Any = None
    tangent: Any = None
    backward: Any = None
    value: Any = None

    def does(self, name: str) -> Any:
        """The function of one of PASSES, or None."""
        if name == "value" and self.value is None and self.forward is not None:
            return _first_of(self.forward)
        return getattr(self, name)


@functools.cache  # the same function each time: it is part of the keys of compiled programs
def _first_of(forward):
    return lambda q, k, v, scale, **mask: forward(q, k, v, scale, False, **mask)[0]


def seeing(mask) -> dict:
    """The mask's argument, left out where there is none: an implementation need not know of masks."""
    return {} if mask is None else {"mask": mask}


def _varying(function):
    """Inside shard_map the results vary over the mesh axes that an argument varies over; a library may not say so."""

    @functools.wraps(function)
    def marked(*args, **options):
        out = function(*args, **options)
        axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(args) if isinstance(x, jax.Array)))
        return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(sorted(axes - _axes(x))), to="varying"), out)

    return marked


def _axes(x: jax.Array):
    return jax.typeof(x).manual_axis_type.varying


IMPLEMENTATIONS = {
    "reference": Implementation(reference.forward, reference.tangent, reference.backward),
    "blockwise": Implementation(blockwise.forward, blockwise.tangent, blockwise.backward),
    "triton": Implementation(triton.forward, triton.tangent, triton.backward),  # imports jax-triton when called
    "pallas_tpu": Implementation(pallas_tpu.forward, pallas_tpu.tangent, pallas_tpu.backward),
    "fa4": Implementation(*map(_varying, (fa4.forward, fa4.tangent, fa4.backward, fa4.value))),
    "cudnn": Implementation(value=_varying(cudnn.value)),
}
KERNELS = {"gpu": "triton", "tpu": "pallas_tpu"}  # ours, by the backend that they are made for

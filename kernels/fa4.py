"""FlashAttention-4 by fa4-jax (Python 3.12 and later): kernels for NVIDIA GPUs of compute capability 8.0 and later.

    pip install 'rcm-jax[cuda12,fa4]'
    pip install 'rcm-jax[cuda13,fa4]' 'fa4-jax[cu13]'

bfloat16 and float16, features in multiples of 8, up to 128. O leaves its kernels rounded to the dtype of the inputs,
also as `wide`: the tangent and the gradients inherit that error (docs/precision.md), and tangents of zero cost as much
as others.
"""

import jax
import jax.numpy as jnp

from .reference import Gradients, K, Live, Q, Row

INSTALL = "pip install 'rcm-jax[fa4]', with Python 3.12 or later"
DTYPES = ("bfloat16", "float16")
BACKEND = "cute"  # its kernels; "reference" is its plain jnp


def missing() -> str:
    """Why fa4-jax cannot be used here; "" if it can."""
    try:
        import fa4_jax.attention  # noqa: F401
    except ImportError:
        return f"fa4-jax is not installed: {INSTALL}"
    return ""


def value(q: Q, k: K, v: K, scale, mask=None) -> Q:
    """O in the dtype of q."""
    return _backend(q, mask).fwd(_config(scale), q, k, v, ())


def forward(q: Q, k: K, v: K, scale, wide=False, mask=None) -> tuple[Q, Row]:
    """(O, lse); `wide` makes O float32, but not more precise."""
    o, lse = _backend(q, mask).fwd_lse(_config(scale), q, k, v, ())
    return o.astype(lse.dtype if wide else q.dtype), lse


def tangent(q: Q, k: K, v: K, o: Q, lse: Row, dq: Q | None, dk: K | None, dv: K | None, scale, mask=None) -> Q:
    """Ȯ along (dq, dk, dv), of which None stands for zero."""
    dq, dk, dv = (jnp.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    do, _ = _backend(q, mask).tangent(_config(scale), q, k, v, o.astype(q.dtype), lse, dq, dk, dv, ())
    return do


def backward(q: Q, k: K, v: K, o: Q, lse: Row, g: Q, live: Live, scale, mask=None) -> Gradients:
    """From g, the cotangent of Ȯ, to those of (dq, dk, dv), None where `live` is False."""
    gradients = _backend(q, mask).vjp(_config(scale), q, k, v, o.astype(q.dtype), lse, g, None, ())
    dq, dk, dv = (x if alive else None for x, alive in zip(gradients, live, strict=True))
    return dq, dk, dv


def _config(scale):
    from fa4_jax.attention import AttnConfig

    return AttnConfig(False, False, (None, None), float(scale), None, BACKEND)


def _backend(q: Q, mask):
    """What runs the passes of fa4-jax. ValueError where it cannot, or does not take such queries."""
    if reason := missing():
        raise ValueError(reason)
    if mask is not None:
        raise ValueError("FlashAttention-4 takes no mask of chunks")
    if q.dtype not in DTYPES:
        raise ValueError(f"FlashAttention-4 takes {' and '.join(DTYPES)}, got {q.dtype}")
    if BACKEND == "cute" and jax.default_backend() != "gpu":
        raise ValueError(f"FlashAttention-4 needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}")
    from fa4_jax.attention import get_backend

    try:
        return get_backend(BACKEND)
    except ImportError as error:
        raise ValueError(f"fa4-jax lacks a library ({error}): {INSTALL}") from error

"""cuDNN's attention on NVIDIA GPUs, by `jax.nn.dot_product_attention`: its value alone.

Derivatives are not made from it. They need O in float32 (docs/precision.md), cuDNN rounds it to the dtype of the
inputs, and JAX rounds its log-sum-exp as well.
"""

import jax

from .reference import K, Q

DTYPES = ("bfloat16", "float16")


def value(q: Q, k: K, v: K, scale, mask=None) -> Q:
    """O in the dtype of q. ValueError where cuDNN is not there, or does not take the inputs."""
    if mask is not None:
        raise ValueError("cuDNN's attention takes no mask of chunks")
    if q.dtype not in DTYPES:
        raise ValueError(f"cuDNN's attention takes {' and '.join(DTYPES)}, got {q.dtype}")
    try:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    except (RuntimeError, NotImplementedError) as error:  # no cuDNN; a number of features it does not take
        raise ValueError(f"cuDNN's attention: {error}") from error

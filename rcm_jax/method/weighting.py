"""The adaptive weighting of the sCM paper (arXiv 2410.11081, equation 8): a log weight w(t), learned with the student.

Here w(t) − ln D is linear in cosines and sines of the time, as in EDM2 (arXiv 2312.02696): 33 numbers, all 0 at first,
where the loss ‖·‖²·e^w/D is the plain one, whatever the dimension D.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.method.trigflow import Times

FREQUENCIES = 2.0 ** np.arange(0, 4, 0.25)  # per radian


def init() -> dict:
    """Parameters with w = ln D everywhere."""
    return {"kernel": jnp.zeros(2 * len(FREQUENCIES)), "bias": jnp.zeros(())}


def log_weight(params, t: Times, size: int) -> Times:
    """w [b] at times t [b], for D = size numbers in a sample."""
    angles = t[:, None] * FREQUENCIES
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return np.log(size) + jnp.matmul(features, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]


def adaptive(loss: Times, log_weight: Times, size: int) -> Times:
    """e^w/D·loss − w [b]: the loss weighted, for D = size numbers in a sample."""
    return jnp.exp(log_weight) / size * loss - log_weight

"""What tests of adapters share: adapters of tiny networks, and the same network with them merged."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rcm_jax import models
from rcm_jax.models import adapters, network_of
from rcm_jax.models.adapters import A, AdapterConfig, B, flat


def boxed(model):
    """Abstract, boxed parameters of a network."""
    return jax.eval_shape(lambda key: models.init(model, key), jax.random.key(0))


def drawn(model, config: AdapterConfig, key: int = 0, dtype="float32") -> dict:
    """An adapter of which nothing is zero."""
    start = nn.meta.unbox(adapters.init(config, network_of(model).adapted, boxed(model), jax.random.key(key)))
    rng = np.random.default_rng(key)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape), dtype), start)


def merged(base, adapter, scale: float) -> dict:
    """base with every kernel replaced by kernel + scale·A·B, in the dtype of base."""
    leaves, found = flat(base), flat(adapter)
    for path in {path.rpartition("/")[0] for path in found}:
        kernel = leaves[f"{path}/kernel"]
        leaves[f"{path}/kernel"] = kernel + scale * jnp.matmul(found[f"{path}/{A}"], found[f"{path}/{B}"])
    return unflatten_dict(leaves, sep="/")


def with_dtype(model, dtype: str):
    """A config that computes in that dtype."""
    return dataclasses.replace(
        model, **{f.name: dtype for f in dataclasses.fields(model) if f.name in ("dtype", "time_dtype")}
    )

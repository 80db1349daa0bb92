"""What networks that give features of images share: their record, convolutions with batch norms, resizing."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.models.product import precision_of
from rcm_jax.models.records import NONE

EPSILON = 1e-3  # of all batch norms here


class FeatureNetwork(NamedTuple):
    """module(config) is applied to images [b, h, w, 3] in 0..255, of any size: {name: features [b, f]}, float32."""

    config: type
    module: type[nn.Module]
    published: Mapping[str, Any] = NONE

    def init(self, config, key):
        """Plain parameters, boxed as those of the other networks are."""
        params = self.module(config).init(key, jnp.zeros((1, 8, 8, 3)))["params"]  # pyright: ignore[reportArgumentType]
        return jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), params)


class BatchNorm(nn.Module):
    """With the statistics that it was trained to: a scale and a shift for each channel."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        mean, var, scale, bias = (
            self.param(name, init, (x.shape[-1],), jnp.float32)
            for name, init in (("mean", zeros), ("var", ones), ("scale", ones), ("bias", zeros))
        )
        return (x - mean) * (scale / jnp.sqrt(var + EPSILON)) + bias


class Convolution(nn.Module):
    """One without a bias, in float32; `groups` as many as channels: each by itself."""

    features: int
    window: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"
    groups: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b s u f"]:
        shape = (*self.window, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups, precision=precision_of(x.dtype),
        )  # fmt: skip


class Affine(nn.Module):
    """(x·kernel + bias, x·kernel), in float32."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> tuple[Float[Array, "b f"], Float[Array, "b f"]]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        y = jnp.matmul(x, kernel, precision=precision_of(x.dtype))
        return y + bias, y


def resize_as_tensorflow(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b size size c"]:
    """Bilinear, as TensorFlow 1 did it: output pixel i is at i·h/size of the input (no shift by half a pixel), between
    two neighbours (no antialiasing). Positions are float32, as in the implementations that published numbers used."""
    for axis in (1, 2):
        old = x.shape[axis]
        place = np.arange(size, dtype=np.float32) * np.float32(old / size)
        low = place.astype(np.int32)
        part = jnp.expand_dims(jnp.asarray(place - low), [a for a in range(4) if a != axis])
        left, right = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, old - 1)))
        x = left + (right - left) * part
    return x

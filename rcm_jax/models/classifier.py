"""A small convolutional classifier: judge and feature extractor for small images."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.models.product import precision_of


class ClassifierNet(nn.Module):
    """Logits and features of images, all float32.

    Two resolutions, no normalisation layers, no dropout: the output is a function of parameters and images alone.
    Features are taken before the last non-linearity, where they are closer to a Gaussian than rectified ones, which
    is what the Fréchet distance assumes. h and w are fixed by the first call (the last layers see every position).
    """

    num_classes: int
    features: int = 64
    width: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b num_classes"], Float[Array, "b features"]]:
        x = x.astype(jnp.float32)
        conv, dense = (functools.partial(layer, precision=precision_of(x.dtype)) for layer in (nn.Conv, nn.Dense))
        x = nn.gelu(conv(self.width, (3, 3), name="conv_0")(x))
        x = nn.gelu(conv(2 * self.width, (3, 3), strides=(2, 2), name="conv_1")(x))
        x = nn.gelu(conv(2 * self.width, (3, 3), name="conv_2")(x))
        features = dense(self.features, name="features")(x.reshape(x.shape[0], -1))
        return dense(self.num_classes, name="logits")(nn.gelu(features)), features

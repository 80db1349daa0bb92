"""The causal video autoencoder of Wan2.2 TI2V-5B (wan/modules/vae2_2.py of Wan-Video/Wan2.2).

That of Wan2.1 on patches of 2×2 pixels: 16 rows and columns of pixels are one of latents. Each stage also has a
shortcut from its start to its end, that has no parameters: means of neighbours where it shrinks, copies where it grows.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.models.records import Autoencoder
from rcm_jax.models.wan_vae import (
    Block,
    Downsample,
    Upsample,
    Video,
    WanVAEConfig,
    check_latents,
    check_pixels,
    conv,
    half,
    init_halves,
    middle,
    through,
)
from rcm_jax.util.ranges import Few, Finite, Positive, Width, config

LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@config
class Wan22VAEConfig(WanVAEConfig):
    """Sizes under the reference's names; defaults are those of the published network."""

    dim: Width = 160  # channels of the encoder at full resolution
    z_dim: Width = 48
    latents_mean: tuple[Finite, ...] = LATENT_MEAN
    latents_std: tuple[Positive, ...] = LATENT_STD
    dec_dim: Width = 256  # as dim, of the decoder
    patch_size: Few = 2  # rows and columns of pixels that are channels of one place

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels to one of latents."""
        step, *sides = super().stride
        return step, sides[0] * self.patch_size, sides[1] * self.patch_size

    @property
    def shrinking(self) -> tuple[tuple[int, int], ...]:
        """By how much each stage of the encoder has fewer frames, and rows and columns."""
        return (*((1 + in_time, 2) for in_time in self.temperal_downsample), (1, 1))

    @property
    def growing(self) -> tuple[tuple[int, int], ...]:
        """By how much each stage of the decoder has more of them."""
        return (*self.shrinking[-2::-1], (1, 1))

    def __post_init__(self):
        super().__post_init__()
        mults = self.dim_mult
        down = [
            (few * time * side**2, many)
            for few, many, (time, side) in zip((1, *mults), mults, self.shrinking, strict=False)
        ]
        back = mults[::-1]
        up = [
            (few * time * side**2, many)
            for many, few, (time, side) in zip(back[:1] + back, back, self.growing[:-1], strict=False)
        ]
        if wrong := [(whole, part) for whole, part in down + up if whole % part]:
            raise ValueError(
                f"dim_mult {mults}: shortcuts would put {wrong[0][0]} times dim channels into groups of {wrong[0][1]}; "
                "take multiples and divisors of each other"
            )


PUBLISHED = {"wan2.2-vae": Wan22VAEConfig()}


def fold(x: Video, side: int) -> Float[Array, "b t h/side w/side c*side*side"]:
    """Squares of pixels as channels: by colour, then by column, then by row."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h // side, side, w // side, side, c).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(b, t, h // side, w // side, c * side**2)


def unfold(x: Video, side: int) -> Float[Array, "b t side*h side*w c/(side*side)"]:
    """The inverse of fold."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, c // side**2, side, side).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(b, t, h * side, w * side, c // side**2)


def shrunk(x: Video, time: int, side: int, features: int) -> Float[Array, "b t/time h/side w/side features"]:
    """Means over neighbours and channels. The frame that a video of an odd number lacks is one of zeros before it."""
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // time, time, h // side, side, w // side, side, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], features, -1).mean(axis=-1)


def grown(x: Video, time: int, side: int, features: int, *, start: bool) -> Float[Array, "b s side*h side*w features"]:
    """Copies of channels as neighbours. At the start of a video the first frame stays one: its last copy."""
    b, t, h, w, c = x.shape
    x = x.repeat(features * time * side**2 // c, axis=-1)
    x = x.reshape(b, t, h, w, features, time, side, side).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, t * time, h * side, w * side, features)[:, time - 1 if start else 0 :]


class Stage(nn.Module):
    """Blocks at one resolution, perhaps to another, beside a shortcut: (frames, rows and columns) is `factors`, of how
    many one is made (down) or which are made of one. The last stage of a decoder has no shortcut."""

    features: int
    blocks: int
    factors: tuple[int, int]
    down: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Video, cache: dict) -> tuple[Video, dict]:
        time, side = self.factors
        layers: list[nn.Module] = [Block(self.features, self.dtype, name=f"block_{i}") for i in range(self.blocks)]
        if side > 1 and self.down:
            layers.append(Downsample(time > 1, self.dtype, name="resample"))
        elif side > 1:
            layers.append(Upsample(time > 1, self.dtype, halving=False, name="resample"))
        y, after = through(x, cache, layers)
        if self.down:
            y = y + shrunk(x, time, side, self.features)
        elif side > 1:
            y = y + grown(x, time, side, self.features, start=not cache)
        return y, after


def _stages(dim: int, dim_mult: Sequence[int], blocks: int, factors, *, down: bool, dtype: str) -> list[nn.Module]:
    """All of them, in their order."""
    return [
        Stage(dim * mult, blocks, of, down, dtype, name=f"stage_{i}")
        for i, (mult, of) in enumerate(zip(dim_mult, factors, strict=True))
    ]


class Encoder(nn.Module):
    """(pixels in [-1, 1], cache) -> (mean mu of the latents, cache): wan_vae.Encoder, but for 16 rows and columns."""

    config: Wan22VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w 3"], cache: dict) -> tuple[Float[Array, "b s h/16 w/16 z_dim"], dict]:
        c = self.config
        check_pixels(c, x.shape, started=bool(cache))
        layers = _stages(c.dim, c.dim_mult, c.num_res_blocks, c.shrinking, down=True, dtype=c.dtype)
        layers += middle(c.dim * c.dim_mult[-1], c.dtype)
        x, cache = half(fold(x, c.patch_size), cache, layers, (c.dim, 2 * c.z_dim), c.dtype)
        moments = conv(2 * c.z_dim, (1, 1, 1), "moments", c.dtype)(x)
        return moments[..., : c.z_dim].astype(c.wide), cache  # the rest is the logarithm of the variance


class Decoder(nn.Module):
    """(latents mu, cache) -> (pixels, cache): wan_vae.Decoder, but for 16 rows and columns."""

    config: Wan22VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w z_dim"], cache: dict) -> tuple[Float[Array, "b s 16*h 16*w 3"], dict]:
        c = self.config
        check_latents(c, x.shape)
        features = c.dec_dim * c.dim_mult[-1]
        layers = middle(features, c.dtype)
        layers += _stages(c.dec_dim, c.dim_mult[::-1], c.num_res_blocks + 1, c.growing, down=False, dtype=c.dtype)
        x = conv(c.z_dim, (1, 1, 1), "latents", c.dtype)(x)
        x, cache = half(x, cache, layers, (features, 3 * c.patch_size**2), c.dtype)
        return unfold(x, c.patch_size).astype(c.wide), cache


def init(config: Wan22VAEConfig, key):
    """Boxed parameters (with logical axes) {"encoder": …, "decoder": …} for that config, for videos of any size."""
    return init_halves(config, Encoder, Decoder, key)


AUTOENCODER = Autoencoder(Wan22VAEConfig, Encoder, Decoder, check_pixels, check_latents, PUBLISHED)

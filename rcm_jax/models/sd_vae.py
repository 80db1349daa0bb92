"""The image autoencoder of Stable Diffusion (AutoencoderKL of diffusers), whose latents ImageNet 512×512 is learned in.

It knows no time: frames are encoded one by one, and there is no cache.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.kernels.attention import flash_attention  # pyright: ignore[reportMissingImports]
from rcm_jax.models.layers import Config, Dtype, at_least_float32, dense, with_axes
from rcm_jax.models.records import Autoencoder
from rcm_jax.models.wan_vae import check_latents, check_pixels, conv
from rcm_jax.util.ranges import Few, Finite, Positive, Width, config

# Of the latents of ImageNet at 512×512, by channel, as the sCM paper has them (arXiv 2410.11081, appendix G.1), for
# pixels in [-1, 1], as the autoencoder was trained on. Those of EDM2 are others: it encodes pixels in [0, 1]. The two
# do not go together, nor do networks that were trained on the one or the other.
LATENT_MEAN, LATENT_STD = (1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)
Image = Float[Array, "b h w c"]  # of pixels, of latents or between


@config
class SdVaeConfig(Config):
    """Sizes under the names of diffusers; defaults are those of stabilityai/sd-vae-ft-mse."""

    block_out_channels: tuple[Width, ...] = (128, 256, 512, 512)  # of every stage; each but the last halves the sides
    layers_per_block: Few = 2  # of a stage of the encoder; the decoder has one more
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    latents_mean: tuple[Finite, ...] = LATENT_MEAN  # by channel: x0 = (mean of the latents − this)/latents_std
    latents_std: tuple[Positive, ...] = LATENT_STD
    dtype: Dtype = "float32"  # of the computation; norms and attention are float32 at least

    @property
    def z_dim(self) -> int:
        """Channels of the latents."""
        return self.latent_channels

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels to one of latents."""
        side = 2 ** (len(self.block_out_channels) - 1)
        return 1, side, side

    def __post_init__(self):
        if not self.block_out_channels or any(n % self.norm_num_groups for n in self.block_out_channels):
            raise ValueError(
                f"block_out_channels {self.block_out_channels} must be multiples of norm_num_groups "
                f"{self.norm_num_groups}, one or more"
            )
        if {len(self.latents_mean), len(self.latents_std)} != {self.z_dim}:
            raise ValueError(
                f"latents_mean and latents_std must be latent_channels = {self.z_dim} numbers each, got "
                f"{self.latents_mean} and {self.latents_std}"
            )


PUBLISHED = {"sd-vae-ft-mse": SdVaeConfig()}


def norm(config: SdVaeConfig, name: str, x: Image) -> Image:
    """Group norm with scale and bias, in float32 at least; returns what it computed in."""
    module = nn.GroupNorm(
        config.norm_num_groups, epsilon=1e-6, use_fast_variance=False, name=name,
        scale_init=with_axes(nn.initializers.ones, "vector"), bias_init=with_axes(nn.initializers.zeros, "vector"),
    )  # fmt: skip
    return module(at_least_float32(x))


class Block(nn.Module):
    """Two convolutions, each of the normalised SiLU, residual."""

    config: SdVaeConfig
    features: int

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "b h w f"]:
        h, dtype = x, self.config.dtype
        for i in (1, 2):
            h = nn.silu(norm(self.config, f"norm{i}", h)).astype(dtype)
            h = conv(self.features, (3, 3), f"conv{i}", dtype)(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, (1, 1), "shortcut", dtype)(x)
        return x + h


class Attention(nn.Module):
    """Every place attends to all, with one head, residual."""

    config: SdVaeConfig

    @nn.compact
    def __call__(self, x: Image) -> Image:
        (b, h, w, c), dtype = x.shape, self.config.dtype
        tokens = norm(self.config, "norm", x).astype(dtype).reshape(b, h * w, c)
        q, k, v = (dense(c, name, dtype=dtype)(tokens)[:, :, None] for name in ("query", "key", "value"))
        # Not "auto": a head as wide as the model is not what the kernels are made for.
        o = flash_attention(q, k, v, implementation="blockwise")
        return x + dense(c, "out", dtype=dtype)(o.reshape(x.shape))


def _middle(c: SdVaeConfig, x: Image) -> Image:
    """The layers at the lowest resolution."""
    x = Attention(c, name="middle_attention")(Block(c, c.block_out_channels[-1], name="middle_block_0")(x))
    return Block(c, c.block_out_channels[-1], name="middle_block_1")(x)


def _last(c: SdVaeConfig, x: Image, features: int) -> Image:
    return conv(features, (3, 3), "conv_out", c.dtype)(nn.silu(norm(c, "norm_out", x)).astype(c.dtype))


class Encoder(nn.Module):
    """(pixels in [-1, 1], cache) -> (mean of the latents, cache), frame by frame: the cache stays empty.

    The mean is float32 at least. ValueError for sizes that are no multiples of the stride, with the nearest.
    """

    config: SdVaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w 3"], cache: dict) -> tuple[Float[Array, "b t h/8 w/8 z"], dict]:
        c = self.config
        check_pixels(c, x.shape)
        b, t = x.shape[:2]
        x = conv(c.block_out_channels[0], (3, 3), "conv_in", c.dtype)(x.reshape(-1, *x.shape[2:]).astype(c.dtype))
        for i, features in enumerate(c.block_out_channels):
            for j in range(c.layers_per_block):
                x = Block(c, features, name=f"stage_{i}_block_{j}")(x)
            if i < len(c.block_out_channels) - 1:
                edge = ((0, 1), (0, 1))  # below and on the right alone
                x = conv(features, (3, 3), f"stage_{i}_resample", c.dtype, strides=2, padding=edge)(x)
        x = _last(c, _middle(c, x), 2 * c.z_dim)
        mean = conv(2 * c.z_dim, (1, 1), "moments", c.dtype)(x)[..., : c.z_dim]  # the rest is the log of the variance
        return mean.astype(c.wide).reshape(b, t, *mean.shape[1:]), cache


class Decoder(nn.Module):
    """(latents, not of unit variance, cache) -> (pixels, cache), frame by frame: the cache stays empty.

    Pixels are float32 at least and may leave [-1, 1] a little. ValueError for inputs of other shapes.
    """

    config: SdVaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w z"], cache: dict) -> tuple[Float[Array, "b t 8*h 8*w 3"], dict]:
        c = self.config
        check_latents(c, x.shape)
        b, t = x.shape[:2]
        x = conv(c.z_dim, (1, 1), "latents", c.dtype)(x.reshape(-1, *x.shape[2:]).astype(c.dtype))
        x = _middle(c, conv(c.block_out_channels[-1], (3, 3), "conv_in", c.dtype)(x))
        for i, features in enumerate(c.block_out_channels[::-1]):
            for j in range(c.layers_per_block + 1):
                x = Block(c, features, name=f"stage_{i}_block_{j}")(x)
            if i < len(c.block_out_channels) - 1:
                x = conv(features, (3, 3), f"stage_{i}_resample", c.dtype)(x.repeat(2, axis=1).repeat(2, axis=2))
        x = _last(c, x, 3)
        return x.astype(c.wide).reshape(b, t, *x.shape[1:]), cache


def init(config: SdVaeConfig, key):
    """Boxed parameters (with logical axes) {"encoder": …, "decoder": …} for that config, for images of any size."""
    pixels, latents = jnp.zeros((1, *config.stride, 3)), jnp.zeros((1, 1, 1, 1, config.z_dim))
    keys = jax.random.split(key)
    return {
        "encoder": Encoder(config).init(keys[0], pixels, {})["params"],
        "decoder": Decoder(config).init(keys[1], latents, {})["params"],
    }


AUTOENCODER = Autoencoder(SdVaeConfig, Encoder, Decoder, check_pixels, check_latents, PUBLISHED)

"""The causal video autoencoder of Wan2.1 (wan/modules/vae.py of Wan-Video/Wan2.1) and of Cosmos-Predict2 2B and 14B.

No layer sees a later frame, so a video streams through in chunks: every layer takes the last frames that it saw before,
its cache, and returns those for the next chunk. A cache is a dict of arrays; an empty one is the start of a video. The
same code takes a whole video at once. The first frame stands alone; after it, four frames of pixels are one of latents.
"""

import math
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.kernels.attention import flash_attention  # pyright: ignore[reportMissingImports]
from rcm_jax.models.layers import Config, Dtype, at_least_float32, with_axes
from rcm_jax.models.product import precision_of
from rcm_jax.models.records import Autoencoder
from rcm_jax.util.ranges import Few, Finite, Positive, Width, config, only

# Of the latents of the published weights, by channel: x0 = (mu − mean)/std has unit variance.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)  # fmt: skip
Video = Float[Array, "b t h w c"]  # of pixels, of latents or between


@config
class WanVAEConfig(Config):
    """Sizes under the reference's names; defaults are those of the published network."""

    dim: Width = 96  # channels at full resolution
    z_dim: Width = 16  # channels of the latents
    dim_mult: tuple[Few, ...] = (1, 2, 4, 4)  # times dim: channels of every stage
    num_res_blocks: Few = 2  # of a stage of the encoder; the decoder has one more
    attn_scales: Annotated[tuple[Finite, ...], only(())] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # are frames halved as rows and columns are, by stage
    dropout: Annotated[float, only(0)] = 0.0
    latents_mean: tuple[Finite, ...] = LATENT_MEAN  # by channel of the latents, which belong to the weights
    latents_std: tuple[Positive, ...] = LATENT_STD
    dtype: Dtype = "float32"  # of the computation; norms and attention are float32 at least

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels to one of latents."""
        side = 2 ** len(self.temperal_downsample)
        return 2 ** sum(self.temperal_downsample), side, side

    def __post_init__(self):
        if len(self.dim_mult) != len(self.temperal_downsample) + 1:
            raise ValueError(
                f"dim_mult {self.dim_mult} must be one number more than those of temperal_downsample "
                f"{self.temperal_downsample}"
            )
        if {len(self.latents_mean), len(self.latents_std)} != {self.z_dim}:
            raise ValueError(
                f"latents_mean and latents_std must be z_dim = {self.z_dim} numbers each, got "
                f"{self.latents_mean} and {self.latents_std}"
            )
        if any(self.dim * mult % 2 for mult in self.dim_mult[1:]):
            raise ValueError(f"dim {self.dim} times dim_mult {self.dim_mult[1:]} must be even: upsampling halves it")


PUBLISHED = {"wan2.1-vae": WanVAEConfig()}


class Norm(nn.Module):
    """x / rms(x) · scale over the channels, in float32 at least; returns the dtype of x. Zeros stay zeros."""

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        c = x.shape[-1]
        scale = self.param("scale", with_axes(nn.initializers.ones, "vector"), (c,))
        wide = at_least_float32(x)
        length = jnp.linalg.norm(wide, axis=-1, keepdims=True)
        return (wide / jnp.maximum(length, 1e-12) * math.sqrt(c) * scale).astype(x.dtype)


def conv(features: int, window, name: str, dtype, *, strides: int | tuple = 1, padding: str | tuple = "SAME"):
    """nn.Conv with logical axes on its parameters; over rows and columns of every frame if the window has two sides."""
    axes = (*("vector" for _ in window), "embed", "features")
    return nn.Conv(
        features,
        window,
        strides=strides,
        padding=padding,
        dtype=dtype,
        precision=precision_of(dtype),
        name=name,
        kernel_init=with_axes(nn.initializers.lecun_normal(), *axes),
        bias_init=with_axes(nn.initializers.zeros, "vector"),
    )


def no_frames(x: Video) -> Float[Array, "b 2 h w c"]:
    """What a causal convolution sees before the first frame of x: two frames of zeros."""
    return jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:]))


def causal_conv(x: Video, past: Video | None, features: int, name: str, dtype, side: int = 3) -> tuple[Video, Video]:
    """(convolution over each frame of x and the two before it, the last two frames); past [b, 2, …], or None: zeros."""
    x = jnp.concatenate([no_frames(x) if past is None else past, x], axis=1)
    edge = (side // 2, side // 2)
    return conv(features, (3, side, side), name, dtype, padding=((0, 0), edge, edge))(x), x[:, -2:]


class Block(nn.Module):
    """Two causal convolutions, each of the normalised SiLU, residual."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Video, cache: dict) -> tuple[Float[Array, "b t h w f"], dict]:
        h, after = x, {}
        for norm, name in (("norm1", "conv1"), ("norm2", "conv2")):
            h = nn.silu(Norm(name=norm)(h))
            h, after[name] = causal_conv(h, cache.get(name), self.features, name, self.dtype)
        if x.shape[-1] != self.features:
            x = conv(self.features, (1, 1, 1), "shortcut", self.dtype)(x)
        return x + h, after


class Attention(nn.Module):
    """Every place of a frame attends to all of that frame, with one head, residual."""

    dtype: str

    @nn.compact
    def __call__(self, x: Video, cache: dict) -> tuple[Video, dict]:
        b, t, h, w, c = x.shape
        qkv = conv(3 * c, (1, 1), "qkv", self.dtype)(Norm(name="norm")(x)).reshape(b * t, h * w, 1, 3 * c)
        # Not "auto": a head as wide as the model is not what the kernels are made for.
        o = flash_attention(*jnp.split(qkv, 3, axis=-1), implementation="blockwise")
        return x + conv(c, (1, 1), "out", self.dtype)(o.reshape(x.shape)), {}


class Downsample(nn.Module):
    """Half the rows and columns; in time the first frame as it is, then one of each pair and the frame before it."""

    in_time: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Video, cache: dict) -> tuple[Float[Array, "b s h/2 w/2 c"], dict]:
        c = x.shape[-1]
        x = conv(c, (3, 3), "conv", self.dtype, strides=2, padding=((0, 1), (0, 1)))(x)
        if not self.in_time:
            return x, {}
        after = {"time_conv": x[:, -1:]}
        if cache:
            x = jnp.concatenate([cache["time_conv"], x], axis=1)
        y = x[:, :0] if cache else x[:, :1]
        if x.shape[1] > 1:
            rest = conv(c, (3, 1, 1), "time_conv", self.dtype, strides=(2, 1, 1), padding="VALID")(x)
            y = jnp.concatenate([y, rest], axis=1)
        return y, after


class Upsample(nn.Module):
    """Twice the rows and columns, half the channels (Wan2.2: all); in time two frames for each but the first.

    The first frame of a video is left alone, and the convolution over the others sees zeros in its place.
    """

    in_time: bool
    dtype: str
    halving: bool = True

    @nn.compact
    def __call__(self, x: Video, cache: dict) -> tuple[Float[Array, "b s 2*h 2*w f"], dict]:
        after = {}
        if self.in_time:
            past = cache["time_conv"] if cache else no_frames(x)
            first, rest = jnp.split(x, [0 if cache else 1], axis=1)
            if rest.shape[1]:
                b, t, h, w, c = rest.shape
                pairs, past = causal_conv(rest, past, 2 * c, "time_conv", self.dtype, side=1)
                rest = jnp.stack(jnp.split(pairs, 2, axis=-1), axis=2).reshape(b, 2 * t, h, w, c)
            x, after = jnp.concatenate([first, rest], axis=1), {"time_conv": past}
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return conv(x.shape[-1] // (2 if self.halving else 1), (3, 3), "conv", self.dtype)(x), after


def middle(features: int, dtype: str) -> list[nn.Module]:
    """The layers at the lowest resolution."""
    first, last = (Block(features, dtype, name=f"middle_block_{i}") for i in range(2))
    return [first, Attention(dtype, name="middle_attention"), last]


def _stages(c: WanVAEConfig, dim_mult, blocks: int, resample, in_time):
    """The layers at all resolutions, in their order; `resample` is between two stages."""
    layers = []
    for i, mult in enumerate(dim_mult):
        layers += [Block(c.dim * mult, c.dtype, name=f"stage_{i}_block_{j}") for j in range(blocks)]
        if i < len(in_time):
            layers.append(resample(in_time[i], c.dtype, name=f"stage_{i}_resample"))
    return layers


def through(x: Video, cache: dict, layers) -> tuple[Video, dict]:
    """(y, cache) of layers one after the other."""
    after = {}
    for layer in layers:
        x, after[layer.name] = layer(x, cache.get(layer.name, {}))
    return x, after


def half(x: Video, cache: dict, layers, features: tuple[int, int], dtype) -> tuple[Video, dict]:
    """(y, cache) of layers between two causal convolutions to so many features: most of an encoder or a decoder."""
    x, first = causal_conv(x.astype(dtype), cache.get("conv_in"), features[0], "conv_in", dtype)
    x, after = through(x, cache, layers)
    after["conv_in"] = first
    x = nn.silu(Norm(name="norm_out")(x))
    x, after["conv_out"] = causal_conv(x, cache.get("conv_out"), features[1], "conv_out", dtype)
    return x, after


class Encoder(nn.Module):
    """(pixels in [-1, 1], cache) -> (mean mu of the latents, cache).

    At the start (cache {}) t is 1 + 4n and s is 1 + n, later they are 4n and n: n frames of latents. mu is float32 at
    least. ValueError for other sizes, with the nearest that fit.
    """

    config: WanVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w 3"], cache: dict) -> tuple[Float[Array, "b s h/8 w/8 z_dim"], dict]:
        c = self.config
        check_pixels(c, x.shape, started=bool(cache))
        layers = _stages(c, c.dim_mult, c.num_res_blocks, Downsample, c.temperal_downsample)
        layers += middle(c.dim * c.dim_mult[-1], c.dtype)
        x, cache = half(x, cache, layers, (c.dim, 2 * c.z_dim), c.dtype)
        moments = conv(2 * c.z_dim, (1, 1, 1), "moments", c.dtype)(x)
        return moments[..., : c.z_dim].astype(c.wide), cache  # the rest is the logarithm of the variance


class Decoder(nn.Module):
    """(latents mu, cache) -> (pixels, cache).

    At the start (cache {}) s is 1 + 4(t − 1), later 4t. Pixels are float32 at least and may leave [-1, 1] a little.
    ValueError for inputs of other shapes.
    """

    config: WanVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w z_dim"], cache: dict) -> tuple[Float[Array, "b s 8*h 8*w 3"], dict]:
        c = self.config
        check_latents(c, x.shape)
        layers = middle(c.dim * c.dim_mult[-1], c.dtype)
        layers += _stages(c, c.dim_mult[::-1], c.num_res_blocks + 1, Upsample, c.temperal_downsample[::-1])
        x = conv(c.z_dim, (1, 1, 1), "latents", c.dtype)(x)
        x, cache = half(x, cache, layers, (c.dim * c.dim_mult[-1], 3), c.dtype)
        return x.astype(c.wide), cache


def check_pixels(config, shape, *, started: bool = False) -> None:
    """ValueError unless pixels of that shape can be encoded; `started`: they go on with a video.

    config: of any autoencoder with a stride, as of `check_latents` with a z_dim.
    """
    if len(shape) != 5 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"pixels must be [b, t, h, w, 3], none of them 0, got {tuple(shape)}")
    (frames, *sides), (step, *units) = shape[1:4], config.stride
    before, form = (0, f"{step}n") if started else (1, f"1 + {step}n")
    if (frames - before) % step:
        near = _near(frames - before, step, least=step if started else 0)
        raise ValueError(f"{frames} frames must be {form}: nearest are {' and '.join(str(before + n) for n in near)}")
    for what, side, unit in zip(("height", "width"), sides, units, strict=True):
        if side % unit:
            near = " and ".join(map(str, _near(side, unit, least=unit)))
            raise ValueError(f"{what} {side} must be a multiple of {unit}: nearest are {near}")


def check_latents(config, shape) -> None:
    """ValueError unless latents of that shape can be decoded."""
    if len(shape) != 5 or shape[-1] != config.z_dim or 0 in shape:
        raise ValueError(f"latents must be [b, t, h, w, {config.z_dim}], none of them 0, got {tuple(shape)}")


def _near(number: int, step: int, *, least: int) -> list[int]:
    """The multiples of step around a number, from `least` on."""
    below = number // step * step
    return [n for n in (below, below + step) if n >= least]


def init(config: WanVAEConfig, key):
    """Boxed parameters (with logical axes) {"encoder": …, "decoder": …} for that config, for videos of any size."""
    return init_halves(config, Encoder, Decoder, key)


def init_halves(config, encoder, decoder, key):
    """The same of the classes of both halves."""
    step, *units = config.stride
    pixels, latents = jnp.zeros((1, 1 + step, *units, 3)), jnp.zeros((1, 2, 1, 1, config.z_dim))
    keys = jax.random.split(key)
    return {
        "encoder": encoder(config).init(keys[0], pixels, {})["params"],
        "decoder": decoder(config).init(keys[1], latents, {})["params"],
    }


AUTOENCODER = Autoencoder(WanVAEConfig, Encoder, Decoder, check_pixels, check_latents, PUBLISHED)

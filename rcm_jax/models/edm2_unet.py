"""The magnitude-preserving U-Net of EDM2 (arXiv 2312.02696, config G; NVlabs/edm2), with what sCM changes in it.

Every layer keeps the magnitude of its input: weights are used normalised (`unit`), and a training step starts from
parameters that are (`normalised`). Embeddings, norms, modulation and the output are computed in float32, whatever
narrower dtype computes the blocks.
"""

import dataclasses
import math
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from rcm_jax.models import layers
from rcm_jax.models.convolution import convolve
from rcm_jax.models.layers import Embedding, at_least_float32, with_axes
from rcm_jax.models.product import affine
from rcm_jax.models.records import Network
from rcm_jax.parallel.sharding import split
from rcm_jax.util.ranges import Few, Positive, Probability, Width, WidthOr0, among, config, some

Image = Float[Array, "b h w c"]


@config
class Edm2Config(layers.Config):
    """Sizes under the reference's names and with its defaults; the label label_dim is the null class of guidance.

    Of sCM (arXiv 2410.11081): embedding_type "positional" instead of random Fourier features; guidance_input; and
    double_norm, where the scale of a block, emb·gain + 1, passes a pixel norm over its channels. A block of EDM2 has no
    shift. The paper does not say whether theirs has one, but its counts of parameters (Tables 4 and 5) leave no room.
    """

    img_resolution: Width
    img_channels: Width
    label_dim: WidthOr0  # 0: labels are not read
    model_channels: Width = 192
    channel_mult: Annotated[tuple[Few, ...], some] = (1, 2, 3, 4)  # of model_channels, from the finest level
    channel_mult_noise: Few | None = None  # of the time features; None: as the finest level
    channel_mult_emb: Few | None = None  # of the embedding; None: as the widest level
    num_blocks: Few = 3  # of a level of the encoder; the decoder has one more
    attn_resolutions: tuple[WidthOr0, ...] = (16, 8)
    channels_per_head: Width = 64  # fewer channels than that: no attention
    label_balance: Probability = 0.5  # between time (0) and label (1)
    concat_balance: Probability = 0.5  # between main path (0) and skip connection (1)
    res_balance: Probability = 0.3
    attn_balance: Probability = 0.3
    clip_act: Positive | None = 256.0  # of a block's output
    logvar_channels: Width = 128
    embedding_type: Annotated[str, among(("fourier", "positional"))] = "fourier"
    double_norm: bool = False
    guidance_input: bool = False
    dropout_resolution: WidthOr0 | None = None  # blocks of at most that resolution drop; None: all
    dtype: layers.Dtype = "float32"  # of the blocks; parameters stay in the dtype they have
    remat: layers.Remat = "none"
    attention: layers.Implementation = "auto"

    dim = property(lambda self: self.model_channels)
    num_classes = property(lambda self: self.label_dim)
    unit_size = property(lambda self: 2 ** (len(self.channel_mult) - 1))  # rows and columns are multiples of it

    def __post_init__(self):
        if self.img_resolution % self.unit_size:
            raise ValueError(f"img_resolution {self.img_resolution} must be a multiple of {self.unit_size}")


WIDTHS = {"s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
PUBLISHED = {f"edm2-img512-{size}": Edm2Config(64, 4, 1000, width) for size, width in WIDTHS.items()}
PUBLISHED |= {f"edm2-img64-{size}": Edm2Config(64, 3, 1000, width) for size, width in WIDTHS.items() if size != "xxl"}


@dataclasses.dataclass(frozen=True)
class Place:
    """A block's name, the resolution and channels of its output, and what is special about it."""

    name: str
    resolution: int
    channels: int
    attention: bool = False
    resampling: str = ""  # "down" or "up", before all else
    joins: bool = False  # takes a skip connection

    decodes = property(lambda self: self.name.startswith("dec"))


def places(config: Edm2Config) -> list[Place]:
    """The blocks in order, those of the encoder first."""
    levels = [(config.img_resolution >> i, config.model_channels * n) for i, n in enumerate(config.channel_mult)]
    found = []

    def add(side, kind, res, channels, **special):
        found.append(Place(f"{side}_{res}x{res}_{kind}", res, channels, **special))

    for res, channels in levels:
        if found:
            add("enc", "down", res, found[-1].channels, resampling="down")
        for i in range(config.num_blocks):
            add("enc", f"block{i}", res, channels, attention=res in config.attn_resolutions)
    for res, channels in reversed(levels):
        if found[-1].decodes:
            add("dec", "up", res, found[-1].channels, resampling="up")
        else:
            add("dec", "in0", res, channels, attention=True)
            add("dec", "in1", res, channels)
        for i in range(config.num_blocks + 1):
            add("dec", f"block{i}", res, channels, attention=res in config.attn_resolutions, joins=True)
    return found


def unit(x: Float[Array, "..."], axis: int | None = None) -> Float[Array, "..."]:
    """x / (1e-4 + rms over an axis, by default all but the last), in float32 at least; returns the dtype of x."""
    wide, axes = at_least_float32(x), tuple(range(x.ndim - 1)) if axis is None else axis
    squares = jnp.mean(jnp.square(wide), axes, keepdims=True)
    return (wide / (1e-4 + jnp.sqrt(jnp.maximum(squares, 1e-20)))).astype(x.dtype)  # zeros have derivatives, too


def pixel_norm(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """x / sqrt(mean x² + 1e-8) over channels: that of double normalisation."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-8)


def normalised(params):
    """Parameters as a training step of the reference leaves them: every weight normalised; no gain and no buffer.

    Its gradients are those at these parameters. Done again, it changes them by up to 1e-4 of their size.
    """
    return jax.tree_util.tree_map_with_path(lambda path, p: unit(p) if path[-1].key == "kernel" else p, params)


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """SiLU of unit magnitude."""
    return nn.silu(x) / 0.596


def mix(a: Float[Array, "..."], b: Float[Array, "..."], balance: float) -> Float[Array, "..."]:
    """a at balance 0, b at 1: of unit magnitude if both are, and not alike."""
    return ((1 - balance) * a + balance * b) / math.hypot(1 - balance, balance)


def join(a: Image, b: Image, balance: float) -> Image:
    """The channels of a, then of b. How much of the magnitude each has is said by balance, not by their numbers."""
    total = math.sqrt(a.shape[-1] + b.shape[-1]) / math.hypot(1 - balance, balance)
    parts = ((a, 1 - balance), (b, balance))
    return jnp.concatenate([total * share / math.sqrt(x.shape[-1]) * x for x, share in parts], axis=-1)


def positional(t: Float[Array, " b"], channels: int) -> Embedding:
    """Cosines and sines of t at frequencies 10⁴^(−i/n), i < n = channels/2, of unit magnitude."""
    half = channels // 2
    return math.sqrt(2) * layers.sinusoids(t, jnp.asarray(1e4 ** (-np.arange(half) / half), t.dtype))


class Fourier(nn.Module):
    """Cosines of random frequencies and phases, of unit magnitude. Both are parameters that get no gradient."""

    features: int

    @nn.compact
    def __call__(self, t: Float[Array, " b"]) -> Embedding:
        def drawn(name, draw):
            init = with_axes(lambda key, shape: 2 * math.pi * draw(key, shape), "vector")
            return jax.lax.stop_gradient(self.param(name, init, (self.features,))).astype(t.dtype)

        freqs, phases = drawn("freqs", jax.random.normal), drawn("phases", jax.random.uniform)
        return math.sqrt(2) * jnp.cos(t[:, None] * freqs + phases)


class Product(nn.Module):
    """x times normalised weights and a gain, in `dtype`: a convolution with a window, or a matrix."""

    features: int
    dtype: Any
    window: tuple[int, ...] = ()
    axes: tuple[str, str] = ("embed", "features")  # logical, of input and output

    @nn.compact
    def __call__(self, x: Float[Array, "... c"], gain: Any = 1.0) -> Float[Array, "... features"]:
        init = with_axes(nn.initializers.normal(1.0), *("vector",) * len(self.window), *self.axes)
        kernel = at_least_float32(self.param("kernel", init, (*self.window, x.shape[-1], self.features)))
        kernel = unit(kernel) * (gain / math.sqrt(math.prod(kernel.shape[:-1])))
        if math.prod(self.window) > 1:
            # Rows stay whole: of rows and kernel over the same devices (attention splits rows) XLA makes wrong numbers.
            return checkpoint_name(split(convolve(split(x, "batch"), kernel, self.dtype), "batch"), "product")
        return checkpoint_name(affine(x, kernel.reshape(kernel.shape[-2:]), None, self.dtype), "product")


class Block(nn.Module):
    """A residual block, and attention where its place has it. number: of all blocks, for dropout."""

    config: Edm2Config
    place: Place
    number: int

    @nn.compact
    def __call__(self, x: Image, emb: Embedding, dropout: dict | None) -> Image:
        c, channels = self.config, self.place.channels
        if self.place.resampling == "down":
            x = nn.avg_pool(x, (2, 2), (2, 2))
        elif self.place.resampling == "up":
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        skip = Product(channels, c.dtype, (1, 1), name="conv_skip") if x.shape[-1] != channels else lambda x: x
        x = x if self.place.decodes else unit(skip(x), -1)
        y = Product(channels, c.dtype, (3, 3), name="conv_res0")(silu(x))
        gain = self.param("emb_gain", with_axes(nn.initializers.zeros), ())
        scale = 1 + Product(channels, c.wide, name="emb_linear")(emb, gain)
        scale = pixel_norm(scale) if c.double_norm else scale
        y = layers.dropped(silu(y * scale[:, None, None]).astype(c.dtype), dropout, self.number)
        y = Product(channels, c.dtype, (3, 3), name="conv_res1")(y)
        x = mix(skip(x) if self.place.decodes else x, y, c.res_balance)
        if self.place.attention and (heads := channels // c.channels_per_head):
            qkv = Product(3 * channels, c.dtype, (1, 1), name="attn_qkv")(x)
            qkv = unit(qkv.reshape(len(x), -1, heads, channels // heads, 3), 3)
            y = layers.attend(*jnp.moveaxis(qkv, -1, 0), implementation=c.attention).reshape(x.shape)
            x = mix(x, Product(channels, c.dtype, (1, 1), name="attn_proj")(y), c.attn_balance)
        return x if c.clip_act is None else jnp.clip(x, -c.clip_act, c.clip_act)


class Logvar(nn.Module):
    """The log variance that EDM2's loss expects at times t; not a part of F. Applied to params["logvar"]."""

    config: Edm2Config

    @nn.compact
    def __call__(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        features = Fourier(self.config.logvar_channels, name="fourier")(t.astype(self.config.wide))
        return Product(1, self.config.wide, name="linear")(features)[:, 0]


class Edm2UNet(nn.Module):
    """F of images x at times t for labels (None: the null class), in float32; dropout: see `dropped`.

    guidance [b] is the scale that the network is to have of itself.
    """

    config: Edm2Config

    @nn.compact
    def __call__(self, x: Image, t: Float[Array, " b"], label=None, *, guidance=None, dropout=None) -> Image:
        c = self.config
        if x.ndim != 4 or x.shape[-1] != c.img_channels or x.shape[1] % c.unit_size or x.shape[2] % c.unit_size:
            fitting = f"[b, h, w, {c.img_channels}] with h and w multiples of {c.unit_size}"
            raise ValueError(f"x must be {fitting}, got {list(x.shape)}")
        if guidance is not None and not c.guidance_input:
            raise ValueError("guidance was given to a network without an input for it: set guidance_input")
        if self.is_initializing():
            Logvar(c, name="logvar")(t)
        emb = self.embed(t, label, guidance)
        policy: Any = layers.REMAT_POLICIES[c.remat]
        block = Block if c.remat == "none" else nn.remat(Block, policy=policy)
        x = jnp.concatenate([split(x, "batch"), jnp.ones_like(x[..., :1])], axis=-1)
        first = f"enc_{c.img_resolution}x{c.img_resolution}_conv"
        x = Product(c.model_channels * c.channel_mult[0], c.dtype, (3, 3), name=first)(x)
        skips = [x]
        for i, place in enumerate(places(c)):
            drops = c.dropout_resolution is None or place.resolution <= c.dropout_resolution
            x = join(x, skips.pop(), c.concat_balance) if place.joins else x
            x = block(c, place, i, name=place.name)(x, emb, dropout if drops else None)
            skips += [] if place.decodes else [x]
        gain = self.param("out_gain", with_axes(nn.initializers.zeros), ())
        return split(Product(c.img_channels, c.wide, (3, 3), name="out_conv")(x, gain), "batch")

    @nn.nowrap
    def embed(self, t: Float[Array, " b"], label: Int[Array, " b"] | None, guidance) -> Embedding:
        """What every block is told of time, guidance and label."""
        c, t = self.config, t.astype(self.config.wide)
        features = c.model_channels * (c.channel_mult_noise or c.channel_mult[0])
        width = c.model_channels * (c.channel_mult_emb or max(c.channel_mult))
        fourier = c.embedding_type == "fourier"
        of_time = Fourier(features, name="emb_fourier")(t) if fourier else positional(t, features)
        emb = Product(width, c.wide, name="emb_noise")(of_time)
        if c.guidance_input:  # its parameters are there with or without a scale
            gain = self.param("guidance_gain", with_axes(nn.initializers.zeros), ())
            scale = positional((t if guidance is None else guidance).astype(c.wide), features)
            of_guidance = Product(width, c.wide, name="emb_guidance")(scale, gain)
            emb = emb if guidance is None else emb + of_guidance
        if c.label_dim:
            label = jnp.full(t.shape, c.label_dim) if label is None else label
            one_hot = math.sqrt(c.label_dim) * jax.nn.one_hot(label, c.label_dim, dtype=c.wide)  # null class: zeros
            of_label = Product(width, c.wide, axes=("features", "embed"), name="emb_label")(one_hot)
            emb = mix(emb, of_label, c.label_balance)
        return silu(emb)


NETWORK = Network(
    config=Edm2Config,
    module=Edm2UNet,
    conditions=lambda config, shape: {"label": jax.ShapeDtypeStruct((), jnp.int32)},
    smallest=lambda config: (config.unit_size, config.unit_size, config.img_channels),
    parametrization="edm",
    time_scale=0.25,
    optional=("guidance", "dropout"),
    normalised=normalised,
    published=PUBLISHED,
)

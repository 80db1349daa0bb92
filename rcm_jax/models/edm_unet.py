"""The U-Nets of EDM (arXiv 2206.00364): DDPM++ and NCSN++ ("SongUNet"), and ADM ("DhariwalUNet").

With what the sCM paper (arXiv 2410.11081) changes in them: adaptive double normalisation, the scale of guidance as an
input, dropout at low resolutions alone. Norms, embeddings and the output are computed in float32, whatever narrower
dtype computes the rest.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rcm_jax.models.convolution import AXES, convolve
from rcm_jax.models.layers import (
    REMAT_POLICIES,
    Config,
    Dtype,
    Embedding,
    Implementation,
    Remat,
    at_least_float32,
    attend,
    dropped,
    sinusoids,
    with_axes,
)
from rcm_jax.models.product import affine
from rcm_jax.models.records import Network
from rcm_jax.parallel.sharding import split
from rcm_jax.util.ranges import Few, Width, WidthOr0, among, config, some

Image = Float[Array, "b h w c"]
FOURIER_SCALE = 16.0  # of the random frequencies of NCSN++


class Start(NamedTuple):
    """Initial values of a layer: its kernel's, and its bias's uniform in ±bias/√(inputs of an output)."""

    kernel: Callable
    bias: float = 0.0


def _uniform(scale: float, mode, bias: float = 0.0) -> Start:
    return Start(nn.initializers.variance_scaling(scale, mode, "uniform"), bias)


class Family(NamedTuple):
    """In what the two kinds of U-Net differ, besides sizes."""

    song: bool  # order of the embedding, projections around resampling, less attention in the decoder, names at the end
    epsilon: float  # of the norms
    skip_scale: float  # of every sum of a block and what it was given
    channels_per_head: int | None  # None: one head
    layer: Start
    last: Start  # of what ends a residual, and of the output
    attention: Start
    label: Start
    augment: Start


XAVIER, KAIMING, ZERO = _uniform(1.0, "fan_avg"), _uniform(1 / 3, "fan_in", 1.0), Start(nn.initializers.zeros)
TINY, FIFTH = _uniform(1e-10, "fan_avg"), _uniform(0.2, "fan_avg")
FAMILIES = {
    "SongUNet": Family(True, 1e-6, 0.5**0.5, None, XAVIER, TINY, FIFTH, XAVIER, XAVIER),
    "DhariwalUNet": Family(False, 1e-5, 1.0, 64, KAIMING, ZERO, KAIMING, Start(nn.initializers.normal(1.0)), ZERO),
}
ADM_FIXED = {"embedding_type": "positional", "encoder_type": "standard", "channel_mult_noise": 1}
ADM_FIXED |= {"resample_filter": (1, 1), "adaptive_scale": True}


@config
class EdmConfig(Config):
    """Sizes of a U-Net under the reference's names; defaults are those of its SongUNet."""

    img_resolution: Width
    img_channels: Width = 3
    label_dim: WidthOr0 = 0  # classes; the label label_dim is the null class
    augment_dim: WidthOr0 = 0  # numbers that tell how an image was augmented; 0: none are taken
    model_channels: Width = 128
    # Of each resolution, each half of the one before.
    channel_mult: Annotated[tuple[Few, ...], some] = (1, 2, 2, 2)
    channel_mult_emb: Few = 4
    num_blocks: Few = 4  # of each resolution; the decoder has one more
    attn_resolutions: tuple[WidthOr0, ...] = (16,)
    embedding_type: Annotated[str, among(("positional", "fourier"))] = "positional"  # "fourier": random frequencies
    channel_mult_noise: Few = 1
    # "residual": the image joins in at every resolution. No published network has the reference's "skip".
    encoder_type: Annotated[str, among(("standard", "residual"))] = "standard"
    decoder_type: Annotated[str, among(("standard",))] = "standard"
    resample_filter: Annotated[tuple[Few, ...], some] = (1, 1)
    model_type: Annotated[str, among(FAMILIES)] = "SongUNet"
    adaptive_scale: bool | None = None  # the embedding scales, and not only shifts; None: as model_type does
    double_norm: bool = False  # scales and shifts are pixel-normalised (sCM)
    guidance_input: bool = False  # takes the scale of guidance
    dropout_resolution: WidthOr0 | None = None  # the largest that drops, if a call asks for it; None: all do
    dtype: Dtype = "float32"  # of the blocks
    remat: Remat = "none"
    attention: Implementation = "auto"

    @property
    def num_classes(self) -> int:
        return self.label_dim

    @property
    def dim(self) -> int:
        return self.model_channels

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def __post_init__(self):
        if self.adaptive_scale is None:
            object.__setattr__(self, "adaptive_scale", not self.family.song)
        size, mult, taps = self.img_resolution, self.channel_mult, self.resample_filter
        if size % 2 ** (len(mult) - 1):
            raise ValueError(f"img_resolution {size} cannot be halved between all of channel_mult {mult}")
        if len(taps) % 2:
            raise ValueError(f"resample_filter {taps} must have an even number of weights")
        if self.double_norm and not self.adaptive_scale:
            raise ValueError("double_norm normalises scales and shifts: it needs adaptive_scale=True")
        if not self.family.song and any(getattr(self, name) != value for name, value in ADM_FIXED.items()):
            raise ValueError(f"a {self.model_type} has {ADM_FIXED}")


SIZES_32 = {"img_resolution": 32, "channel_mult": (2, 2, 2), "augment_dim": 9}
NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
NCSNPP |= {"resample_filter": (1, 3, 3, 1)}
ADM = {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3}
ADM |= {"attn_resolutions": (32, 16, 8)}  # the reference's defaults for it
PUBLISHED = {
    "edm-cifar10-uncond-vp": EdmConfig(**SIZES_32),
    "edm-cifar10-cond-vp": EdmConfig(**SIZES_32, label_dim=10),
    "edm-cifar10-uncond-ve": EdmConfig(**SIZES_32, **NCSNPP),
    "edm-cifar10-cond-ve": EdmConfig(**SIZES_32, **NCSNPP, label_dim=10),
    "edm-imagenet64-cond-adm": EdmConfig(img_resolution=64, label_dim=1000, **ADM),
}


def positional_embedding(t: Float[Array, " b"], channels: int, endpoint: bool) -> Embedding:
    """Cosines, then sines, of t at frequencies from 1 down to 10⁻⁴, which is the last one if endpoint."""
    steps = channels // 2 - endpoint
    return sinusoids(t, 10_000.0 ** -(np.arange(channels // 2) / max(steps, 1)))


def resampled(x: Image, taps: tuple[int, ...], direction: str, padding: int | None = None) -> Image:
    """Every second pixel of x under the filter (its sum made 1) both ways, "down"; or "up", four times the transpose.

    padding: zeros at each side, by default as many as make the size half exactly.
    """
    padding = (len(taps) - 1) // 2 if padding is None else padding

    def down(x):
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        for axis in (1, 2):
            end = x.shape[axis] - len(taps) + 1
            parts = [jax.lax.slice_in_dim(x, i, i + end, 2, axis) * (w / sum(taps)) for i, w in enumerate(taps)]
            x = functools.reduce(jnp.add, parts)
        return x

    if direction == "down":
        return down(x)
    b, h, w, c = x.shape
    (larger,) = jax.linear_transpose(down, jax.ShapeDtypeStruct((b, 2 * h, 2 * w, c), x.dtype))(x)
    return 4 * larger


def modulated(normed: Image, scale: Array, shift: Array, double_norm: bool) -> Image:
    """normed·scale + shift [b, …, c]; both pixel-normalised first, if double_norm."""
    if double_norm:
        scale, shift = pixel_norm(scale), pixel_norm(shift)
    return normed * scale + shift


def pixel_norm(x: Float[Array, "... c"], epsilon: float = 1e-8) -> Float[Array, "... c"]:
    """x over the root of its mean square over channels."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


class Layer(nn.Module):
    """A dense layer or, with a window, a convolution of window × window; in `dtype`."""

    features: int
    start: Start
    dtype: Any
    window: int = 0
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... features"]:
        shape = (*((self.window,) * 2 if self.window else ()), x.shape[-1], self.features)
        kernel = self.param("kernel", with_axes(self.start.kernel, *AXES[-len(shape) :]), shape)
        bias = None
        if self.use_bias:
            bound = self.start.bias / math.sqrt(math.prod(shape[:-1]))
            init = with_axes(lambda key, shape: bound * jax.random.uniform(key, shape, minval=-1), "vector")
            bias = self.param("bias", init, (self.features,))
        if not self.window:
            return affine(x, kernel, bias, self.dtype)
        y = convolve(x, kernel, self.dtype)
        return y if bias is None else y + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """x normalised over pixels and the channels of a group, times scale plus bias: in float32 at least.

    There are 32 groups, or fewer of four channels.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Image) -> Image:
        c = x.shape[-1]
        groups = min(32, max(c // 4, 1))
        if c % groups:
            raise ValueError(f"{c} channels cannot be {groups} equal groups: take a multiple of 32 for model_channels")
        scale = self.param("scale", with_axes(nn.initializers.ones, "vector"), (c,))
        bias = self.param("bias", with_axes(nn.initializers.zeros, "vector"), (c,))
        y = at_least_float32(x).reshape(x.shape[0], -1, groups, c // groups)
        y = y - jnp.mean(y, axis=(1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=(1, 3), keepdims=True) + self.epsilon)
        return y.reshape(x.shape) * scale + bias


class Fourier(nn.Module):
    """Cosines, then sines, of t at random frequencies: a parameter that no gradient reaches, so nothing trains it."""

    features: int

    @nn.compact
    def __call__(self, t: Float[Array, " b"]) -> Embedding:
        init = with_axes(nn.initializers.normal(FOURIER_SCALE), "vector")
        frequencies = self.param("freqs", init, (self.features // 2,))
        return sinusoids(t, 2 * math.pi * jax.lax.stop_gradient(frequencies))


class Block(nn.Module):
    """Two convolutions, between them the embedding and dropout, and attention, all residual: [b, h, w, channels]."""

    config: EdmConfig
    channels: int
    place: int  # among the blocks, for dropout
    direction: str = ""  # "down" halves the resolution, "up" doubles it
    attention: bool = False

    @nn.compact
    def __call__(self, x: Image, emb: Embedding, dropout: dict | None) -> Image:
        c, f, channels = self.config, self.config.family, self.channels
        norm = functools.partial(GroupNorm, f.epsilon)

        def layer(name, features=channels, window=3, start=f.layer):
            return Layer(features, start, c.dtype, window, name=name)

        def moved(x):
            return resampled(x, c.resample_filter, self.direction) if self.direction else x

        h = moved(nn.silu(norm(name="norm0")(x)).astype(c.dtype))
        h = layer("conv0")(h)
        modulation = Layer((1 + bool(c.adaptive_scale)) * channels, f.layer, c.wide, name="affine")(emb)[:, None, None]
        if c.adaptive_scale:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = modulated(norm(name="norm1")(h), 1 + scale, shift, c.double_norm)
        else:
            h = norm(name="norm1")(at_least_float32(h) + modulation)
        h = dropped(nn.silu(h).astype(c.dtype), dropout, self.place)
        h = layer("conv1", start=f.last)(h)
        around = moved(x)
        if x.shape[-1] != channels or (self.direction and f.song):
            around = layer("skip", window=1)(around)
        x = (around + h) * f.skip_scale

        if self.attention and (heads := channels // (f.channels_per_head or channels)):
            qkv = layer("qkv", 3 * channels, 1, f.attention)(norm(name="norm2")(x))
            qkv = qkv.reshape(x.shape[0], -1, heads, channels // heads, 3)
            o = attend(*(qkv[..., i] for i in range(3)), implementation=c.attention).reshape(x.shape)
            x = (x + layer("proj", window=1, start=f.last)(o)) * f.skip_scale
        return x


def _embedding(c: EdmConfig, t: Array, label: Array | None, guidance: Array | None, augment: Array | None) -> Embedding:
    """What every block is told of t and conditions; called where the modules belong. What is not given adds nothing."""
    f, noise, wide = c.family, c.model_channels * c.channel_mult_noise, c.wide
    to_noise = functools.partial(positional_embedding, channels=noise, endpoint=f.song)

    def layer(name, features, start=f.layer, use_bias=True):
        return Layer(features, start, wide, use_bias=use_bias, name=f"map_{name}")

    def conditioned(emb):
        width = emb.shape[-1]
        if c.label_dim:
            known = jnp.full(t.shape, c.label_dim) if label is None else label
            classes = nn.one_hot(known, c.label_dim, dtype=wide) * (c.label_dim**0.5 if f.song else 1)
            emb = emb + layer("label", width, f.label, use_bias=f.song)(classes)
        if c.guidance_input:
            scales = jnp.zeros((*t.shape, noise)) if guidance is None else to_noise(guidance)
            emb = emb + layer("guidance", width, ZERO, use_bias=False)(scales)
        return emb

    emb = to_noise(t) if c.embedding_type == "positional" else Fourier(noise, name="map_noise")(t)
    emb = conditioned(jnp.roll(emb, noise // 2, axis=-1)) if f.song else emb  # sines first
    if c.augment_dim:
        augment = jnp.zeros((*t.shape, c.augment_dim)) if augment is None else augment
        emb = emb + layer("augment", noise, f.augment, use_bias=False)(augment)
    width = c.model_channels * c.channel_mult_emb
    emb = layer("layer1", width)(nn.silu(layer("layer0", width)(emb)))
    return nn.silu(emb if f.song else conditioned(emb))


class EdmUNet(nn.Module):
    """The raw output of the reference's network for x of unit variance and its time t (EDM: ln(sigma)/4), float32.

    label in 0..label_dim, the last being the null class (as if there were none); guidance: the scale of it; augment:
    how x was augmented; dropout: see layers.dropped. ValueError for inputs that do not fit the config.
    """

    config: EdmConfig

    @nn.compact
    def __call__(
        self,
        x: Image,
        t: Float[Array, " b"],
        label: Int[Array, " b"] | None = None,
        *,
        guidance: Float[Array, " b"] | None = None,
        dropout: dict | None = None,
        augment: Float[Array, "b augment_dim"] | None = None,
    ) -> Image:
        c, f = self.config, self.config.family
        wanted = (c.img_resolution, c.img_resolution, c.img_channels)
        if x.shape[1:] != wanted or t.shape != x.shape[:1]:
            raise ValueError(f"x must be [b, {', '.join(map(str, wanted))}] and t [b], got {x.shape} and {t.shape}")
        if guidance is not None and not c.guidance_input:
            raise ValueError("guidance is given to a network without that input; set guidance_input=True")
        emb = _embedding(c, t, label, guidance, augment)
        places = itertools.count()
        kind = Block if c.remat == "none" else nn.remat(Block, policy=REMAT_POLICIES[c.remat])

        def block(h, half, level, name, channels=None, **options):
            resolution = c.img_resolution >> level
            drops = c.dropout_resolution is None or resolution <= c.dropout_resolution
            name = f"{half}_{resolution}x{resolution}_{name}"
            made = kind(c, channels or h.shape[-1], next(places), **options, name=name)
            return made(h, emb, dropout if drops else None)

        h = aux = split(x.astype(c.dtype), "batch")
        widths, skips = [c.model_channels * mult for mult in c.channel_mult], []
        last, attends = len(widths) - 1, [c.img_resolution >> i in c.attn_resolutions for i in range(len(widths))]
        for level, width in enumerate(widths):
            size = c.img_resolution >> level
            if level == 0:
                first = c.model_channels if f.song else width
                h = Layer(first, f.layer, c.dtype, 3, name=f"enc_{size}x{size}_conv")(h)
            else:
                h = block(h, "enc", level, "down", direction="down")
            if level and c.encoder_type == "residual":  # filtered after the convolution, which sees further zeros
                edge = (len(c.resample_filter) - 1) // 2
                aux = jnp.pad(aux, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
                joining = Layer(h.shape[-1], f.layer, c.dtype, 3, name=f"enc_{size}x{size}_aux_residual")
                h = aux = (h + resampled(joining(aux), c.resample_filter, "down", padding=0)) * 0.5**0.5
            skips.append(h)
            for i in range(c.num_blocks):
                h = block(h, "enc", level, f"block{i}", width, attention=attends[level])
                skips.append(h)

        for level, width in reversed(list(enumerate(widths))):
            if level == last:
                h = block(h, "dec", level, "in0", attention=True)
                h = block(h, "dec", level, "in1")
            else:
                h = block(h, "dec", level, "up", direction="up")
            for i in range(c.num_blocks + 1):
                attention = attends[level] and (i == c.num_blocks or not f.song)
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, "dec", level, f"block{i}", width, attention=attention)
        out = f"dec_{c.img_resolution}x{c.img_resolution}_aux" if f.song else "out"
        h = nn.silu(GroupNorm(f.epsilon, name=f"{out}_norm")(h))
        return Layer(c.img_channels, f.last, c.wide, 3, name=f"{out}_conv")(h)


NETWORK = Network(
    config=EdmConfig,
    module=EdmUNet,
    conditions=lambda config, shape: {"label": jax.ShapeDtypeStruct((), jnp.int32)},
    smallest=lambda config: (config.img_resolution, config.img_resolution, config.img_channels),
    parametrization="edm",
    time_scale=0.25,
    optional=("guidance", "dropout"),
    published=PUBLISHED,
)

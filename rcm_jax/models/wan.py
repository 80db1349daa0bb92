"""The Wan2.1 video diffusion transformer (arXiv 2503.20314): text to video, and image to video; also those of Wan2.2.

Every parameter has its logical axes; the blocks are one scan. Time embedding, modulation, norms and output are computed
in float32, whatever narrower dtype computes the blocks: the tangent of a large network needs it (rCM, section 4).
"""

import functools
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.models.layers import (
    Config,
    Dtype,
    Implementation,
    LayerNorm,
    Mlp,
    Remat,
    RMSNorm,
    Tokens,
    Turns,
    attend,
    check_heads,
    dense,
    layer_norm,
    patchify,
    rope_tables,
    rotate_pairs,
    sinusoids,
    stack,
    unpatchify,
    with_axes,
)
from rcm_jax.models.records import Network, check_known, known_condition
from rcm_jax.parallel.sharding import split
from rcm_jax.util.ranges import Depth, Epsilon, Frequencies, Width, WidthOr0, among, between, config

CLIP_TOKENS = 257  # of the image features of Wan2.1's image to video
CLIP_EPS = 1e-5  # of the two norms around the image features, which the reference leaves at its framework's default


Patch = Annotated[int, between(1, 100)]


@config
class WanConfig(Config):
    """Sizes of a Wan network, under the reference's names; defaults are what all published ones share."""

    dim: Width
    ffn_dim: Width
    num_heads: Depth
    num_layers: Depth
    # i2v is given an image as further channels y; ti2v as its first frame, clean at time 0, or no image at all.
    model_type: Annotated[str, among(("t2v", "i2v", "ti2v"))] = "t2v"
    in_dim: Width = 16  # channels of x, and of y if there is one
    out_dim: Width = 16
    text_dim: Width = 4096
    text_len: Width = 512  # most text tokens
    freq_dim: Frequencies = 256  # cosines and sines of the time
    patch_size: tuple[Patch, Patch, Patch] = (1, 2, 2)
    eps: Epsilon = 1e-6
    known_frames: Annotated[int, between(0, 1)] = 0  # of ti2v: whether it is given the first one
    clip_dim: WidthOr0 = 0  # width of CLIP features of the image; 0: none are used (text to video, Wan2.2)
    t5_tokens: Width | None = None  # where the reference splits text from image tokens: text_len, if given
    dtype: Dtype = "float32"  # of the blocks; parameters stay in the dtype they have
    time_dtype: Dtype = "float32"  # of the time embedding's layers; its sines and cosines are float32 at least
    remat: Remat = "none"
    attention: Implementation = "auto"

    @property
    def patch(self):
        return self.patch_size

    def __post_init__(self):
        check_heads(self)
        if self.dim // self.num_heads % 2:
            raise ValueError(f"dim/num_heads {self.dim // self.num_heads} must be even")
        if (self.in_dim == self.out_dim) == (self.model_type == "i2v") or self.in_dim < self.out_dim:
            raise ValueError(
                f"in_dim {self.in_dim} and out_dim {self.out_dim} do not fit model_type {self.model_type!r}: they are "
                "equal for t2v and ti2v; for i2v in_dim has the channels of y as well"
            )
        if self.known_frames and (self.model_type != "ti2v" or self.patch_size[0] != 1):
            raise ValueError(
                f"known_frames {self.known_frames} does not fit model_type {self.model_type!r}: set it to 0"
            )
        if self.clip_dim and self.model_type != "i2v":
            raise ValueError(f"clip_dim {self.clip_dim} does not fit model_type {self.model_type!r}")
        if self.t5_tokens not in (None, self.text_len):
            raise ValueError(f"t5_tokens {self.t5_tokens} must be text_len {self.text_len}, or not given")


PUBLISHED = {
    "wan-1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan-14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan-i2v-14b": WanConfig(
        dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, model_type="i2v", in_dim=36, clip_dim=1280
    ),
    "wan2.2-i2v-a14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, model_type="i2v", in_dim=36),
    "wan2.2-ti2v-5b": WanConfig(
        dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, model_type="ti2v", in_dim=48, out_dim=48
    ),
}


def _project(config, x: Tokens, name: str, norm: str | None = None) -> Float[Array, "b l n d"]:
    """A dense layer to all heads, and RMS-norm across all of them together."""
    y = dense(config.dim, name, dtype=config.dtype)(x)
    if norm:
        y = RMSNorm(config.eps, name=norm)(y)
    return y.reshape(*x.shape[:2], config.num_heads, -1)


def _table(dim):
    """Initial values of a modulation table [rows, dim]."""
    return with_axes(nn.initializers.normal(dim**-0.5), "vector", "embed")


def _of_tokens(embedding: Float[Array, "b *f n c"], table: Float[Array, "n c"], length: int) -> list[Array]:
    """The n parts of embedding + table, each [b, 1, c]; or [b, length, c] where each of f frames has its own time."""
    parts = jnp.split(embedding + table, table.shape[0], axis=-2)
    if embedding.ndim == 3:
        return parts
    b, f, _, c = embedding.shape
    return [jnp.broadcast_to(part, (b, f, length // f, c)).reshape(b, length, c) for part in parts]


class SelfAttention(nn.Module):
    """Attention of all tokens to all, queries and keys turned by their place."""

    config: WanConfig

    @nn.compact
    def __call__(self, x_blc: Tokens, cos: Turns, sin: Turns) -> Tokens:
        c = self.config
        q = rotate_pairs(_project(c, x_blc, "q", "q_norm"), cos, sin)
        k = rotate_pairs(_project(c, x_blc, "k", "k_norm"), cos, sin)
        o = attend(q, k, _project(c, x_blc, "v"), implementation=c.attention)
        return dense(c.dim, "out", dtype=c.dtype, axes=("features", "embed"))(o.reshape(x_blc.shape))


class CrossAttention(nn.Module):
    """Attention to text, plus attention of the same queries to image tokens, if there are."""

    config: WanConfig

    @nn.compact
    def __call__(self, x_blc: Tokens, text: Tokens, image: Tokens | None) -> Tokens:
        c = self.config
        q = _project(c, x_blc, "q", "q_norm")
        to = functools.partial(attend, q, implementation=c.attention, cross=True)
        o = to(_project(c, text, "k", "k_norm"), _project(c, text, "v"))
        if image is not None:
            o = o + to(_project(c, image, "k_image", "k_image_norm"), _project(c, image, "v_image"))
        return dense(c.dim, "out", dtype=c.dtype, axes=("features", "embed"))(o.reshape(x_blc.shape))


class Block(nn.Module):
    """Modulated self-attention, cross-attention and modulated MLP, all residual. A scan body: (x, ...) -> (x, None)."""

    config: WanConfig

    @nn.compact
    def __call__(
        self, x_blc: Tokens, emb: Float[Array, "b *f 6 c"], text: Tokens, image: Tokens | None, cos: Turns, sin: Turns
    ) -> tuple[Tokens, None]:
        c = self.config
        table = self.param("modulation", _table(c.dim), (6, c.dim))
        shift1, scale1, gate1, shift2, scale2, gate2 = _of_tokens(emb, table, x_blc.shape[1])
        h = (layer_norm(x_blc, c.eps) * (1 + scale1) + shift1).astype(c.dtype)
        h = SelfAttention(c, name="self_attention")(h, cos, sin)
        x_blc = (x_blc + gate1 * h).astype(c.dtype)
        h = LayerNorm(c.eps, name="cross_norm")(x_blc)
        x_blc = x_blc + CrossAttention(c, name="cross_attention")(h, text, image)
        h = (layer_norm(x_blc, c.eps) * (1 + scale2) + shift2).astype(c.dtype)
        h = Mlp(c.ffn_dim, c.dtype, name="mlp")(h)
        return (x_blc + gate2 * h).astype(c.dtype), None


class Wan(nn.Module):
    """v = eps − x0 of latents x at times t in 0..1000, float32.

    t is of a sample, or of each of its frames of tokens, as Wan2.2's TI2V has it: its first frame is clean, at time 0.
    text, m at most text_len, is padded as in training (Wan: zeros up to text_len). For i2v also y (mask and image
    latents) and, where clip_dim is not 0, clip_features. known: the frames before x, if it is given them, which are not
    answered. ValueError for inputs that do not fit the config.
    """

    config: WanConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        t: Float[Array, "b ..."],
        text: Float[Array, "b m text_dim"],
        y: Float[Array, "b t h w in_dim-c"] | None = None,
        clip_features: Float[Array, "b k clip_dim"] | None = None,
        known: Float[Array, "b f h w c"] | None = None,
    ) -> Float[Array, "b t h w out_dim"]:
        c = self.config
        check_known(c.known_frames, x, known)
        if known is not None:
            x = jnp.concatenate([known.astype(x.dtype), x], axis=1)
            t = jnp.where(jnp.arange(x.shape[1]) < c.known_frames, 0, t[:, None])
        _check_inputs(c, x, t, text, y, clip_features)
        grid = tuple(n // p for n, p in zip(x.shape[1:4], c.patch_size, strict=True))
        out_shape = (*x.shape[:-1], c.out_dim)
        if y is not None:
            x = jnp.concatenate([x, y.astype(x.dtype)], axis=-1)
        x_blc = dense(c.dim, "patch_in", dtype=c.dtype, axes=("features", "embed"))(patchify(x, c.patch_size))
        x_blc = split(x_blc, "batch", "tokens")

        frequencies = 10_000.0 ** -(np.arange(c.freq_dim // 2) / (c.freq_dim // 2))
        emb = sinusoids(t.reshape(-1), frequencies)  # one row for each time
        emb = dense(c.dim, "time_in", dtype=c.time_dtype, axes=("features", "embed"))(emb)
        emb = dense(c.dim, "time_out", dtype=c.time_dtype)(nn.silu(emb))
        emb_6 = dense(6 * c.dim, "time_projection", dtype=c.time_dtype)(nn.silu(emb))
        emb_6, emb_1 = (e.reshape(*t.shape, -1, c.dim).astype(c.wide) for e in (emb_6, emb))

        text = nn.gelu(dense(c.dim, "text_in", dtype=c.dtype)(text))
        text = dense(c.dim, "text_out", dtype=c.dtype)(text)
        image = None
        if clip_features is not None:
            image = LayerNorm(CLIP_EPS, name="image_norm_in")(clip_features.astype(c.dtype))
            image = nn.gelu(dense(c.clip_dim, "image_in", dtype=c.dtype)(image), approximate=False)
            image = LayerNorm(CLIP_EPS, name="image_norm_out")(dense(c.dim, "image_out", dtype=c.dtype)(image))

        cos, sin = rope_tables(grid, c.dim // c.num_heads, c.wide)
        x_blc, _ = stack(Block, c.num_layers, c.remat)(c, name="blocks")(x_blc, emb_6, text, image, cos, sin)

        table = self.param("modulation_out", _table(c.dim), (2, c.dim))
        shift, scale = _of_tokens(emb_1, table, x_blc.shape[1])
        x_blc = layer_norm(x_blc, c.eps) * (1 + scale) + shift
        out = dense(np.prod(c.patch_size).item() * c.out_dim, "patch_out", dtype=c.wide)(x_blc)
        return unpatchify(split(out, "batch", "tokens"), c.patch_size, out_shape)[:, c.known_frames :]


def _check_inputs(c: WanConfig, x: Array, t: Array, text: Array, y: Array | None, clip_features: Array | None) -> None:
    """ValueError where the inputs of Wan are not what its docstring asks for."""
    if x.ndim != 5 or t.shape not in (x.shape[:1], (x.shape[0], x.shape[1] // c.patch_size[0])):
        frames = "frames" if c.patch_size[0] == 1 else f"t / {c.patch_size[0]}"
        told = f"x must be [b, t, h, w, c] and its times t [b] or [b, {frames}]"
        raise ValueError(f"{told}, got {x.shape} and {t.shape}")
    if (y is None) != (c.model_type != "i2v") or (clip_features is None) != (c.clip_dim == 0):
        clip = ", and clip_features" if c.clip_dim else ""
        wanted = "x and text" if c.model_type != "i2v" else f"x, text and y{clip}"
        raise ValueError(f"this network (model_type {c.model_type!r}, clip_dim {c.clip_dim}) takes {wanted}")
    channels = [x.shape[-1]] + ([] if y is None else [y.shape[-1]])
    if sum(channels) != c.in_dim or (y is not None and y.shape[:-1] != x.shape[:-1]):
        shapes = f"x {x.shape}" + ("" if y is None else f", y {y.shape}")
        raise ValueError(f"channels must sum to in_dim {c.in_dim} on the same [b, t, h, w], got {shapes}")
    if text.ndim != 3 or text.shape[1] > c.text_len or text.shape[2] != c.text_dim:
        raise ValueError(f"text must be [b, at most {c.text_len}, {c.text_dim}], got {text.shape}")
    if clip_features is not None and (clip_features.ndim != 3 or clip_features.shape[2] != c.clip_dim):
        raise ValueError(f"clip_features must be [b, tokens, {c.clip_dim}], got {clip_features.shape}")


def _conditions(config: WanConfig, shape) -> dict:
    """Text and, for image to video, what is known of the image."""
    found = {"text": jax.ShapeDtypeStruct((config.text_len, config.text_dim), jnp.float32)}
    if config.model_type == "i2v":
        found["y"] = jax.ShapeDtypeStruct((*shape[:-1], config.in_dim - config.out_dim), jnp.float32)
    if config.clip_dim:
        found["clip_features"] = jax.ShapeDtypeStruct((CLIP_TOKENS, config.clip_dim), jnp.float32)
    return found | known_condition(config.known_frames, shape)


NETWORK = Network(
    config=WanConfig,
    module=Wan,
    conditions=_conditions,
    smallest=lambda config: (*config.patch_size, config.out_dim),
    adapted=("blocks/*attention/*", "blocks/mlp/*"),
    patch=lambda config: config.patch_size,
    known_frames=lambda config: config.known_frames,
    parametrization="rectified_flow",
    time_scale=1000.0,
    published=PUBLISHED,
)

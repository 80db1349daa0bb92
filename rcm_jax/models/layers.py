"""Layers that networks share. Axes: b batch, t frames, h, w, c channels or width, l tokens, m of text, n heads of d."""

import functools
from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rcm_jax.kernels.attention import choices, flash_attention  # pyright: ignore[reportMissingImports]
from rcm_jax.models.adapters import A, B
from rcm_jax.models.product import affine
from rcm_jax.parallel.sharding import RULES, activation_spec, check_sequence, current_mesh, gathered
from rcm_jax.util.ranges import among, between

Embedding = Float[Array, "b c"]
Tokens = Float[Array, "b l c"]
Heads = Float[Array, "b l n d"]
Turns = Float[Array, "l d/2"]  # cosines or sines of the angles of a rotary embedding
DTYPES = ("float32", "bfloat16", "float16", "float64")  # of the computation
REMAT_POLICIES = {
    "none": None,  # keep everything: fastest, for small networks
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    # As the official 14B config has it: products of matrices are kept, what is cheap is computed again.
    "save_products": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse", "product"),
}


Dtype = Annotated[str, among(DTYPES)]
Remat = Annotated[str, among(REMAT_POLICIES)]
Frequency = Annotated[float, between(1e-3, 1e6)]
Implementation = Annotated[str, among(choices)]  # implementation of flash_attention


class Config:
    """Base of the configs of networks: `dtype` computes most of one, `wide` the rest."""

    dtype: str

    @property
    def wide(self):
        """float32, whatever narrower dtype is asked for: of time embedding, modulation, softmax, output and so on."""
        return jnp.promote_types(self.dtype, jnp.float32)


def check_heads(config) -> None:
    """ValueError unless heads divide dim."""
    if config.dim % config.num_heads:
        raise ValueError(f"num_heads {config.num_heads} does not divide dim {config.dim}")


def stack(block, length: int, remat: str) -> Callable:
    """The module class of `length` blocks (x, *shared) -> (x, None) in one scan; parameters get a leading layer axis.

    Each block is computed again in the backward pass as the policy says; what is shared is given to every block.
    """
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        length=length,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def with_axes(init: Callable, *axes: str) -> Callable[..., Array]:
    """The initializer of a parameter with those logical axes. A module is given the array itself, out of its box."""
    return nn.with_logical_partitioning(init, axes)  # pyright: ignore[reportReturnType]


class Dense(nn.Module):
    """x·kernel + bias over the last axis, in `dtype`; gradients of kernel and bias in float32 (models/product.py).

    With x·A·B beside it where the parameters have an adapter (models/adapters.py).
    """

    features: int
    dtype: str
    axes: tuple[str, str]  # logical axes of the kernel
    kernel_init: Callable
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... features"]:
        kernel = self.param("kernel", with_axes(self.kernel_init, *self.axes), (x.shape[-1], self.features))
        bias = None
        if self.use_bias:
            bias = self.param("bias", with_axes(nn.initializers.zeros, "vector"), (self.features,))
        y = affine(x, kernel, bias, self.dtype)
        if self.has_variable("params", A):
            down, up = (gathered(self.get_variable("params", name)) for name in (A, B))
            y = y + affine(affine(x, down, None, self.dtype), up, None, self.dtype)
        return checkpoint_name(y, "product")


def dense(features, name, *, dtype, axes=("embed", "features"), init=None, use_bias=True) -> Dense:
    """A dense layer with logical axes on its parameters; init defaults to Glorot uniform."""
    return Dense(features, dtype, axes, init or nn.initializers.xavier_uniform(), use_bias, name=name)


def sinusoids(t: Float[Array, " b"], frequencies: Float[Array | np.ndarray, " f"]) -> Float[Array, "b 2*f"]:
    """Cosines and sines of times, in float32 at least: the tangent needs it."""
    angles = at_least_float32(t)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in float32, or as it is if it is wider (float64 is for tests)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def layer_norm(x: Float[Array, "... c"], epsilon: float = 1e-6) -> Float[Array, "... c"]:
    """LayerNorm without scale or bias over the last axis, in float32 at least; returns what it computed in."""
    x = at_least_float32(x)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


class LayerNorm(nn.Module):
    """layer_norm(x)·scale + bias; returns the dtype of x."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        scale = self.param("scale", with_axes(nn.initializers.ones, "vector"), (x.shape[-1],))
        bias = self.param("bias", with_axes(nn.initializers.zeros, "vector"), (x.shape[-1],))
        return (layer_norm(x, self.epsilon) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, in float32 at least; returns the dtype of x."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        scale = self.param("scale", with_axes(nn.initializers.ones, "vector"), (x.shape[-1],))
        wide = at_least_float32(x)
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(x.dtype)


def attend(q: Heads, k: Heads, v: Heads, *, implementation="auto", mask=None, cross=False) -> Heads:
    """flash_attention of q [b, l, n, d] to k, v [b, m, n, d] on the mesh in use, if any.

    Tokens come and go split over seq. Between, self-attention has all tokens of its share of the heads, by all-to-all
    (Ulysses, arXiv 2309.14509); JAX differentiates that in both modes. cross: every device has all keys and values of
    its share of the batch, and nothing is exchanged but, backwards, their gradients summed. Kernels cannot be
    partitioned: they see the shapes of one device. A mask speaks of the whole sequence.
    """
    attention = functools.partial(flash_attention, implementation=implementation, mask=mask)
    if (mesh := current_mesh()) is None:
        return attention(q, k, v)
    swap = functools.partial(jax.lax.all_to_all, axis_name=RULES["heads"], tiled=True)

    def exchanged(q, k, v):
        o = attention(*(swap(x, split_axis=2, concat_axis=1) for x in (q, k, v)))  # all tokens of some heads
        return swap(o, split_axis=1, concat_axis=2)

    check_sequence(q.shape[2], q.shape[1:2], mesh)
    tokens = activation_spec(("batch", "tokens"), q.shape, mesh)
    keys = activation_spec(("batch",), k.shape, mesh) if cross else tokens
    local = attention if cross else exchanged
    return jax.shard_map(local, mesh=mesh, in_specs=(tokens, keys, keys), out_specs=tokens)(q, k, v)


class SelfAttention(nn.Module):
    """Multi-head self-attention with per-head QK RMS-norm."""

    num_heads: int
    dtype: str
    implementation: str = "auto"  # of flash_attention

    @nn.compact
    def __call__(self, x_blc: Tokens) -> Tokens:
        b, l, c = x_blc.shape
        heads = (b, l, self.num_heads, c // self.num_heads)
        q, k, v = jnp.split(dense(3 * c, "qkv", dtype=self.dtype)(x_blc), 3, axis=-1)
        q = RMSNorm(name="q_norm")(q.reshape(heads))
        k = RMSNorm(name="k_norm")(k.reshape(heads))
        o = attend(q, k, v.reshape(heads), implementation=self.implementation)
        return dense(c, "out", dtype=self.dtype, axes=("features", "embed"))(o.reshape(b, l, c))


class Mlp(nn.Module):
    """Two dense layers with a GELU between, by tanh unless exact."""

    hidden: int
    dtype: str
    use_bias: bool = True
    exact: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        h = dense(self.hidden, "up", dtype=self.dtype, use_bias=self.use_bias)(x)
        h = nn.gelu(h, approximate=not self.exact)
        axes = ("features", "embed")
        return dense(x.shape[-1], "down", dtype=self.dtype, axes=axes, use_bias=self.use_bias)(h)


def patchify(x: Float[Array, "b t h w c"], patch) -> Float[Array, "b l f"]:
    """l = (t/pt)(h/ph)(w/pw) tokens of f = pt·ph·pw·c, in that order; ValueError unless patch divides."""
    b, t, h, w, c = x.shape
    pt, ph, pw = patch
    if t % pt or h % ph or w % pw:
        raise ValueError(f"patch {pt}×{ph}×{pw} does not divide the {t}×{h}×{w} frames, rows and columns")
    x = x.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, (t // pt) * (h // ph) * (w // pw), pt * ph * pw * c)


def unpatchify(x_blc: Float[Array, "b l f"], patch, shape) -> Float[Array, "b t h w c"]:
    """The inverse of patchify, to the given shape."""
    b, t, h, w, c = shape
    pt, ph, pw = patch
    x = x_blc.reshape(b, t // pt, h // ph, w // pw, pt, ph, pw, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(shape)


def rope_angles(grid, head_dim: int, ratios=(1.0, 1.0, 1.0)) -> list[Float[np.ndarray, "places pairs"]]:
    """Rotary angles of tokens on a (t, h, w) grid, one float64 table for each axis.

    Of head_dim/2 pairs of features, height and width have head_dim // 6 each, time the rest; position p turns pair i
    of an axis with d features by p·theta^(−2i/d), theta = 10⁴·ratio^(d/(d−2)): a ratio above 1 slows the low
    frequencies by so much and leaves the highest, for grids larger than those a network was first trained on.
    """
    spatial = head_dim // 6 * 2
    widths = (head_dim - 2 * spatial, spatial, spatial)
    thetas = [1e4 * (ratio ** (d / (d - 2)) if ratio != 1 else 1) for ratio, d in zip(ratios, widths, strict=True)]
    return [
        np.outer(np.arange(n), theta ** -(np.arange(0, d, 2) / d))
        for n, d, theta in zip(grid, widths, thetas, strict=True)
    ]


def rope_tables(grid, head_dim: int, dtype, ratios=(1.0, 1.0, 1.0)) -> tuple[Turns, Turns]:
    """(cos, sin) of rope_angles, spread over the grid's tokens from small tables: no large constant is compiled in."""

    def spread(f):
        time, rows, columns = (jnp.asarray(f(angles), dtype) for angles in rope_angles(grid, head_dim, ratios))
        tables = time[:, None, None], rows[None, :, None], columns[None, None]
        whole = [jnp.broadcast_to(table, (*grid, table.shape[-1])) for table in tables]
        return jnp.concatenate(whole, axis=-1).reshape(-1, head_dim // 2)

    return spread(np.cos), spread(np.sin)


def rotate_pairs(x_blnd: Heads, cos: Turns, sin: Turns) -> Heads:
    """Rotary embedding of neighbouring features (0, 1), (2, 3), …; returns the dtype of x."""
    even, odd = x_blnd[..., 0::2], x_blnd[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]  # the same for every head
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_blnd.shape).astype(x_blnd.dtype)


def rotate_halves(x_blnd: Heads, cos: Turns, sin: Turns) -> Heads:
    """Rotary embedding of the pairs of features (i, i + d/2); returns the dtype of x."""
    first, second = jnp.split(x_blnd, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]  # the same for every head
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x_blnd.dtype)


def dropped(x: Float[Array, "b ..."], dropout: dict | None, place: int) -> Float[Array, "b ..."]:
    """x with numbers put to 0 at a rate, and the others scaled up; as it is if dropout is None.

    dropout: a condition {"key": [b, 2] uint32, "rate": [b] float32}. Each sample has its own key, so a call and its
    tangent, on any devices, drop the same. place tells the layers of a network apart.
    """
    if dropout is None:
        return x

    def one(x, key, rate):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), place)
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)

    return jax.vmap(one)(x, dropout["key"], dropout["rate"])

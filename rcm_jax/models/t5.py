"""The encoders of T5 (arXiv 1910.10683) and umT5 (arXiv 2304.09151), which read the prompts of Cosmos-Predict2 and Wan.

Norms and softmax are computed in float32 at least, whatever narrower dtype computes the rest.
"""

import math
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rcm_jax.models.layers import Config, Dtype, RMSNorm, Tokens, dense, stack, with_axes
from rcm_jax.models.product import precision_of
from rcm_jax.models.records import TextEncoder
from rcm_jax.util.ranges import Count, Depth, Epsilon, Width, among, between, config, multiple


@config
class T5Config(Config):
    """Sizes of an encoder, under the names that transformers gives them."""

    vocab_size: Annotated[int, between(1, 10_000_000)]
    d_model: Width
    d_kv: Width  # features of a head
    d_ff: Width
    num_layers: Depth
    num_heads: Depth
    relative_attention_num_buckets: Annotated[int, between(4, 10_000), multiple(4)] = 32
    relative_attention_max_distance: Count = 128  # from there on all distances are one
    layer_norm_epsilon: Epsilon = 1e-6
    feed_forward_proj: Annotated[str, among(("relu", "gated-gelu"))] = "relu"  # the other is of T5 1.1 and umT5
    model_type: Annotated[str, among(("t5", "umt5"))] = "t5"  # in t5 all layers share one position bias
    dtype: Dtype = "float32"  # of the computation; parameters stay in the dtype they have

    @property
    def dim(self):
        """The width of all heads together, which need not be d_model."""
        return self.num_heads * self.d_kv

    def __post_init__(self):
        if self.dtype == "float16":
            raise ValueError("dtype float16 ends at 65,504, which activations of T5 exceed; take bfloat16")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance {distance} must be above a quarter of "
                f"relative_attention_num_buckets {buckets}"
            )


PUBLISHED = {
    "umt5-xxl": T5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        model_type="umt5",
    ),
    "t5-11b": T5Config(vocab_size=32128, d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128),
}


def bucket_of_distance(distance: Int[np.ndarray, "..."], buckets: int = 32, most: int = 128) -> Int[np.ndarray, "..."]:
    """The bucket of each distance, key − query (ints): half of them for keys that come later.

    In each half, half of the buckets hold one distance each, the others grow as powers do up to `most`.
    """
    half, exact = buckets // 2, buckets // 4
    size = np.abs(distance)
    powers = np.log(np.maximum(size, exact) / exact) / math.log(most / exact)
    coarse = np.minimum(exact + (powers * (half - exact)).astype(int), half - 1)
    return np.where(size < exact, size, coarse) + half * (np.asarray(distance) > 0)


class RelativeBias(nn.Module):
    """What the distances of l tokens add to the scores of every head, query by key."""

    config: T5Config

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "n l l"]:
        c = self.config
        init = with_axes(nn.initializers.normal(c.d_model**-0.5), "vector", "vector")
        table = self.param("table", init, (c.relative_attention_num_buckets, c.num_heads))
        sizes = c.relative_attention_num_buckets, c.relative_attention_max_distance
        of_distance = table[bucket_of_distance(np.arange(1 - length, length), *sizes)]
        place = jnp.arange(length)  # the square of distances is computed, not compiled in
        distance = place[None, :] - place[:, None]
        return of_distance[distance + length - 1].astype(c.wide).transpose(2, 0, 1)


class Attention(nn.Module):
    """Attention of all tokens to all, with what is added to the scores.

    In plain jnp: flash_attention takes no bias, and prompts have a few hundred tokens.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x_blc: Tokens, bias: Float[Array, "b n l l"]) -> Tokens:
        c = self.config

        def project(name):
            y = dense(c.dim, name, dtype=c.dtype, use_bias=False)(x_blc)
            return y.reshape(*x_blc.shape[:2], c.num_heads, c.d_kv)

        precision = precision_of(c.dtype)
        scores = jnp.einsum(
            "bind,bjnd->bnij", project("q"), project("k"), precision=precision, preferred_element_type=c.wide
        )
        weights = nn.softmax(scores + bias).astype(c.dtype)  # T5 does not scale the scores
        o = jnp.einsum("bnij,bjnd->bind", weights, project("v"), precision=precision)
        o = o.reshape(*x_blc.shape[:2], c.dim)
        return dense(c.d_model, "out", dtype=c.dtype, axes=("features", "embed"), use_bias=False)(o)


class FeedForward(nn.Module):
    """relu(up x) or gelu(gate x) · up x, and back."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        c = self.config
        h = dense(c.d_ff, "up", dtype=c.dtype, use_bias=False)(x)
        if c.feed_forward_proj == "relu":
            h = nn.relu(h)
        else:
            h = h * nn.gelu(dense(c.d_ff, "gate", dtype=c.dtype, use_bias=False)(x))
        return dense(c.d_model, "down", dtype=c.dtype, axes=("features", "embed"), use_bias=False)(h)


class Block(nn.Module):
    """Self-attention and feed-forward, both residual. A scan body: (x, ...) -> (x, None).

    padding, far below 0 where there is no token, is added to the scores, and so is position, which is None where the
    block has its own.
    """

    config: T5Config

    @nn.compact
    def __call__(
        self, x_blc: Tokens, padding: Float[Array, "b 1 1 l"], position: Float[Array, "n l l"] | None
    ) -> tuple:
        c = self.config
        if position is None:
            position = RelativeBias(c, name="relative_bias")(x_blc.shape[1])
        h = RMSNorm(c.layer_norm_epsilon, name="attention_norm")(x_blc)
        x_blc = x_blc + Attention(c, name="attention")(h, position + padding)
        h = RMSNorm(c.layer_norm_epsilon, name="mlp_norm")(x_blc)
        return x_blc + FeedForward(c, name="mlp")(h), None


class T5Encoder(nn.Module):
    """Embeddings, in the config's dtype, of tokens ids under a mask that is 0 where padded.

    The last hidden state after the final norm, and zero where padded, as Wan and Cosmos-Predict2 both have it. ids must
    be below vocab_size (not checked). ValueError for other shapes.
    """

    config: T5Config

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Int[Array, "b l"]) -> Float[Array, "b l d_model"]:
        c = self.config
        if ids.ndim != 2 or ids.shape != mask.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids must be ints [b, l], and so the mask, got {ids.dtype} {ids.shape} and {mask.shape}")
        mask = mask > 0
        init = with_axes(nn.initializers.normal(1.0), "vector", "embed")
        x_blc = self.param("embedding", init, (c.vocab_size, c.d_model))[ids].astype(c.dtype)
        position = RelativeBias(c, name="relative_bias")(ids.shape[1]) if c.model_type == "t5" else None
        padding = jnp.where(mask, 0, jnp.finfo(c.wide).min).astype(c.wide)[:, None, None]
        x_blc, _ = stack(Block, c.num_layers, "none")(c, name="blocks")(x_blc, padding, position)
        x_blc = RMSNorm(c.layer_norm_epsilon, name="norm_out")(x_blc)
        return jnp.where(mask[..., None], x_blc, 0)


def init(config: T5Config, key):
    """Boxed parameters (with logical axes) for that config, whatever length of prompts it is used on later."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return T5Encoder(config).init(key, ids, ids)["params"]


TEXT_ENCODER = TextEncoder(
    config=T5Config,
    module=T5Encoder,
    width=lambda config: config.d_model,
    tokens=lambda config: config.vocab_size,
    published=PUBLISHED,
)

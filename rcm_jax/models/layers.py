"""Layers that the networks share. Shapes: b batch, l tokens, n heads, d features of a head, c model width."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import flash_attention

DTYPES = ("float32", "bfloat16", "float16", "float64")  # of the computation
REMAT_POLICIES = {
    "none": None,  # keep everything: fastest, for small networks
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
}


def dense(features, name, *, dtype, axes=("embed", "features"), init=None, use_bias=True):
    """nn.Dense with logical axes on its parameters; init defaults to Glorot uniform."""
    init = init or nn.initializers.xavier_uniform()
    return nn.Dense(
        features,
        dtype=dtype,
        name=name,
        use_bias=use_bias,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("vector",)),
    )


def sinusoids(t, frequencies):
    """[b] times -> [b, 2·len(frequencies)] cosines and sines, in float32 at least: the tangent needs it."""
    angles = at_least_float32(t)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def at_least_float32(x):
    """x in float32, or as it is if it is wider (float64 is for tests)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def layer_norm(x, epsilon=1e-6):
    """LayerNorm without scale or bias over the last axis, in float32 at least; returns what it computed in."""
    x = at_least_float32(x)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, in float32 at least; returns the dtype of x."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("vector",)), (x.shape[-1],))
        wide = at_least_float32(x)
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with per-head QK RMS-norm: [b, l, c] -> [b, l, c]."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_blc):
        b, l, c = x_blc.shape
        heads = (b, l, self.num_heads, c // self.num_heads)
        q, k, v = jnp.split(dense(3 * c, "qkv", dtype=self.dtype)(x_blc), 3, axis=-1)
        q = RMSNorm(name="q_norm")(q.reshape(heads))
        k = RMSNorm(name="k_norm")(k.reshape(heads))
        o = flash_attention(q, k, v.reshape(heads))
        return dense(c, "out", dtype=self.dtype, axes=("features", "embed"))(o.reshape(b, l, c))


class Mlp(nn.Module):
    """Two dense layers with a tanh-approximated GELU between: [..., c] -> [..., c]."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(dense(self.hidden, "up", dtype=self.dtype)(x))
        return dense(x.shape[-1], "down", dtype=self.dtype, axes=("features", "embed"))(h)

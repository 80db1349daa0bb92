"""A small class-conditional diffusion transformer (DiT, arXiv 2212.09748; QK-norm after arXiv 2302.05442)."""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rcm_jax.models.layers import (
    Config,
    Dtype,
    Frequency,
    Implementation,
    Mlp,
    Remat,
    SelfAttention,
    Tokens,
    check_heads,
    dense,
    layer_norm,
    patchify,
    sinusoids,
    stack,
    unpatchify,
    with_axes,
)
from rcm_jax.models.records import Network
from rcm_jax.parallel.sharding import split
from rcm_jax.util.ranges import Depth, Frequencies, Width, between, config


@config
class DiTConfig(Config):
    """Sizes of a DiT on images [b, h, w, c]; the label num_classes is the null class of guidance."""

    num_classes: Width
    patch: Annotated[int, between(1, 1_000)]
    dim: Width
    num_layers: Depth
    num_heads: Depth
    mlp_ratio: Annotated[int, between(1, 1_000)] = 4
    freq_dim: Frequencies = 64  # cosines and sines of the time
    max_frequency: Frequency = 16.0  # per unit of time: higher resolves t better and makes dF/dt larger
    dtype: Dtype = "float32"  # compute dtype; parameters and time embedding are float32
    remat: Remat = "none"
    attention: Implementation = "auto"

    def __post_init__(self):
        check_heads(self)


class Block(nn.Module):
    """adaLN-zero block: modulated self-attention and MLP, both residual. A scan body: (x, emb) -> (x, None)."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_blc: Tokens, emb_bc: Float[Array, "b c"]) -> tuple[Tokens, None]:
        c = self.config
        modulation = dense(6 * c.dim, "modulation", dtype=c.wide, init=nn.initializers.zeros)(nn.silu(emb_bc))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation[:, None], 6, axis=-1)
        h = (layer_norm(x_blc) * (1 + scale1) + shift1).astype(c.dtype)
        h = SelfAttention(c.num_heads, c.dtype, c.attention, name="attention")(h)
        x_blc = x_blc + (gate1 * h).astype(x_blc.dtype)
        h = (layer_norm(x_blc) * (1 + scale2) + shift2).astype(c.dtype)
        h = Mlp(c.mlp_ratio * c.dim, c.dtype, name="mlp")(h)
        return x_blc + (gate2 * h).astype(x_blc.dtype), None


class DiT(nn.Module):
    """F or v of images x at times t for labels: as x, float32."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], t: Float[Array, " b"], label: Int[Array, " b"]) -> Array:
        c = self.config
        x, patch = x[:, None], (1, c.patch, c.patch)  # one frame
        x_blc = dense(c.dim, "patch_in", dtype=c.dtype, axes=("features", "embed"))(patchify(x, patch))
        init = with_axes(nn.initializers.normal(0.02), "vector", "embed")
        position = self.param("position", init, x_blc.shape[1:]).astype(c.dtype)
        x_blc = split(x_blc + position, "batch", "tokens")

        frequencies = jnp.geomspace(1.0, c.max_frequency, c.freq_dim // 2)
        emb_bc = dense(c.dim, "time_in", dtype=c.wide)(sinusoids(t, frequencies))
        emb_bc = dense(c.dim, "time_out", dtype=c.wide)(nn.silu(emb_bc))
        emb_bc = emb_bc + nn.Embed(c.num_classes + 1, c.dim, name="label", embedding_init=init)(label)

        x_blc, _ = stack(Block, c.num_layers, c.remat)(c, name="blocks")(x_blc, emb_bc)

        modulation = dense(2 * c.dim, "modulation", dtype=c.wide, init=nn.initializers.zeros)(nn.silu(emb_bc))
        shift, scale = jnp.split(modulation[:, None], 2, axis=-1)
        x_blc = layer_norm(x_blc) * (1 + scale) + shift
        out = dense(c.patch**2 * x.shape[-1], "patch_out", dtype=c.wide, init=nn.initializers.zeros)(x_blc)
        return unpatchify(split(out, "batch", "tokens"), patch, x.shape)[:, 0]


NETWORK = Network(
    config=DiTConfig,
    module=DiT,
    conditions=lambda config, shape: {"label": jax.ShapeDtypeStruct((), jnp.int32)},
    smallest=lambda config: (config.patch, config.patch, 1),
    adapted=("blocks/attention/*", "blocks/mlp/*"),
    patch=lambda config: (1, config.patch, config.patch),
)

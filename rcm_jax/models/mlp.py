"""A small residual network on vectors, for data of a few dimensions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rcm_jax.models.layers import Config, Dtype, Frequency, dense, sinusoids, with_axes
from rcm_jax.models.records import Network
from rcm_jax.util.ranges import Few, Frequencies, Width, config


@config
class MLPConfig(Config):
    """Sizes of an MLP on vectors [b, features]; the label num_classes is the null class of guidance."""

    num_classes: Width
    features: Width = 2
    dim: Width = 128
    num_layers: Few = 3
    freq_dim: Frequencies = 32  # cosines and sines of the time
    max_frequency: Frequency = 8.0  # per unit of time: higher resolves t better and makes dF/dt larger
    dtype: Dtype = "float32"  # compute dtype; parameters, time embedding and output are float32


class MLP(nn.Module):
    """F or v of vectors x at times t for labels, float32.

    Every layer is residual and sees time and label. SiLU is smooth: the derivative in t is part of the method.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b f"], t: Float[Array, " b"], label: Int[Array, " b"]) -> Float[Array, "b f"]:
        c = self.config
        if x.ndim != 2 or x.shape[-1] != c.features:
            raise ValueError(f"the MLP takes x of [b, features = {c.features}], got {list(x.shape)}")
        frequencies = jnp.geomspace(1.0, c.max_frequency, c.freq_dim // 2)
        emb_bc = dense(c.dim, "time", dtype=c.wide)(sinusoids(t, frequencies))
        init = with_axes(nn.initializers.normal(1.0), "vector", "embed")
        emb_bc = emb_bc + nn.Embed(c.num_classes + 1, c.dim, name="label", embedding_init=init)(label)
        emb_bc = nn.silu(emb_bc).astype(c.dtype)

        h_bc = dense(c.dim, "in", dtype=c.dtype, axes=("features", "embed"))(x)
        for i in range(c.num_layers):
            shift = dense(c.dim, f"condition_{i}", dtype=c.dtype, use_bias=False)(emb_bc)
            h_bc = h_bc + nn.silu(dense(c.dim, f"layer_{i}", dtype=c.dtype)(h_bc) + shift)
        return dense(c.features, "out", dtype=c.wide, init=nn.initializers.zeros)(h_bc)


NETWORK = Network(
    config=MLPConfig,
    module=MLP,
    conditions=lambda config, shape: {"label": jax.ShapeDtypeStruct((), jnp.int32)},
    smallest=lambda config: (config.features,),
    adapted=("layer_*",),
)

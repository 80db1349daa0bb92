"""Networks by their configuration. The only folder with flax.linen modules."""

from rcm_jax.models.cosmos import Cosmos, CosmosConfig
from rcm_jax.models.dit import DiT, DiTConfig
from rcm_jax.models.mlp import MLP, MLPConfig
from rcm_jax.models.wan import Wan, WanConfig
from rcm_jax.parallel.sharding import check_sequence

# Frames, rows and columns of latents in one token, of the networks that have tokens.
PATCHES = {
    CosmosConfig: lambda config: config.patch,
    DiTConfig: lambda config: (1, config.patch, config.patch),
    WanConfig: lambda config: config.patch,
}
NETWORKS = {CosmosConfig: Cosmos, DiTConfig: DiT, MLPConfig: MLP, WanConfig: Wan}


def check_network(config, shape, mesh) -> None:
    """ValueError unless heads and tokens of a network on samples [t, h, w, c], or [h, w, c], divide over seq."""
    if type(config) in PATCHES:
        patch = PATCHES[type(config)](config)
        latents = (1, *shape[:-1])[-3:]
        check_sequence(config.num_heads, [n // p for n, p in zip(latents, patch, strict=True)], mesh, patch)

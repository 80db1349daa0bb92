"""Networks by their configuration. The only folder with flax.linen modules."""

from rcm_jax.models.cosmos import Cosmos, CosmosConfig
from rcm_jax.models.dit import DiT, DiTConfig
from rcm_jax.models.mlp import MLP, MLPConfig
from rcm_jax.models.wan import Wan, WanConfig

NETWORKS = {CosmosConfig: Cosmos, DiTConfig: DiT, MLPConfig: MLP, WanConfig: Wan}

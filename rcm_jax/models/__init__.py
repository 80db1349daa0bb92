"""Networks by their configuration. The only folder with flax.linen modules."""

from rcm_jax.models.dit import DiT, DiTConfig

NETWORKS = {DiTConfig: DiT}

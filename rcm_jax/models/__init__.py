"""Networks, by the records that their modules export. The only folder with flax.linen modules.

A new network is a file with its record, and a line here.
"""

import jax.numpy as jnp
import numpy as np

from rcm_jax.models import clip_vision, cosmos, dit, edm2_unet, edm_unet, mlp, sd_vae, t5, wan, wan22_vae, wan_vae
from rcm_jax.models.records import Network, record_of
from rcm_jax.parallel.sharding import check_sequence

NETWORKS = {
    "dit": dit.NETWORK,
    "mlp": mlp.NETWORK,
    "wan": wan.NETWORK,
    "cosmos": cosmos.NETWORK,
    "edm": edm_unet.NETWORK,
    "edm2": edm2_unet.NETWORK,
}
TEXT_ENCODERS = {"t5": t5.TEXT_ENCODER}
IMAGE_ENCODERS = {"clip_vision": clip_vision.IMAGE_ENCODER}
AUTOENCODERS = {
    "wan_vae": wan_vae.AUTOENCODER,
    "wan22_vae": wan22_vae.AUTOENCODER,
    "sd_vae": sd_vae.AUTOENCODER,
}


def network_of(config) -> Network:
    """The record of a network's config."""
    return record_of(NETWORKS, config)


def init(config, key):
    """Boxed parameters (with logical axes) for that config, whatever sizes of samples it is used on later."""
    record = network_of(config)
    shape = record.smallest(config)
    cond = {name: jnp.zeros((1, *leaf.shape), leaf.dtype) for name, leaf in record.conditions(config, shape).items()}
    return record.module(config).init(key, jnp.zeros((1, *shape)), jnp.zeros(1), **cond)["params"]  # pyright: ignore[reportArgumentType]


def token_grid(config, shape) -> tuple[int, ...] | None:
    """Frames, rows and columns of tokens of samples [t, h, w, c] or [h, w, c], with known frames before them; None for
    a network without tokens."""
    if (patch := network_of(config).patch(config)) is None:
        return None
    t, h, w = (1, *shape[:-1])[-3:]
    latents = t + network_of(config).known_frames(config), h, w
    return tuple(int(n) // p for n, p in zip(latents, patch, strict=True))


def check_network(config, shape, mesh) -> None:
    """ValueError unless heads and tokens of a network on samples of that shape divide over seq."""
    if grid := token_grid(config, shape):
        check_sequence(config.num_heads, grid, mesh, network_of(config).patch(config))


def example(config, shape, **conditions) -> dict:
    """Zeros in the shapes of one sample, {"x0", "cond"}, for a network of that config; conditions: of other shapes."""
    found = network_of(config).conditions(config, tuple(shape)) | conditions
    cond = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in found.items()}
    return {"x0": np.zeros(shape, np.float32), "cond": cond}

"""What a network of image to video is told of the first frame: its condition y."""

import jax
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.media import vae
from rcm_jax.models import network_of


def first_frame(
    config, params, frame: Float[Array | np.ndarray, "H W 3"], t: int, *, tile: int | None = None
) -> Float[np.ndarray, "t h w c"]:
    """The condition y of Wan, float32, for videos of t frames of latents that begin with a frame of pixels.

    Of its c channels the first ones, as many as frames of pixels go into one of latents (Wan: 4), say what is known: 1
    in the first frame of latents, else 0. The others, z_dim, are the latents of the frame and of grey after it.

    Args:
      config: of the autoencoder, with its parameters {"encoder": …} in `params` and `tile` as in vae.encode.
      frame: in [-1, 1]; H and W as vae.encode takes them.
      t: frames of latents, at least 1.
    """
    step = config.stride[0]
    pixels = np.zeros((1, 1 + (t - 1) * step, *frame.shape), np.float32)
    pixels[0, 0] = frame
    latents = vae.encode(config, params, pixels, tile=tile)[0]
    known = np.zeros((*latents.shape[:-1], step), np.float32)
    known[0] = 1
    return np.concatenate([known, latents], axis=-1, dtype=np.float32)


def check_conditions(model, shape, brought: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless a network takes, for x of that shape and beside text, what is brought: {name: shape}."""
    takes: dict[str, jax.ShapeDtypeStruct] = network_of(model).conditions(model, tuple(shape))
    wanted = {name: condition.shape for name, condition in takes.items() if name != "text"}
    if wanted != brought:
        told = [", ".join(f"{name} {list(s)}" for name, s in given.items()) or "nothing" for given in (wanted, brought)]
        ways = {
            "y": "the first frame of videos is y (first_frame)",
            "clip_features": "CLIP's features of it are --clip",
        }
        way = "".join(f"; {ways[name]}" for name in ways if name in wanted or name in brought)
        raise ValueError(f"beside text this network takes {told[0]}, but this set has {told[1]}{way}")

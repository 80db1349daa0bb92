"""The image encoder of CLIP (arXiv 2103.00020), whose features tell Wan2.1's image to video of the first frame.

That is the ViT-H/14 of open_clip, beside XLM-RoBERTa. Wan takes the tokens before the last layer, without a norm. Norms
and softmax are computed in float32 at least, whatever narrower dtype computes the rest.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.kernels.attention import flash_attention  # pyright: ignore[reportMissingImports]
from rcm_jax.models.layers import Config, Dtype, LayerNorm, Mlp, Tokens, dense, patchify, stack, with_axes
from rcm_jax.models.records import ImageEncoder
from rcm_jax.util.ranges import Depth, Epsilon, Width, config


@config
class ClipVisionConfig(Config):
    """Sizes of an encoder, under the names that transformers gives them."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Depth  # two at least: what the last one makes is not used
    num_attention_heads: Depth
    image_size: Width = 224  # rows and columns of pixels
    patch_size: Width = 14
    layer_norm_eps: Epsilon = 1e-5
    dtype: Dtype = "float32"  # of the computation; parameters stay in the dtype they have

    @property
    def tokens(self) -> int:
        """One for the whole image, and one for each patch."""
        return 1 + (self.image_size // self.patch_size) ** 2

    def __post_init__(self):
        if self.num_hidden_layers < 2:
            raise ValueError(
                f"num_hidden_layers {self.num_hidden_layers} must be at least 2: features are those before the last"
            )
        for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part} {getattr(self, part)} does not divide {whole} {getattr(self, whole)}")


PUBLISHED = {
    "wan-clip-vit-h": ClipVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16
    )
}


class Attention(nn.Module):
    """Attention of all tokens to all."""

    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x_blc: Tokens) -> Tokens:
        c, (b, l, width) = self.config, x_blc.shape
        qkv = dense(3 * width, "qkv", dtype=c.dtype)(x_blc).reshape(b, l, 3 * c.num_attention_heads, -1)
        # Not "auto": 257 tokens with heads of 80 are not what the kernels are made for.
        o = flash_attention(*jnp.split(qkv, 3, axis=2), implementation="blockwise")
        return dense(width, "out", dtype=c.dtype, axes=("features", "embed"))(o.reshape(x_blc.shape))


class Block(nn.Module):
    """Self-attention and MLP, both after a norm and residual. A scan body: x -> (x, None)."""

    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x_blc: Tokens) -> tuple[Tokens, None]:
        c = self.config
        h = LayerNorm(c.layer_norm_eps, name="attention_norm")(x_blc)
        x_blc = x_blc + Attention(c, name="attention")(h)
        h = LayerNorm(c.layer_norm_eps, name="mlp_norm")(x_blc)
        return x_blc + Mlp(c.intermediate_size, c.dtype, exact=True, name="mlp")(h), None


class ClipVision(nn.Module):
    """Features, in the config's dtype, of images that are normalised as media.clip does it: one token for the whole
    image and one for each patch, row by row, before the last layer. ValueError for images of another size."""

    config: ClipVisionConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b k hidden_size"]:
        c = self.config
        if images.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"images must be [b, {c.image_size}, {c.image_size}, 3], got {images.shape}")
        patches = patchify(images[:, None], (1, c.patch_size, c.patch_size))
        axes = ("features", "embed")
        patches = dense(c.hidden_size, "patch_in", dtype=c.dtype, axes=axes, use_bias=False)(patches)
        init = nn.initializers.normal(c.hidden_size**-0.5)
        whole = self.param("whole", with_axes(init, "embed"), (c.hidden_size,)).astype(c.dtype)
        place = self.param("place", with_axes(init, "vector", "embed"), (c.tokens, c.hidden_size)).astype(c.dtype)
        whole = jnp.broadcast_to(whole, (len(images), 1, c.hidden_size))
        x_blc = LayerNorm(c.layer_norm_eps, name="norm_in")(jnp.concatenate([whole, patches], axis=1) + place)
        x_blc, _ = stack(Block, c.num_hidden_layers - 1, "none")(c, name="blocks")(x_blc)
        if self.is_initializing():  # not used, but held: files come out as they went in
            LayerNorm(c.layer_norm_eps, name="norm_out")(Block(c, name="last")(x_blc)[0])
        return x_blc


def init(config: ClipVisionConfig, key):
    """Boxed parameters (with logical axes) for that config."""
    return ClipVision(config).init(key, jnp.zeros((1, config.image_size, config.image_size, 3)))["params"]


IMAGE_ENCODER = ImageEncoder(ClipVisionConfig, ClipVision, PUBLISHED)

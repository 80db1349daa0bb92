"""The diffusion transformer of Cosmos-Predict2 (MiniTrainDIT of nvidia-cosmos/cosmos-predict2) on latents.

Modulation is a low-rank map of the normalised time features plus one full map that all blocks share. Time features,
modulation, norms and the output are computed in float32, whatever narrower dtype computes the blocks.
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rcm_jax.models.layers import (
    Config,
    Dtype,
    Embedding,
    Implementation,
    Mlp,
    Remat,
    RMSNorm,
    Tokens,
    Turns,
    attend,
    check_heads,
    dense,
    layer_norm,
    patchify,
    rope_tables,
    rotate_halves,
    sinusoids,
    stack,
    unpatchify,
)
from rcm_jax.models.records import Network, check_known, known_condition
from rcm_jax.parallel.sharding import split
from rcm_jax.util.ranges import Depth, Natural, Width, between, config, only

Ratio = Annotated[float, between(0.01, 100)]


@config
class CosmosConfig(Config):
    """Sizes under the reference's names; defaults are those that all published text-to-image networks share.

    Video to world is given known_frames clean frames at the time KNOWN_TIME, as "known", and makes those after them.
    """

    model_channels: Width
    num_blocks: Depth
    num_heads: Depth
    in_channels: Width = 16  # with one for the mask of known frames, if there is one
    out_channels: Width = 16  # of latents
    known_frames: Natural = 0  # of latents, with which each video begins: video to world
    patch_spatial: Annotated[int, between(1, 100)] = 2
    patch_temporal: Annotated[int, only(1)] = 1
    concat_padding_mask: bool = True
    mlp_ratio: Ratio = 4.0
    crossattn_emb_channels: Width = 1024  # of the text
    adaln_lora_dim: Width = 256
    rope_h_extrapolation_ratio: Ratio = 4.0
    rope_w_extrapolation_ratio: Ratio = 4.0
    rope_t_extrapolation_ratio: Ratio = 1.0
    max_img_h: Width = 240  # of latents, which bounds the grid
    max_img_w: Width = 240
    max_frames: Width = 128
    # The reference's configs have these, too; some say it of all published networks, the others change nothing here.
    use_adaln_lora: Annotated[bool, only(True)] = True
    pos_emb_cls: Annotated[str, only("rope3d")] = "rope3d"
    extra_per_block_abs_pos_emb: Annotated[bool, only(False)] = False
    rope_enable_fps_modulation: Annotated[bool, only(False)] = False
    pos_emb_learnable: bool = True
    pos_emb_interpolation: str = "crop"
    min_fps: Natural = 1
    max_fps: Natural = 30
    crossattn_proj_in_channels: Natural | None = None
    dtype: Dtype = "float32"  # of the blocks; parameters stay in the dtype they have
    time_dtype: Dtype = "float32"  # of the time embedding; its sines and cosines are computed in float32 at least
    remat: Remat = "none"
    attention: Implementation = "auto"

    @property
    def dim(self):
        return self.model_channels

    @property
    def patch(self):
        return (self.patch_temporal, self.patch_spatial, self.patch_spatial)

    def __post_init__(self):
        check_heads(self)
        if self.dim // self.num_heads % 2 or self.dim // self.num_heads < 12:
            raise ValueError(f"model_channels/num_heads {self.dim // self.num_heads} must be even, and 12 at least")
        channels = self.out_channels + (self.known_frames > 0)
        if self.in_channels != channels:
            raise ValueError(
                f"in_channels {self.in_channels} must be {channels}: out_channels {self.out_channels}"
                + (", and the mask of known_frames" if self.known_frames else ", for there are no known_frames")
            )


# Of known frames: their noise level 1e-4, in rectified-flow time.
KNOWN_TIME = 1e-4 / (1 + 1e-4)
PUBLISHED = {
    "cosmos-0.6b": CosmosConfig(model_channels=1280, num_blocks=20, num_heads=20),
    "cosmos-2b": CosmosConfig(model_channels=2048, num_blocks=28, num_heads=16),
    "cosmos-14b": CosmosConfig(model_channels=5120, num_blocks=36, num_heads=40),
    "cosmos-v2w-2b": CosmosConfig(
        model_channels=2048, num_blocks=28, num_heads=16, in_channels=17, known_frames=1,
        rope_h_extrapolation_ratio=3.0, rope_w_extrapolation_ratio=3.0,
    ),
    "cosmos-v2w-14b": CosmosConfig(
        model_channels=5120, num_blocks=36, num_heads=40, in_channels=17, known_frames=1,
        rope_h_extrapolation_ratio=2.0, rope_w_extrapolation_ratio=2.0, rope_t_extrapolation_ratio=20 / 24,
    ),
}  # fmt: skip


def _modulation(
    config, emb_bc: Embedding, shared: Float[Array, "b k*c"], name: str, known=None
) -> Float[Array, "b l k*c"]:
    """From the time features: two dense layers through few features, plus the part that blocks share. Axis 1 is 1 or,
    where some tokens are known, has them all; then emb_bc and shared are [2b, ...], those of KNOWN_TIME first."""
    h = dense(config.adaln_lora_dim, f"{name}_in", dtype=config.wide, use_bias=False)(emb_bc)
    features = shared.shape[-1]
    axes, zeros = ("features", "embed"), nn.initializers.zeros
    h = dense(features, f"{name}_out", dtype=config.wide, axes=axes, use_bias=False, init=zeros)(h)
    modulation = split(h + shared, "batch")
    if known is None:
        return modulation[:, None]
    both = modulation.reshape(-1, 2, features)
    return jnp.where(known[None, :, None], both[:, :1], both[:, 1:])


class Attention(nn.Module):
    """Attention of tokens to themselves or, where there is one, to a context.

    Queries and keys are normalised by head, and turned by their place where there are tables.
    """

    config: CosmosConfig

    @nn.compact
    def __call__(self, x_blc: Tokens, context: Float[Array, "b m d"] | None = None, tables: tuple = ()) -> Tokens:
        c = self.config
        source = x_blc if context is None else context

        def project(x, name):
            y = dense(c.dim, name, dtype=c.dtype, use_bias=False)(x)
            return y.reshape(*x.shape[:2], c.num_heads, -1)

        q, k = RMSNorm(name="q_norm")(project(x_blc, "q")), RMSNorm(name="k_norm")(project(source, "k"))
        if tables:
            q, k = rotate_halves(q, *tables), rotate_halves(k, *tables)
        o = attend(q, k, project(source, "v"), implementation=c.attention, cross=context is not None)
        return dense(c.dim, "out", dtype=c.dtype, axes=("features", "embed"), use_bias=False)(o.reshape(x_blc.shape))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each modulated and residual. A scan body: (x, ...) -> (x, None)."""

    config: CosmosConfig

    @nn.compact
    def __call__(
        self, x_blc: Tokens, emb_bc: Embedding, shared: Embedding, text: Float[Array, "b m d"], cos: Turns, sin: Turns,
        known: Bool[Array, " l"] | None = None,
    ) -> tuple[Tokens, None]:  # fmt: skip
        c = self.config
        parts = {
            "self_attention": lambda h: Attention(c, name="self_attention")(h, tables=(cos, sin)),
            "cross_attention": lambda h: Attention(c, name="cross_attention")(h, text),
            "mlp": Mlp(int(c.mlp_ratio * c.dim), c.dtype, use_bias=False, exact=True, name="mlp"),
        }
        for name, part in parts.items():
            shift, scale, gate = jnp.split(_modulation(c, emb_bc, shared, f"{name}_modulation", known), 3, axis=-1)
            h = (layer_norm(x_blc) * (1 + scale) + shift).astype(c.dtype)
            x_blc = (x_blc + gate * part(h)).astype(c.dtype)
        return x_blc, None


class Cosmos(nn.Module):
    """v = eps − x0 of latents x at times t in 0..1, float32.

    text is padded as in training (zeros up to 512 tokens). padding_mask has any size, and 1 where there is no image;
    None: all is image. known: of video to world, the frames before x, which are not answered. ValueError for inputs
    that do not fit the config.
    """

    config: CosmosConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w out_channels"],
        t: Float[Array, " b"],
        text: Float[Array, "b m crossattn_emb_channels"],
        padding_mask: Float[Array, "b H W"] | None = None,
        known: Float[Array, "b k h w out_channels"] | None = None,
    ) -> Float[Array, "b t h w out_channels"]:
        c = self.config
        _check_inputs(c, x, t, text, padding_mask)
        check_known(c.known_frames, x, known)
        if known is not None:
            x = jnp.concatenate([known.astype(x.dtype), x], axis=1)
            t = jnp.stack([jnp.full_like(t, KNOWN_TIME), t], axis=1).reshape(-1)
        out_shape = x.shape
        grid = tuple(n // p for n, p in zip(x.shape[1:4], c.patch, strict=True))
        tokens = None
        if known is not None:
            frames = jnp.arange(grid[0]) < c.known_frames
            mask = jnp.broadcast_to(frames[None, :, None, None, None], (*x.shape[:-1], 1))
            x, tokens = jnp.concatenate([x, mask.astype(x.dtype)], axis=-1), jnp.repeat(frames, grid[1] * grid[2])
        if c.concat_padding_mask:
            x = jnp.concatenate([x, _mask_channel(x, padding_mask)], axis=-1)
        patch_in = dense(c.dim, "patch_in", dtype=c.dtype, axes=("features", "embed"), use_bias=False)
        x_blc = split(patch_in(patchify(x, c.patch)), "batch", "tokens")

        features = sinusoids(t, 10_000.0 ** -(np.arange(c.dim // 2) / (c.dim // 2))).astype(c.time_dtype)
        shared = nn.silu(dense(c.dim, "time_in", dtype=c.time_dtype, use_bias=False)(features))
        shared = dense(3 * c.dim, "time_out", dtype=c.time_dtype, use_bias=False)(shared).astype(c.wide)
        emb_bc = nn.silu(RMSNorm(name="time_norm")(features).astype(c.wide))

        ratios = c.rope_t_extrapolation_ratio, c.rope_h_extrapolation_ratio, c.rope_w_extrapolation_ratio
        cos, sin = rope_tables(grid, c.dim // c.num_heads, c.wide, ratios)
        text = text.astype(c.dtype)
        x_blc, _ = stack(Block, c.num_blocks, c.remat)(c, name="blocks")(x_blc, emb_bc, shared, text, cos, sin, tokens)

        modulation = _modulation(c, emb_bc, shared[:, : 2 * c.dim], "modulation_out", tokens)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        x_blc = layer_norm(x_blc) * (1 + scale) + shift
        out = dense(c.patch_spatial**2 * c.out_channels, "patch_out", dtype=c.wide, use_bias=False)(x_blc)
        return unpatchify(split(out, "batch", "tokens"), c.patch, out_shape)[:, c.known_frames :]


def _mask_channel(x: Array, padding_mask: Float[Array, "b H W"] | None) -> Float[Array, "b t h w 1"]:
    """The mask on the pixels of x [b, t, h, w, c], by nearest neighbours."""
    b, t, h, w, _ = x.shape
    if padding_mask is None:
        return jnp.zeros((b, t, h, w, 1), x.dtype)
    rows, columns = (np.arange(n) * m // n for n, m in zip((h, w), padding_mask.shape[1:], strict=True))
    mask = padding_mask[:, rows][:, :, columns].astype(x.dtype)
    return jnp.broadcast_to(mask[:, None, :, :, None], (b, t, h, w, 1))


def _check_inputs(c: CosmosConfig, x: Array, t: Array, text: Array, padding_mask: Array | None) -> None:
    """ValueError where the inputs of Cosmos are not what its docstring asks for."""
    if x.ndim != 5 or t.shape != x.shape[:1] or x.shape[-1] != c.out_channels:
        raise ValueError(f"x must be [b, t, h, w, {c.out_channels}] and its times t [b], got {x.shape} and {t.shape}")
    most = (c.max_frames - c.known_frames, c.max_img_h, c.max_img_w)
    if any(n > m for n, m in zip(x.shape[1:4], most, strict=True)):
        raise ValueError(f"x is {x.shape[1:4]} [t, h, w], more than the {most} of max_frames, max_img_h and max_img_w")
    if text.ndim != 3 or text.shape[2] != c.crossattn_emb_channels:
        raise ValueError(f"text must be [b, tokens, {c.crossattn_emb_channels}], got {text.shape}")
    if padding_mask is not None and (padding_mask.ndim != 3 or not c.concat_padding_mask):
        raise ValueError(f"padding_mask must be [b, H, W], and is for concat_padding_mask, got {padding_mask.shape}")


TEXT_TOKENS = 512  # to which T5's are padded
NETWORK = Network(
    config=CosmosConfig,
    module=Cosmos,
    conditions=lambda config, shape: (
        {"text": jax.ShapeDtypeStruct((TEXT_TOKENS, config.crossattn_emb_channels), jnp.float32)}
        | known_condition(config.known_frames, shape)
    ),
    smallest=lambda config: (*config.patch, config.out_channels),
    adapted=("blocks/*attention/*", "blocks/mlp/*"),
    known_frames=lambda config: config.known_frames,
    patch=lambda config: config.patch,
    parametrization="rectified_flow",
    time_scale=1.0,
    published=PUBLISHED,
)

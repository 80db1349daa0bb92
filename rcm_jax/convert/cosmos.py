"""Names of the Cosmos-Predict2 text-to-image networks. Layouts:

"official": nvidia-cosmos/cosmos-predict2; its files hold counters and tables of the rotary embedding as well (IGNORED);
"diffusers": CosmosTransformer3DModel.
"""

import re

from rcm_jax import models
from rcm_jax.convert.table import Conversion, Rule, columns_of, flat_patch_form, rules_of_modules
from rcm_jax.models import cosmos
from rcm_jax.models.cosmos import CosmosConfig

# ours, official, diffusers, kind of module
OUTSIDE = (
    ("time_in", "t_embedder.1.linear_1", "time_embed.t_embedder.linear_1", "matrix"),
    ("time_out", "t_embedder.1.linear_2", "time_embed.t_embedder.linear_2", "matrix"),
    ("time_norm", "t_embedding_norm", "time_embed.norm", "scale"),
    ("modulation_out_in", "final_layer.adaln_modulation.1", "norm_out.linear_1", "matrix"),
    ("modulation_out_out", "final_layer.adaln_modulation.2", "norm_out.linear_2", "matrix"),
    ("patch_out", "final_layer.linear", "proj_out", "matrix"),
)
BLOCK = (
    ("mlp/up", "mlp.layer1", "ff.net.0.proj", "matrix"),
    ("mlp/down", "mlp.layer2", "ff.net.2", "matrix"),
    *(
        (f"{ours}_modulation_{end}", f"adaln_modulation_{theirs}.{i}", f"{norm}.linear_{i}", "matrix")
        for ours, theirs, norm in (
            ("self_attention", "self_attn", "norm1"),
            ("cross_attention", "cross_attn", "norm2"),
            ("mlp", "mlp", "norm3"),
        )
        for i, end in ((1, "in"), (2, "out"))
    ),
    *(
        (f"{ours}/{part}", f"{theirs}.{name}", f"{diffusers}.{their_name}", kind)
        for ours, theirs, diffusers in (
            ("self_attention", "self_attn", "attn1"),
            ("cross_attention", "cross_attn", "attn2"),
        )
        for part, name, their_name, kind in (
            ("q", "q_proj", "to_q", "matrix"),
            ("k", "k_proj", "to_k", "matrix"),
            ("v", "v_proj", "to_v", "matrix"),
            ("out", "output_proj", "to_out.0", "matrix"),
            ("q_norm", "q_norm", "norm_q", "scale"),
            ("k_norm", "k_norm", "norm_k", "scale"),
        )
    ),
)
# What official files hold besides: nothing that is trained, or that the config does not say.
IGNORED = re.compile(r"accum_\w+|pos_embedder\.(seq|dim_spatial_range|dim_temporal_range)|.*\._extra_state")
WIDE = ("t_embed", "time_embed", "adaln_modulation", "norm")


def layouts(config: CosmosConfig) -> dict[str, list[Rule]]:
    """The rules of every layout."""

    def rules(column, patch, blocks):
        return [
            Rule("patch_in/kernel", patch, flat_patch_form(config.patch)),
            *rules_of_modules(columns_of(OUTSIDE, column)),
            *rules_of_modules(columns_of(BLOCK, column), "blocks/", blocks),
        ]

    return {
        "official": rules(1, "x_embedder.proj.1.weight", "blocks.{}."),
        "diffusers": rules(2, "patch_embed.proj.weight", "transformer_blocks.{}."),
    }


def described(config: CosmosConfig, layout: str) -> dict:
    """The config.json that is published beside a layout; nothing for official, which has none."""
    if layout == "official":
        return {}
    return {
        "_class_name": "CosmosTransformer3DModel",
        "adaln_lora_dim": config.adaln_lora_dim,
        "attention_head_dim": config.dim // config.num_heads,
        "concat_padding_mask": config.concat_padding_mask,
        "extra_pos_embed_type": None,
        "in_channels": config.in_channels,
        "max_size": [config.max_frames, config.max_img_h, config.max_img_w],
        "mlp_ratio": config.mlp_ratio,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_blocks,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "rope_scale": [
            config.rope_t_extrapolation_ratio,
            config.rope_h_extrapolation_ratio,
            config.rope_w_extrapolation_ratio,
        ],
        "text_embed_dim": config.crossattn_emb_channels,
    }


CONVERSION = Conversion(cosmos.NETWORK, models.init, layouts, described, WIDE, IGNORED)

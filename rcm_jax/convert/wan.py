"""Names of the Wan2.1 and Wan2.2 networks. Layouts:

"official": Wan-AI's checkpoints, also read by ComfyUI (patch embedding as a Conv3d kernel [dim, c, pt, ph, pw]);
"rcm": the same names in NVlabs/rcm (patch embedding flattened to [dim, c·pt·ph·pw]);
"diffusers": WanTransformer3DModel.
"""

from rcm_jax import models
from rcm_jax.convert.table import SAME, Conversion, Rule, columns_of, flat_patch_form, patch_form, rules_of_modules
from rcm_jax.models import wan
from rcm_jax.models.wan import WanConfig

# ours, official and rcm, diffusers, kind of module
OUTSIDE = (
    ("text_in", "text_embedding.0", "condition_embedder.text_embedder.linear_1", "dense"),
    ("text_out", "text_embedding.2", "condition_embedder.text_embedder.linear_2", "dense"),
    ("time_in", "time_embedding.0", "condition_embedder.time_embedder.linear_1", "dense"),
    ("time_out", "time_embedding.2", "condition_embedder.time_embedder.linear_2", "dense"),
    ("time_projection", "time_projection.1", "condition_embedder.time_proj", "dense"),
    ("modulation_out", "head.modulation", "scale_shift_table", "table"),
    ("patch_out", "head.head", "proj_out", "dense"),
)
OUTSIDE_CLIP = (
    ("image_norm_in", "img_emb.proj.0", "condition_embedder.image_embedder.norm1", "norm"),
    ("image_in", "img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", "dense"),
    ("image_out", "img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", "dense"),
    ("image_norm_out", "img_emb.proj.4", "condition_embedder.image_embedder.norm2", "norm"),
)
BLOCK = (
    ("modulation", "modulation", "scale_shift_table", "table"),
    ("self_attention/q", "self_attn.q", "attn1.to_q", "dense"),
    ("self_attention/k", "self_attn.k", "attn1.to_k", "dense"),
    ("self_attention/v", "self_attn.v", "attn1.to_v", "dense"),
    ("self_attention/out", "self_attn.o", "attn1.to_out.0", "dense"),
    ("self_attention/q_norm", "self_attn.norm_q", "attn1.norm_q", "scale"),
    ("self_attention/k_norm", "self_attn.norm_k", "attn1.norm_k", "scale"),
    ("cross_norm", "norm3", "norm2", "norm"),
    ("cross_attention/q", "cross_attn.q", "attn2.to_q", "dense"),
    ("cross_attention/k", "cross_attn.k", "attn2.to_k", "dense"),
    ("cross_attention/v", "cross_attn.v", "attn2.to_v", "dense"),
    ("cross_attention/out", "cross_attn.o", "attn2.to_out.0", "dense"),
    ("cross_attention/q_norm", "cross_attn.norm_q", "attn2.norm_q", "scale"),
    ("cross_attention/k_norm", "cross_attn.norm_k", "attn2.norm_k", "scale"),
    ("mlp/up", "ffn.0", "ffn.net.0.proj", "dense"),
    ("mlp/down", "ffn.2", "ffn.net.2", "dense"),
)
BLOCK_CLIP = (
    ("cross_attention/k_image", "cross_attn.k_img", "attn2.add_k_proj", "dense"),
    ("cross_attention/v_image", "cross_attn.v_img", "attn2.add_v_proj", "dense"),
    ("cross_attention/k_image_norm", "cross_attn.norm_k_img", "attn2.norm_added_k", "scale"),
)


def layouts(config: WanConfig) -> dict[str, list[Rule]]:
    """The rules of every layout."""
    outside = OUTSIDE + (OUTSIDE_CLIP if config.clip_dim else ())
    block = BLOCK + (BLOCK_CLIP if config.clip_dim else ())

    def rules(column, patch):
        rest = rules_of_modules(columns_of(outside, column))
        blocks = rules_of_modules(columns_of(block, column), "blocks/", "blocks.{}.")
        return [
            Rule("patch_in/kernel", "patch_embedding.weight", patch),
            Rule("patch_in/bias", "patch_embedding.bias", SAME),
            *rest,
            *blocks,
        ]

    convolution, flat = patch_form(config.patch_size), flat_patch_form(config.patch_size)
    return {"official": rules(1, convolution), "rcm": rules(1, flat), "diffusers": rules(2, convolution)}


# Parts of names of tensors that stay as they are when the rest is written in a narrower dtype: diffusers keeps these in
# float32 whatever it is asked for, and the tangent needs the time embedding there.
WIDE = ("time_embed", "modulation", "scale_shift_table", "norm1.", "norm2.", "norm3.")


def described(config: WanConfig, layout: str) -> dict:
    """The config.json that is published beside a layout; nothing for rcm, which has none."""
    if layout == "rcm":
        return {}
    if layout == "diffusers":
        return {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": config.dim if config.clip_dim else None,
            "attention_head_dim": config.dim // config.num_heads,
            "cross_attn_norm": True,
            "eps": config.eps,
            "ffn_dim": config.ffn_dim,
            "freq_dim": config.freq_dim,
            "image_dim": config.clip_dim or None,
            "in_channels": config.in_dim,
            "num_attention_heads": config.num_heads,
            "num_layers": config.num_layers,
            "out_channels": config.out_dim,
            "patch_size": list(config.patch_size),
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": config.text_dim,
        }
    names = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "model_type", "num_heads", "num_layers", "out_dim")
    return {"_class_name": "WanModel", "text_len": config.text_len} | {name: getattr(config, name) for name in names}


CONVERSION = Conversion(wan.NETWORK, models.init, layouts, described, WIDE)

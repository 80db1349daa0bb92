"""Names of the encoders of T5 and umT5. Layouts:

"official": umT5 in Wan-AI's checkpoints (models_t5_umt5-xxl-enc-bf16.pth) and in NVlabs/rcm;
"transformers": T5EncoderModel and UMT5EncoderModel, or whole models, whose decoder is passed over (IGNORED).
"""

import dataclasses
import re

from rcm_jax.convert.table import SAME, Conversion, Rule, columns_of, rules_of_modules
from rcm_jax.models import t5
from rcm_jax.models.t5 import T5Config

# ours, official, transformers, kind of module
BLOCK = (
    ("attention_norm", "norm1", "layer.0.layer_norm", "scale"),
    ("attention/q", "attn.q", "layer.0.SelfAttention.q", "matrix"),
    ("attention/k", "attn.k", "layer.0.SelfAttention.k", "matrix"),
    ("attention/v", "attn.v", "layer.0.SelfAttention.v", "matrix"),
    ("attention/out", "attn.o", "layer.0.SelfAttention.o", "matrix"),
    ("mlp_norm", "norm2", "layer.1.layer_norm", "scale"),
    ("mlp/down", "ffn.fc2", "layer.1.DenseReluDense.wo", "matrix"),
)
FEED_FORWARD = {
    "relu": (("mlp/up", "ffn.fc1", "layer.1.DenseReluDense.wi", "matrix"),),
    "gated-gelu": (
        ("mlp/gate", "ffn.gate.0", "layer.1.DenseReluDense.wi_0", "matrix"),
        ("mlp/up", "ffn.fc1", "layer.1.DenseReluDense.wi_1", "matrix"),
    ),
}
BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
IGNORED = re.compile(r"decoder\..*|lm_head\.weight")
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}


def layouts(config: T5Config) -> dict[str, list[Rule]]:
    """The rules of every layout; "official" is for what Wan has, umT5 with a gated feed-forward."""

    def rules(column, embedding, blocks, norm, bias):
        return [
            Rule("embedding", embedding, SAME),
            *rules_of_modules(columns_of(BLOCK + FEED_FORWARD[config.feed_forward_proj], column), "blocks/", blocks),
            *rules_of_modules([("norm_out", norm, "scale")]),
            Rule("relative_bias/table", bias.format(0), SAME)
            if config.model_type == "t5"
            else Rule("blocks/relative_bias/table", bias, SAME),
        ]

    theirs = rules(2, "shared.weight", "encoder.block.{}.", "encoder.final_layer_norm", BIAS)
    if config.model_type == "t5" or config.feed_forward_proj != "gated-gelu":
        return {"transformers": theirs}
    official = rules(1, "token_embedding.weight", "blocks.{}.", "norm", "blocks.{}.pos_embedding.embedding.weight")
    return {"official": official, "transformers": theirs}


def described(config: T5Config, layout: str) -> dict:
    """The config.json that is published beside a layout; nothing for official, which has none."""
    if layout == "official":
        return {}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name != "dtype"}
    return {"architectures": [f"{'UM' if config.model_type == 'umt5' else ''}T5EncoderModel"]} | values


CONVERSION = Conversion(t5.TEXT_ENCODER, t5.init, layouts, described, ignored=IGNORED, aliases=ALIASES)

"""Names of the image encoder of CLIP. Layouts:

"official": the visual half of models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth of Wan-AI;
"transformers": CLIPVisionModel, as it is published beside Wan2.1 (image_encoder/);
"transformers-5": the same without the prefix vision_model, as transformers saves it since version 5.

What Wan does not read of whole models is passed over (IGNORED): the encoder of text, and the projections to what both
share.
"""

import dataclasses
import re

import numpy as np

from rcm_jax.convert.table import SAME, TABLE, Conversion, Form, Rule, columns_of, patch_form, rules_of_modules
from rcm_jax.models import clip_vision
from rcm_jax.models.clip_vision import ClipVisionConfig

OUTSIDE = (  # ours, official, transformers, kind of module
    ("norm_in", "pre_norm", "pre_layrnorm", "norm"),
    ("norm_out", "post_norm", "post_layernorm", "norm"),
)
BLOCK = (
    ("attention_norm", "norm1", "layer_norm1", "norm"),
    ("attention/qkv", "attn.to_qkv", "self_attn.{part}_proj", "dense"),
    ("attention/out", "attn.proj", "self_attn.out_proj", "dense"),
    ("mlp_norm", "norm2", "layer_norm2", "norm"),
    ("mlp/up", "mlp.0", "mlp.fc1", "dense"),
    ("mlp/down", "mlp.2", "mlp.fc2", "dense"),
)
IGNORED = re.compile(
    r"textual\..*|log_scale|visual\.head"  # official
    r"|text_model\..*|(text|visual)_projection\.weight|logit_scale|(vision_model\.)?embeddings\.position_ids"
)
TOKEN = Form(lambda shape: (1, 1, *shape), lambda a, shape: a.reshape(shape), lambda a, shape: a.reshape(shape))


def image_patch_form(side: int) -> Form:
    """Our kernel [side·side·c, dim] as a Conv2d kernel [dim, c, side, side]."""
    form = patch_form((1, side, side))

    def to_ours(a, shape):
        return form.to_ours(np.expand_dims(a, 2), shape)

    def to_theirs(a, shape):
        return np.squeeze(form.to_theirs(a, shape), 2)

    def shape_there(shape):
        dim, channels, _, *window = form.shape(shape)
        return (dim, channels, *window)

    return Form(shape_there, to_ours, to_theirs)


def layouts(config: ClipVisionConfig) -> dict[str, list[Rule]]:
    """The rules of every layout."""
    last = config.num_hidden_layers - 1

    def rules(column, prefix, layers, patch, whole, place):
        block = columns_of(BLOCK, column)
        found = [
            Rule("patch_in/kernel", prefix + patch, image_patch_form(config.patch_size)),
            Rule("whole", *whole),
            Rule("place", *place),
            *rules_of_modules(columns_of(OUTSIDE, column), theirs=prefix),
            *rules_of_modules(block, "blocks/", f"{prefix}{layers}.{{}}."),
            *rules_of_modules(block, "last/", f"{prefix}{layers}.{last}."),
        ]
        return [rule._replace(parts=("q", "k", "v")) if "{part}" in rule.theirs else rule for rule in found]

    def theirs(prefix):
        names = (f"{prefix}embeddings.class_embedding", SAME), (f"{prefix}embeddings.position_embedding.weight", SAME)
        return rules(2, prefix, "encoder.layers", "embeddings.patch_embedding.weight", *names)

    official = ("visual.cls_embedding", TOKEN), ("visual.pos_embedding", TABLE)
    return {
        "official": rules(1, "visual.", "transformer", "patch_embedding.weight", *official),
        "transformers": theirs("vision_model."),
        "transformers-5": theirs(""),
    }


def described(config: ClipVisionConfig, layout: str) -> dict:
    """The config.json that is published beside a layout; nothing for official, which has none."""
    if layout == "official":
        return {}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name != "dtype"}
    kind = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "gelu"}
    return kind | {"num_channels": 3} | values


CONVERSION = Conversion(clip_vision.IMAGE_ENCODER, clip_vision.init, layouts, described, ignored=IGNORED)

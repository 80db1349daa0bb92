"""Records tests/golden/clip_vision: a tiny image encoder of CLIP, as Wan2.1's image to video has it.

python tests/golden/make_clip_vision.py
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from oracles import diffsynth, drawn, keep, keep_index, normal

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of wan/modules/clip.py
SIZES = ((17, 23), (28, 28), (61, 40))
CONFIG = dict(
    hidden_size=12, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14,
    layer_norm_eps=1e-5,
)  # fmt: skip

LARGE = CONFIG | dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224
)


def official(c: dict):
    """The visual half, with what Wan's own config says of it."""
    return diffsynth("wan_video_image_encoder").VisionTransformer(
        image_size=c["image_size"], patch_size=c["patch_size"], dim=c["hidden_size"],
        mlp_ratio=c["intermediate_size"] / c["hidden_size"], out_dim=8, num_heads=c["num_attention_heads"],
        num_layers=c["num_hidden_layers"], pool_type="token", activation="gelu", norm_eps=c["layer_norm_eps"],
    )  # fmt: skip


def transformers_names(tensors: dict) -> dict:
    """The official tensors as transformers has them, by hand."""
    names = {"pre_norm": "pre_layrnorm", "post_norm": "post_layernorm", "transformer": "encoder.layers"}
    inner = {
        "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
    }  # fmt: skip
    found = {
        "embeddings.class_embedding": tensors["cls_embedding"][0, 0],
        "embeddings.position_embedding.weight": tensors["pos_embedding"][0],
        "embeddings.patch_embedding.weight": tensors["patch_embedding.weight"],
    }
    for name, tensor in tensors.items():
        first = name.split(".")[0]
        if first not in names:
            continue
        name = names[first] + name.removeprefix(first)
        for theirs, ours in inner.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        if ".attn.to_qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("attn.to_qkv", f"self_attn.{part}_proj")] = third
        else:
            found[name] = tensor
    return found


def main():
    """Both codes on the same weights; they must agree."""
    module = drawn(official(CONFIG), 0).double()
    other = CLIPVisionModel(CLIPVisionConfig(**CONFIG, hidden_act="gelu")).double().eval()
    there = transformers_names(module.state_dict())
    other.load_state_dict(there, strict=True)
    arrays = {}
    for height, width in SIZES:
        frames = normal(2, 3, height, width, seed=height).clamp(-1, 1)
        arrays[f"frames_{height}x{width}"] = frames.permute(0, 2, 3, 1)
        small = F.interpolate(frames.double(), size=(28, 28), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
        pixels = ((small * 0.5 + 0.5 - mean) / std).float().double()  # as they are kept
        features = module(pixels, use_31_block=True)
        theirs = other(pixels, output_hidden_states=True).hidden_states[-2]
        np.testing.assert_allclose(theirs.detach(), features, rtol=1e-12, atol=1e-12)
        arrays[f"pixels_{height}x{width}"] = pixels.permute(0, 2, 3, 1).float()
        arrays[f"features_{height}x{width}"] = features
    visual = {f"visual.{name}": tensor for name, tensor in module.state_dict().items()}
    keep("clip_vision", "clip_tiny", CONFIG, {"": visual, "transformers": prefixed(there)}, arrays)
    with torch.device("meta"):
        keep_index("wan_clip_vit_h", whole_official(), "wan/modules/clip.py XLMRobertaCLIP, both halves", LARGE)
        module = CLIPVisionModel(CLIPVisionConfig(**LARGE, hidden_act="gelu"))
        note = "transformers CLIPVisionModel, under the names of the published file"
        keep_index("transformers_wan_clip_vit_h", prefixed(module.state_dict()), note, LARGE)


def whole_official() -> dict:
    """Shapes of all that the official file holds; this copy of the code leaves the half of text out."""
    code = diffsynth("wan_video_image_encoder")
    text = code.XLMRobertaWithHead(
        vocab_size=250002, max_seq_len=514, type_size=1, pad_id=1, dim=1024, out_dim=1024, num_heads=16,
        num_layers=24, post_norm=True, dropout=0.1,
    )  # fmt: skip
    found = code.clip_xlm_roberta_vit_h_14().state_dict()
    return found | {f"textual.{name}": tensor for name, tensor in text.state_dict().items()}


def prefixed(tensors: dict) -> dict:
    """Under the names of the published file."""
    return {f"vision_model.{name}": tensor for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()

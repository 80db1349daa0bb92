"""Records tests/golden/cosmos_video: a tiny Cosmos-Predict2 network of video to world.

python tests/golden/make_cosmos_video.py
"""

import json
import types

import torch
from diffusers import CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from torch.nn.attention import SDPBackend, sdpa_kernel

from oracles import HERE, drawn, keep, keep_index, normal

TINY = dict(
    in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=4.0,
    text_embed_dim=8, adaln_lora_dim=4, max_size=(8, 32, 32), patch_size=(1, 2, 2), rope_scale=(0.8, 3.0, 2.0),
    concat_padding_mask=True, extra_pos_embed_type=None,
)  # fmt: skip
SIZES = {"2b": (16, 28, (1.0, 3.0, 3.0)), "14b": (40, 36, (20 / 24, 2.0, 2.0))}
KNOWN = 2  # frames
SIGMA = 1e-4  # their noise level, which the pipelines set


def main():
    """The network is asked as Cosmos2VideoToWorldPipeline asks it."""
    # The mask of padding has the size of x: torchvision would resize it.
    transformer_cosmos.transforms = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=lambda mask, *_, **__: mask),
        InterpolationMode=types.SimpleNamespace(NEAREST=0),
    )
    network = drawn(CosmosTransformer3DModel(**TINY), 0)
    weights = dict(network.state_dict())
    network = network.double()
    x, known, text = normal(2, 4, 3, 4, 6, seed=1), normal(2, 4, KNOWN, 4, 6, seed=2), normal(2, 5, 8, seed=3)
    t, tangent_x, tangent_t = torch.tensor([0.2, 0.85]), normal(2, 4, 3, 4, 6, seed=4), torch.tensor([0.7, -0.4])
    padding = torch.zeros(1, 1, 4, 6).double()

    def velocity(x, t):
        frames = known.shape[2] + x.shape[2]
        is_known = (torch.arange(frames) < KNOWN).double().reshape(1, 1, frames, 1, 1)
        times = is_known * SIGMA / (1 + SIGMA) + (1 - is_known) * t.reshape(2, 1, 1, 1, 1)
        hidden, mask = torch.cat([known.double(), x], 2), is_known.expand(2, 1, frames, 4, 6)
        return network(
            hidden, times, text.double(), condition_mask=mask, padding_mask=padding, return_dict=False
        )[0][:, :, KNOWN:]  # fmt: skip

    inputs = x.double(), t.double()
    with sdpa_kernel(SDPBackend.MATH):  # which forward mode knows
        out, jvp = torch.func.jvp(velocity, inputs, (tangent_x.double(), tangent_t.double()))
    arrays = dict(x=x, known=known, text=text, t=t, tangent_x=tangent_x, tangent_t=tangent_t)
    keep("cosmos_video", "cosmos_video_tiny", TINY, {"diffusers": weights}, arrays | dict(v_f64=out, jvp_f64=jvp))
    for name, (heads, layers, scale) in SIZES.items():
        config = TINY | dict(
            in_channels=17, out_channels=16, num_attention_heads=heads, attention_head_dim=128, num_layers=layers,
            text_embed_dim=1024, adaln_lora_dim=256, max_size=(128, 240, 240), rope_scale=scale,
        )  # fmt: skip
        with torch.device("meta"):
            shapes = CosmosTransformer3DModel(**config).state_dict()
        note = "of the class with the config of diffusers' conversion script"
        keep_index(f"diffusers_cosmos_predict2_video2world_{name}", shapes, note, json.loads(json.dumps(config)))


if __name__ == "__main__":
    main()
    print(*(HERE / "cosmos_video").iterdir())

"""Records tests/golden/wan_ti2v: a tiny network of Wan2.2 TI2V-5B, with a time for each frame.

python tests/golden/make_wan_ti2v.py
"""

import torch
from diffusers import WanTransformer3DModel

from oracles import diffsynth, drawn, keep, keep_index, normal

CONFIG = dict(
    dim=24, eps=1e-6, ffn_dim=32, freq_dim=16, in_dim=4, model_type="ti2v", num_heads=2, num_layers=2, out_dim=4,
    text_len=6, text_dim=8,
)  # fmt: skip
LARGE = CONFIG | dict(
    dim=3072, ffn_dim=14336, freq_dim=256, in_dim=48, num_heads=24, num_layers=30, out_dim=48, text_len=512,
    text_dim=4096,
)  # fmt: skip
SHAPE = (2, 4, 3, 4, 6)  # [b, c, t, h, w]
PATCH = (1, 2, 2)
NAMES = (  # official, diffusers
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    (".modulation", ".scale_shift_table"),
    (".ffn.0", ".ffn.net.0.proj"),
    (".ffn.2", ".ffn.net.2"),
    (".norm3", ".norm2"),
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
)


def official(c: dict):
    """The network, whose own RMS norms would round to float32."""
    code = diffsynth("wan_video_dit")
    code.RMSNorm.forward = lambda self, x: self.norm(x) * self.weight
    names = ("dim", "in_dim", "ffn_dim", "out_dim", "text_dim", "freq_dim", "eps", "num_heads", "num_layers")
    return code.WanModel(**{name: c[name] for name in names}, patch_size=PATCH, has_image_input=False)


def diffusers_config(c: dict) -> dict:
    """What WanTransformer3DModel is told."""
    return dict(
        added_kv_proj_dim=None, attention_head_dim=c["dim"] // c["num_heads"], cross_attn_norm=True, eps=c["eps"],
        ffn_dim=c["ffn_dim"], freq_dim=c["freq_dim"], in_channels=c["in_dim"], num_attention_heads=c["num_heads"],
        num_layers=c["num_layers"], out_channels=c["out_dim"], patch_size=list(PATCH),
        qk_norm="rms_norm_across_heads", text_dim=c["text_dim"],
    )  # fmt: skip


def diffusers_name(name: str) -> str:
    """Of an official name, by hand."""
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name


def forward(net, x, t, text):
    """The network at times t [b, l] of tokens, step by step as the pipeline of TI2V runs it."""
    code = diffsynth("wan_video_dit")
    sines = code.sinusoidal_embedding_1d(net.freq_dim, t.flatten()).unflatten(0, t.shape)
    time = net.time_embedding(sines)
    modulation = net.time_projection(time).unflatten(2, (6, net.dim))
    text = net.text_embedding(text)
    tokens, (f, h, w) = net.patchify(x)
    parts = (
        net.freqs[axis][:n].view(*(n if i == axis else 1 for i in range(3)), -1).expand(f, h, w, -1)
        for axis, n in enumerate((f, h, w))
    )
    turns = torch.cat(list(parts), dim=-1).reshape(f * h * w, 1, -1)
    for block in net.blocks:
        tokens = block(tokens, text, modulation, turns)
    return net.unpatchify(net.head(tokens, time), (f, h, w))


def main():
    """Values and tangents in float64; diffusers, which rounds to float32 here and there, must be near."""
    net = drawn(official(CONFIG), 0).double()
    other = WanTransformer3DModel(**diffusers_config(CONFIG)).eval().requires_grad_(False)
    other.load_state_dict({diffusers_name(k): v.float() for k, v in net.state_dict().items()}, strict=True)
    b, _, frames, height, width = SHAPE
    each = height * width // 4  # tokens of a frame
    arrays = {}
    times = {"clean_first": [[0, 700, 700], [0, 40, 40]], "all_differ": [[0.5, 300, 999], [875.25, 3, 640]]}
    for i, (name, values) in enumerate(times.items()):
        x, dx = (normal(*SHAPE, seed=10 * i + k) for k in range(2))
        text = normal(b, CONFIG["text_len"], CONFIG["text_dim"], seed=10 * i + 2)
        t, dt = torch.tensor(values), normal(b, frames, seed=10 * i + 3) * 100
        assert t.shape == (b, frames)

        def call(x, t, text=text.double()):
            return forward(net, x, t.repeat_interleave(each, dim=1), text)

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out, jvp = torch.func.jvp(call, (x.double(), t.double()), (dx.double(), dt.double()))
        theirs = other(x, t.repeat_interleave(each, dim=1), text, return_dict=False)[0]
        error = (theirs - out).norm() / out.norm()
        print(f"{name}: diffusers in float32 is {error:.1e} away")
        assert error < 3e-6
        found = dict(x=x, timesteps=t, crossattn_emb=text, tangent_x=dx, tangent_t=dt, out_f64=out, jvp_f64=jvp)
        arrays |= {f"{name}_{key}": value for key, value in found.items()}
    keep("wan_ti2v", "ti2v_tiny", CONFIG, {"": net.state_dict()}, arrays)
    with torch.device("meta"):
        large, other = official(LARGE), WanTransformer3DModel(**diffusers_config(LARGE))
    config = {name: value for name, value in LARGE.items() if name != "text_dim"}
    note = "Wan2.2 repository wan/modules/model.py WanModel (published checkpoint of TI2V-5B)"
    keep_index("wan2.2_ti2v_5B", large.state_dict(), note, config)
    keep_index(
        "diffusers_wan2.2_ti2v_5B", other.state_dict(), "diffusers WanTransformer3DModel", diffusers_config(LARGE)
    )


if __name__ == "__main__":
    main()

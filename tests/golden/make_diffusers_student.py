"""Records tests/golden/diffusers_student: few steps of a tiny student, and adapters, as diffusers' pipeline has them.

python tests/golden/make_diffusers_student.py
"""

import functools
import json

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.schedulers import scheduling_flow_match_euler_discrete as scheduling
from peft import PeftModel
from safetensors.torch import save_file

from oracles import HERE, drawn, keep, normal

CONFIG = dict(
    added_kv_proj_dim=None, attention_head_dim=12, cross_attn_norm=True, eps=1e-6, ffn_dim=32, freq_dim=16,
    in_channels=4, num_attention_heads=2, num_layers=2, out_channels=4, patch_size=[1, 2, 2],
    qk_norm="rms_norm_across_heads", text_dim=8,
)  # fmt: skip
SCHEDULER = dict(num_train_timesteps=1000, shift=1.0, stochastic_sampling=True, use_dynamic_shifting=False)
TIMES = (np.arctan(80.0), 1.3, 1.0, 0.6)  # of TrigFlow
SHAPE = (1, 4, 2, 4, 6)  # [b, c, t, h, w]
RANK, ALPHA = 3, 7.0
# Modules with an adapter: official, diffusers, in, out.
MODULES = (
    ("self_attn.q", "attn1.to_q", 24, 24),
    ("self_attn.o", "attn1.to_out.0", 24, 24),
    ("cross_attn.v", "attn2.to_v", 24, 24),
    ("ffn.0", "ffn.net.0.proj", 24, 32),
    ("ffn.2", "ffn.net.2", 32, 24),
)


def network() -> WanTransformer3DModel:
    return drawn(WanTransformer3DModel(**CONFIG), seed=0)


def sampled(net, noise, text) -> torch.Tensor:
    """Few steps by the pipeline; noise [steps, *SHAPE]: what is first scaled, and then drawn after each step."""
    sigmas = [float(np.sin(t) / (np.sin(t) + np.cos(t))) for t in TIMES]
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, sigmas=sigmas)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=net)
    pipe.set_progress_bar_config(disable=True)
    drawn_next = iter([*noise[1:], torch.zeros(SHAPE)])
    scheduling.randn_tensor = lambda *args, **options: next(drawn_next)
    return pipe(
        prompt_embeds=text, negative_prompt_embeds=None, num_inference_steps=len(sigmas), guidance_scale=1.0,
        height=8 * SHAPE[3], width=8 * SHAPE[4], num_frames=1 + 4 * (SHAPE[2] - 1), latents=sigmas[0] * noise[0],
        output_type="latent",
    ).frames  # fmt: skip


def adapters() -> dict[str, dict[str, torch.Tensor]]:
    """{layout: tensors} of one adapter."""
    files, seed = {"diffusers": {}, "official": {}, "peft": {}}, 10
    for layer in range(CONFIG["num_layers"]):
        for official, diffusers, into, out in MODULES:
            down, up = normal(RANK, into, seed=seed), 0.3 * normal(out, RANK, seed=seed + 1)
            seed += 2
            name = f"diffusion_model.blocks.{layer}.{official}"
            files["official"] |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            files["official"][f"{name}.alpha"] = torch.tensor(ALPHA)
            for layout, prefix in (("diffusers", "transformer."), ("peft", "base_model.model.")):
                name = f"{prefix}blocks.{layer}.{diffusers}"
                files[layout] |= {f"{name}.lora_A.weight": down.clone(), f"{name}.lora_B.weight": up.clone()}
    return files


def write_adapters(place) -> None:
    """A folder for each layout."""
    modules = sorted(f"blocks.{layer}.{m[1]}" for layer in range(CONFIG["num_layers"]) for m in MODULES)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
    told = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    for layout, tensors in adapters().items():
        (place / layout).mkdir(parents=True, exist_ok=True)
        name = {"diffusers": "pytorch_lora_weights", "peft": "adapter_model"}.get(layout, "adapter")
        metadata = {"format": "pt"} | (told if layout == "diffusers" else {})
        save_file(tensors, place / layout / f"{name}.safetensors", metadata=metadata)
    settings = {"peft_type": "LORA", "base_model_name_or_path": None} | settings
    (place / "peft" / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def with_adapter(place, layout: str) -> WanTransformer3DModel:
    """The network, with an adapter that diffusers or PEFT has loaded."""
    net = network()
    if layout == "peft":
        return PeftModel.from_pretrained(net, place / "peft")
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=net)
    (file,) = (place / layout).glob("*.safetensors")
    pipe.load_lora_weights(str(place / layout), weight_name=file.name)
    return pipe.transformer


@torch.no_grad()
def main():
    place = HERE / "diffusers_student"
    noise, text = normal(len(TIMES), *SHAPE, seed=1), normal(1, 6, 8, seed=2)
    write_adapters(place)
    x, t = normal(*SHAPE, seed=3), torch.tensor([400.0])
    arrays = {"times": np.array(TIMES), "noise": noise, "text": text, "x": x, "t": t}
    arrays["x0"] = sampled(network(), noise, text)
    arrays["v"] = network()(x, t, text, return_dict=False)[0]
    for layout in adapters():
        arrays[f"v_{layout}"] = with_adapter(place, layout)(x, t, text, return_dict=False)[0]
        print(layout, float((arrays[f"v_{layout}"] - arrays["v"]).abs().max()))
    config, weights = CONFIG | {"scheduler": SCHEDULER}, {"diffusers": network().state_dict()}
    keep("diffusers_student", "student", config, weights, arrays)


main()

"""A student for the programs of others: diffusers' pipeline around its network, and a card that says how to sample.

FlowMatchEulerDiscreteScheduler(stochastic_sampling=True) of diffusers makes the steps of our few-step sampler,
(1 − σ')·x0 + σ'·noise of rectified flow, at the σ = sin t/(cos t + sin t) of our times.
"""

import json
from typing import Any

import numpy as np

from rcm_jax.method import trigflow
from rcm_jax.models.wan import WanConfig
from rcm_jax.run.experiment import Experiment

TRANSFORMER = ("diffusers", "WanTransformer3DModel")
AROUND = {
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
}
AROUND_CLIP = {
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}
PIPELINES = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"}  # by WanConfig.model_type
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "stochastic_sampling": True,
    "use_dynamic_shifting": False,
}
CARD = """---
{header}
---

# {title}

Distilled with rcm_jax by {method} ([paper]({home})): a sample takes {counts} steps, where the teacher takes
{teacher_steps}.

| steps | sigmas | timesteps |
|---|---|---|
{rows}

- Base: {base}.
- Guidance is built in: sample with `guidance_scale=1.0`, and without a negative prompt.
- After each step but the last fresh noise is added: `(1 - s) * x0 + s * noise` at the next sigma s.
- The noise to start from is multiplied by the first sigma.
- Licence: {licence}.

```python
import functools

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, {pipeline}, WanTransformer3DModel

folder, base = "{folder}", "{source}"
sigmas = {sigmas}
transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16)
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, sigmas=sigmas)
pipe = {pipeline}.from_pretrained(base, transformer=transformer, scheduler=scheduler, torch_dtype=torch.bfloat16)
torch.manual_seed(0)
latents = sigmas[0] * torch.randn(1, {latents})
frames = pipe({call}, num_inference_steps=len(sigmas), guidance_scale=1.0, latents=latents).frames[0]
```
"""
HOME = "https://arxiv.org/abs/2510.08431"


def check(run: Any) -> None:
    """ValueError unless diffusers has a pipeline for the student of that run."""
    if not isinstance(run, Experiment):
        raise ValueError("--pipeline is for students: of a teacher, or converted weights, others have their pipelines")
    if not isinstance(run.model, WanConfig) or run.model.known_frames or run.noise_range != trigflow.WHOLE:
        raise ValueError(
            "--pipeline is for Wan text to video and image to video with one network for all noise; this is another: "
            "export it without, and see docs/use_elsewhere.md"
        )


def sigmas(run: Experiment, steps: int) -> list[float]:
    """[steps] rectified-flow times of the few-step sampler, falling; diffusers and ComfyUI append the 0."""
    times = np.asarray(run.sampling.student_times(steps), np.float64)
    return [round(float(np.sin(t) / (np.cos(t) + np.sin(t))), 7) for t in times]


def components(run: Experiment) -> dict[str, tuple[str, str]]:
    """{folder: (library, class)} of what a pipeline has around transformer and scheduler."""
    return AROUND | (AROUND_CLIP if run.model.clip_dim else {})


def files(run: Experiment, **words) -> dict[str, str]:
    """{path: text} beside transformer/: the pipeline's index, its scheduler and the card; words: of `card`."""
    parts = components(run) | {"scheduler": ("diffusers", SCHEDULER["_class_name"]), "transformer": TRANSFORMER}
    index = {"_class_name": PIPELINES[run.model.model_type]} | {name: list(parts[name]) for name in sorted(parts)}
    texts = {"model_index.json": index, "scheduler/scheduler_config.json": SCHEDULER}
    texts = {name: json.dumps(values, indent=2) + "\n" for name, values in texts.items()}
    return texts | {"README.md": card(run, **words)}


def card(run: Experiment, folder: str = "", base: str = "", licence: str = "", whole: bool = False) -> str:
    """README.md beside the weights, as the hub of Hugging Face reads it.

    base: repository of the base in diffusers' layout, licence: as the hub names licences; "": the card says that nobody
    has told. whole: the folder has all that the base has.
    """
    counts, wan = range(1, len(run.sampling.mid_times) + 1), run.model
    header = ["library_name: diffusers", f"pipeline_tag: {'text' if wan.model_type == 't2v' else 'image'}-to-video"]
    header += [f"base_model: {base}"] if base else []
    header += [f"license: {licence}"] if licence else []
    header += ["tags: [rcm, distillation, few-step]"]
    table = {k: sigmas(run, k) for k in counts}
    rows = [f"| {k} | {_list(values, 4)} | {_list([1000 * v for v in values], 1)} |" for k, values in table.items()]
    t, h, w, c = run.data.shape
    told = {
        "base": base or "not told to who wrote this card",
        "licence": licence or "that of the base, not told either",
    }
    return CARD.format(
        header="\n".join(header), title=folder.rstrip("/").rpartition("/")[2] or "A few-step student",
        method=run.rcm.name, counts=f"1 to {counts[-1]}" if counts[-1] > 1 else "1",
        teacher_steps=run.sampling.teacher_steps, rows="\n".join(rows), home=HOME, **told,
        pipeline=PIPELINES[wan.model_type], folder=folder or ".", source=(folder or ".") if whole else base or "BASE",
        sigmas=table[counts[-1]], latents=f"{c}, {t}, {h}, {w}",
        call='"a cat"' if wan.model_type == "t2v" else 'image, "a cat"',
    )  # fmt: skip


def _list(values, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)

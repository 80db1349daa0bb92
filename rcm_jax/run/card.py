"""The model card of a student: README.md beside its weights, as the hub of Hugging Face reads it.

It tells what `handover` knows: the noise levels of every number of steps, and for diffusers lines of Python that run.
"""

import json

import numpy as np

from rcm_jax.method import trigflow
from rcm_jax.models.cosmos import CosmosConfig
from rcm_jax.run import handover
from rcm_jax.run.experiment import Experiment

HOME = "https://arxiv.org/abs/2510.08431"
CARD = """---
{header}
---

# {title}

Distilled with rcm_jax by {method} ([rCM]({home})): a sample takes {counts}, where the teacher takes {teacher_steps}.

| steps | sigmas | timesteps |
|---|---|---|
{rows}

- Base: {base}.
- Guidance is built in: sample with guidance (cfg) 1.0, without a negative prompt.
- The first x is noise times the first sigma. A step is `x0 = {denoised}`, then
  `x = {step}` with fresh noise, at the next sigma s; the last step ends with x0.
- In ComfyUI that is the sampler `lcm`, with these sigmas and a 0 at their end.
{partner}- Licence: {licence}.
"""
PARTNER = "- This network is for timesteps from {low:g} to {high:g}. Another network has the other steps.\n"
WAN = """
import functools

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, {pipeline}, {transformer}
from diffusers.utils import {utilities}

folder, base = {folder}, {base}
device, dtype = "cuda", torch.bfloat16
sigmas = {sigmas}
transformer = {transformer}.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, sigmas=sigmas)
pipe = {pipeline}.from_pretrained(base, transformer=transformer, scheduler=scheduler, torch_dtype=dtype)
pipe.to(device)
torch.manual_seed(0)
frames = pipe(
    {inputs}prompt="a cat", height={height}, width={width}, num_frames={frames},
    num_inference_steps=len(sigmas), guidance_scale=1.0, latents=sigmas[0] * torch.randn({latents}),
).frames[0]
export_to_video(frames, "sample.mp4", fps={fps})
"""
COSMOS = """
import torch
from diffusers import {pipeline}, {transformer}, FlowMatchEulerDiscreteScheduler

folder, base = {folder}, {base}
device, dtype = "cuda", torch.bfloat16
few = {sigmas}


class FewSteps(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None):
        super().set_timesteps(sigmas=few, device=device)

    def step(self, v, timestep, x, return_dict=True):
        i = self.timesteps.tolist().index(timestep)
        x0 = x - self.sigmas[i] * v
        return (x0 + self.sigmas[i + 1] * torch.randn_like(x0) if i + 1 < len(few) else x0,)


transformer = {transformer}.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
scheduler = FewSteps.from_pretrained(folder, subfolder="scheduler")
pipe = {pipeline}.from_pretrained(base, transformer=transformer, scheduler=scheduler, torch_dtype=dtype)
pipe.to(device)
torch.manual_seed(0)
latents = few[0] / pipe.scheduler.config.sigma_max * torch.randn({latents})  # which the pipeline multiplies by it
image = pipe("a cat", height={height}, width={width}, guidance_scale=1.0, latents=latents).images[0]
image.save("sample.png")
"""


def card(
    run: Experiment, name: str, *, base: str = "", licence: str = "", code: bool = False, whole: bool = False
) -> str:
    """The text, of a student for which `handover.is_student`.

    name: of the folder. base: repository of the base in diffusers' layout, licence: as the hub names licences; "": the
    card says that nobody has told. code: with Python for diffusers, of what has a pipeline. whole: the folder has all
    that the base has.
    """
    counts = range(1, len(run.sampling.mid_times) + 1)
    cosmos, (low, high) = isinstance(run.model, CosmosConfig), run.noise_range
    rows = []
    for steps in counts:
        sigmas = np.array(handover.sigmas(run, steps))
        times = 1000 * (sigmas / (1 + sigmas) if cosmos else sigmas)
        rows.append(f"| {steps} | {_list(sigmas, 4)} | {_list(times, 1)} |")
    text = CARD.format(
        header="\n".join(_header(run, base, licence)), title=name, method=run.rcm.name, home=HOME,
        counts=f"1 to {counts[-1]} steps" if counts[-1] > 1 else "1 step", teacher_steps=run.sampling.teacher_steps,
        rows="\n".join(rows), base=base or "not told to who wrote this card",
        denoised="x / (1 + s) - s / (1 + s) * v(x / (1 + s))" if cosmos else "x - s * v",
        step="x0 + s * noise" if cosmos else "(1 - s) * x0 + s * noise",
        partner="" if run.noise_range == trigflow.WHOLE else PARTNER.format(low=1000 * low, high=1000 * high),
        licence=licence or "that of the base, not told either",
    )  # fmt: skip
    return text + (f"\n```python{_code(run, name, name if whole else base or 'BASE')}```\n" if code else "")


def _header(run, base: str, licence: str) -> list[str]:
    """Lines of YAML; JSON's strings are YAML's, too."""
    lines = ["library_name: diffusers", f"pipeline_tag: {handover.task(run)}"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += [f"license: {json.dumps(licence)}"] if licence else []
    return [*lines, "tags: [rcm, distillation, few-step]"]


def _code(run, folder: str, base: str) -> str:
    """Python for the most steps there are."""
    pipeline, sampling, media = handover.PIPELINES[handover.task(run)], run.sampling, run.media
    t, h, w, c = run.data.shape
    frames, rows, columns = media.vae.stride if media else (4, 8, 8)
    from_image = handover.task(run) == "image-to-video"
    return (COSMOS if isinstance(run.model, CosmosConfig) else WAN).format(
        pipeline=pipeline.name, transformer=pipeline.transformer, folder=json.dumps(folder), base=json.dumps(base),
        sigmas=handover.sigmas(run, len(sampling.mid_times)), latents=f"1, {c}, {t}, {h}, {w}",
        frames=1 + frames * (t - 1), height=h * rows, width=w * columns, fps=media.fps if media else 16,
        utilities="export_to_video" + (", load_image" if from_image else ""),
        inputs='image=load_image("first.png"), ' if from_image else "",
    )  # fmt: skip


def _list(values, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)

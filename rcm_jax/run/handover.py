"""A student for the programs of others: at which noise levels they sample it, and what diffusers has around it.

FlowMatchEulerDiscreteScheduler(stochastic_sampling=True) of diffusers makes the steps of our few-step sampler for a
network of rectified flow, (1 − σ')·x0 + σ'·noise at the σ = sin t/(cos t + sin t) of our times. Around Cosmos' networks
diffusers and ComfyUI count noise over data, σ = tan t, where a step is x0 + σ'·noise. `card` tells people.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rcm_jax.method import trigflow
from rcm_jax.models import network_of
from rcm_jax.models.cosmos import CosmosConfig
from rcm_jax.models.wan import WanConfig
from rcm_jax.run.experiment import Experiment


class Pipeline(NamedTuple):
    """What diffusers makes samples with."""

    name: str
    transformer: str
    around: Mapping[str, tuple[str, str]]  # {folder: (library, class)} beside transformer and scheduler


AROUND = {
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
}
CLIP = {
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}
PIPELINES = {  # by what `task` says
    "text-to-video": Pipeline("WanPipeline", "WanTransformer3DModel", AROUND),
    "image-to-video": Pipeline("WanImageToVideoPipeline", "WanTransformer3DModel", AROUND),
    "text-to-image": Pipeline(
        "Cosmos2TextToImagePipeline",
        "CosmosTransformer3DModel",
        AROUND | {"text_encoder": ("transformers", "T5EncoderModel")},
    ),
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "stochastic_sampling": True,
    "use_dynamic_shifting": False,
}


def is_student(run: Any) -> bool:
    """Whether a run made a few-step sampler that others have, of a network that predicts what they take it to."""
    if not isinstance(run, Experiment) or not isinstance(run.model, WanConfig | CosmosConfig):
        return False
    record = network_of(run.model)
    return (run.parametrization, run.time_scale) == (record.parametrization, record.time_scale)


def check(run: Any) -> None:
    """ValueError unless diffusers has a pipeline for the student of that run."""
    if not is_student(run):
        raise ValueError("--pipeline is for students of Wan and Cosmos: a teacher or converted weights have theirs")
    if run.model.known_frames or run.noise_range != trigflow.WHOLE:
        raise ValueError(
            "--pipeline is for text to image, text to video and Wan2.1's image to video, with one network for all "
            "noise; this is another: export it without, and see docs/use_elsewhere.md"
        )


def task(run: Experiment) -> str:
    """What the student makes of what, as the hub of Hugging Face names it."""
    if run.model.known_frames or getattr(run.model, "model_type", None) == "i2v":
        return "image-to-video"
    return "text-to-image" if isinstance(run.model, CosmosConfig) else "text-to-video"


def sigmas(run: Experiment, steps: int) -> list[float]:
    """[steps] noise levels of the few-step sampler, falling; diffusers and ComfyUI want a 0 after them, which diffusers
    appends itself. Wan: rectified-flow times. Cosmos: noise over data."""
    times = np.array([np.arctan(run.sampling.sigma_max), *run.sampling.mid_times[steps - 1]])
    data = np.cos(times) + (0 if isinstance(run.model, CosmosConfig) else np.sin(times))
    return [float(f"{sigma:.7g}") for sigma in np.sin(times) / data]


def metadata(run: Experiment) -> dict[str, str]:
    """What the header of a student's file says: {steps: sigmas} as JSON."""
    steps = range(1, len(run.sampling.mid_times) + 1)
    return {"few_step_sigmas": json.dumps({k: sigmas(run, k) for k in steps})}


def components(run: Experiment) -> dict[str, tuple[str, str]]:
    """{folder: (library, class)} of what a pipeline has around transformer and scheduler."""
    return {**PIPELINES[task(run)].around} | (CLIP if getattr(run.model, "clip_dim", 0) else {})


def files(run: Experiment, whole: bool) -> dict[str, str]:
    """{path: text} beside transformer/: the pipeline's index and its scheduler. whole: `components` are there, too;
    else the index leaves them out, and from_pretrained wants to be given them."""
    pipeline = PIPELINES[task(run)]
    parts = (components(run) if whole else {}) | {
        "scheduler": ("diffusers", SCHEDULER["_class_name"]),
        "transformer": ("diffusers", pipeline.transformer),
    }
    index = {"_class_name": pipeline.name} | {name: list(parts[name]) for name in sorted(parts)}
    texts = {"model_index.json": index, "scheduler/scheduler_config.json": SCHEDULER}
    return {name: json.dumps(values, indent=2) + "\n" for name, values in texts.items()}

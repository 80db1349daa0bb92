"""Runs what model cards say: diffusers' pipelines around exported students must make our samples.

    python tests/golden/check_handover.py write FOLDER     # where rcm_jax is installed
    python tests/golden/check_handover.py check FOLDER     # where torch, diffusers and transformers are

`write` makes tiny students with random weights in float32, in folders as scripts/export_checkpoint.py --pipeline makes
them, noise, and the samples that our few-step sampler makes of it. `check` makes tiny encoders and autoencoders for
them, runs the Python of each card, and of docs/use_elsewhere.md for a pair, and prints how far apart the latents are.
"""

import functools
import importlib
import json
import pathlib
import sys
import types

import numpy as np

PAIR = "wan2_2_t2v_a14b"
STUDENTS = ("wan_1_3b", "wan_i2v_14b", "cosmos_2b", PAIR)
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "use_elsewhere.md"


def write(folder: pathlib.Path, name: str) -> None:
    """FOLDER/NAME, and FOLDER/NAME.npz: sigmas, noise [4, 1, t, h, w, c], conditions and x0 [1, t, h, w, c]."""
    from rcm_jax.method import samplers
    from rcm_jax.run import card, handover
    from rcm_jax.run.program import make_network, zeros
    from rcm_jax.util.config import revise
    from tests import tiny

    config = importlib.import_module(f"configs.{name}")
    run = importlib.import_module("configs." + ("cosmos_2b" if name == "cosmos_2b" else "wan_1_3b")).tiny(config.EXPERIMENT)
    run = revise(run, {"model.dtype": "float32"})
    if getattr(run.model, "model_type", "") == "i2v":  # diffusers takes the last tokens but 512 for those of the image
        run = revise(run, {"model.text_len": 512, "media.text_length": 512})
    zero, rng = zeros(run, run.data.shape).first, np.random.default_rng(0)
    cond = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in zero["cond"].items()}
    times = run.sampling.student_times(4)
    noise = rng.normal(size=(len(times), 1, *run.data.shape)).astype(np.float32)
    rest = noise.copy()
    rest[0] *= np.sin(times[0])  # we begin with noise, others with sin t·noise
    for i, part in enumerate([run, config.low(run)] if name == PAIR else [run]):
        network = make_network(part, zero)
        params = tiny.random_params(lambda _, key, make=network.init: make(key), part.model, i)
        write_transformer(folder / name / ["transformer", "transformer_2"][i], part, params)
        count = len(samplers.within(times, part.noise_range))
        x0 = np.asarray(samplers.few_step(network.F, params, rest[:count], times[:count], cond))
        times, rest = times[count:], rest[count:]
        if len(times):
            rest[0] = np.cos(times[0]) * x0 + np.sin(times[0]) * rest[0]
    texts = {"README.md": card.card(run, name, base=f"{name}_base", code=name != PAIR)}
    for path, text in (texts | ({} if name == PAIR else handover.files(run, whole=False))).items():
        (folder / name / path).parent.mkdir(exist_ok=True)
        (folder / name / path).write_text(text)
    np.savez(folder / f"{name}.npz", sigmas=handover.sigmas(run, 4), noise=noise, x0=x0, **cond)


def write_transformer(place, run, params) -> None:
    from rcm_jax import convert
    from rcm_jax.convert.files import write_tensors

    kind = convert.name_of(run.model)
    described = json.dumps(convert.MODELS[kind].described(run.model, "diffusers"))
    tensors = convert.to_reference(kind, params, run.model, "diffusers")
    write_tensors(place, tensors, extra_files={"config.json": described})


def write_base(place: pathlib.Path, name: str) -> None:
    """What is around a transformer in a published pipeline, with hardly any width, and that index."""
    import diffusers
    import transformers

    sizes = dict(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -1.0)]
    parts = {
        "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)),
        "tokenizer": transformers.T5TokenizerFast(vocab=words, extra_ids=0),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ),
        "scheduler": diffusers.UniPCMultistepScheduler(),  # of a base: the card must put another in its place
    }
    pipeline = {"cosmos_2b": "Cosmos2TextToImagePipeline"}.get(name, "WanPipeline")
    if name == "cosmos_2b":
        parts["text_encoder"] = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    if name == "wan_i2v_14b":
        pipeline = "WanImageToVideoPipeline"
        clip = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        clip = transformers.CLIPVisionConfig(**clip, image_size=32, patch_size=8)
        parts["image_encoder"] = transformers.CLIPVisionModel(clip)
        parts["image_processor"] = transformers.CLIPImageProcessor(size=32, crop_size=32)
    for part, module in parts.items():
        module.save_pretrained(place / part)
    index = {part: [type(module).__module__.partition(".")[0], type(module).__name__] for part, module in parts.items()}
    index["transformer"] = ["diffusers", "CosmosTransformer3DModel" if name == "cosmos_2b" else "WanTransformer3DModel"]
    index |= {"_class_name": pipeline} | ({"transformer_2": index["transformer"]} if name == PAIR else {})
    (place / "model_index.json").write_text(json.dumps(index))


def code(folder: pathlib.Path, name: str) -> str:
    """Python of the card, or of the page, for these folders, a CPU and float32, and without the file at its end."""
    page = (PAGE if name == PAIR else folder / name / "README.md").read_text()
    (text,) = (block.split("```")[0] for block in page.split("```python\n")[1:])
    words = {'"cuda"': '"cpu"', "bfloat16": "float32", f'"{name}_base"': f'"{folder}/{name}_base"'}
    words |= {f'"{name}"': f'"{folder}/{name}"', '"BASE"': f'"{folder}/{name}_base"', '"first.png"': "FIRST"}
    words |= {'"HIGH"': f'"{folder}/{name}/transformer"', '"LOW"': f'"{folder}/{name}/transformer_2"'}
    words |= {"480": "32", "832": "48", "num_frames=81": "num_frames=5", "1, 16, 21, 60, 104": "1, 4, 2, 4, 6"}
    for old, new in words.items():
        text = text.replace(old, new)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("export_to_video", "image.save")))


def run(folder: pathlib.Path, name: str, given: dict | None) -> np.ndarray:
    """What the code ends with: latents [c, t, h, w] from the noise and conditions that are given, else pixels."""
    import diffusers
    import torch
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.pipelines.cosmos import pipeline_cosmos2_text2image as cosmos
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as scheduling
    from PIL import Image

    index = json.loads((folder / f"{name}_base" / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"])
    kept = pipeline.__call__, torch.randn, torch.randn_like, scheduling.randn_tensor
    safe = dict(to=lambda *_: None, check_text_safety=lambda *_: True, check_video_safety=lambda _, video: video)
    cosmos.CosmosSafetyChecker = type("CosmosSafetyChecker", (), safe)
    # Of a mask that is all zeros; what resizes it is torchvision's.
    cut = types.SimpleNamespace(resize=lambda mask, size, interpolation: mask[..., : size[0], : size[1]])
    transformer_cosmos.transforms = types.SimpleNamespace(
        functional=cut, InterpolationMode=types.SimpleNamespace(NEAREST=0)
    )
    diffusers.utils.load_image = lambda _: Image.new("RGB", (48, 32))
    scope = {"FIRST": None}
    if given:
        torch_of = {key: torch.from_numpy(value) for key, value in given.items()}
        channels_first = {key: torch_of[key].moveaxis(-1, -4) for key in ("noise", "y") if key in given}
        pending = iter([*channels_first["noise"], torch.zeros(1)])
        torch.randn, torch.randn_like, scheduling.randn_tensor = (
            functools.partial(instead, draw, pending, channels_first["noise"].shape[1:]) for draw in kept[1:]
        )
        pipeline.encode_prompt = lambda *_, **__: (torch_of["text"], None)
        if "y" in given:
            pipeline.encode_image = lambda *_, **__: torch_of["clip_features"]
            pipeline.prepare_latents = lambda *args: (args[-2], channels_first["y"])
        pipeline.__call__ = lambda *args, **options: kept[0](*args, **options, output_type="latent")
    try:
        exec(code(folder, name), scope)
    finally:
        pipeline.__call__, torch.randn, torch.randn_like, scheduling.randn_tensor = kept
    return np.asarray(scope["image"] if name == "cosmos_2b" else scope["frames"])


def instead(draw, pending, shape, *args, **options):
    """The next of pending, where draw is asked for noise of that shape."""
    first = args[0]
    asked = getattr(first, "shape", first if isinstance(first, tuple) else args)
    return next(pending) if tuple(asked) == tuple(shape) else draw(*args, **options)


def check(folder: pathlib.Path, name: str) -> None:
    """Prints how far the latents of a student are from ours, and the shape of pixels from a prompt."""
    write_base(folder / f"{name}_base", name)
    pixels = run(folder, name, None)
    with np.load(folder / f"{name}.npz") as values:
        given = dict(values)
    x0, ours = run(folder, name, given), np.moveaxis(given["x0"][0], -1, 0)
    far = np.abs(x0.reshape(ours.shape) - ours).max()
    print(f"{name}: latents {ours.shape} in ±{np.abs(ours).max():.1f}, apart by {far:.1e} at most; pixels {pixels.shape}")


if __name__ == "__main__":
    for student in STUDENTS:
        {"write": write, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]).resolve(), student)

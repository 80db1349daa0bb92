"""Sample: videos and images from prompts, or a picture of classes.

python scripts/sample.py --checkpoint=DIR --prompt="a cat" --out=cat.mp4 \\
    --text_encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl --vae=Wan2.1_VAE.pth
python scripts/sample.py --checkpoint=wan-1.3b --mode=teacher --config=configs/wan_1_3b.py --prompts=FILE …
python scripts/sample.py --checkpoint=runs/digits --out=grid.png

DIR is a workdir of scripts/train.py (of a distillation: the averaged student samples in few steps; of a teacher: the
guided PF-ODE), or of convert_checkpoint.py, with --mode and --config. With several prompts or seeds each sample has a
file of its own, and --sheet shows them all. The suffix of --out decides: .mp4, .png for one frame, .safetensors for
latents, which need no autoencoder.
"""

import common  # noqa: I001  (puts the checkout on the path)
import collections
import contextlib
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags
from safetensors.numpy import save
from tqdm import tqdm

from rcm_jax.train import checkpoint, trainer
from rcm_jax import convert
from rcm_jax.run import experiment, generate
from rcm_jax.media import text, video
from rcm_jax.data import DATASETS
from rcm_jax.evaluate.distillation import draw
from rcm_jax.media.picture import grid, save_png
from rcm_jax.util.files import check_writable, write_whole
from rcm_jax.parallel.sharding import MeshConfig, make_mesh

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir of scripts/train.py or convert_checkpoint.py.")
STEP = flags.DEFINE_integer("checkpoint_step", None, "Training step of the checkpoint; the newest if not given.")
OUT = flags.DEFINE_string("out", None, "The file to write: .png, .mp4 or .safetensors.")
STEPS = flags.DEFINE_integer(
    "steps", None, "Sampling steps; by default 4 of a student, 50 of a teacher.", lower_bound=1
)
SEEDS = flags.DEFINE_list("seeds", ["0"], "The same seed gives the same noise, for every prompt, student and teacher.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Of a teacher (a student has it built in); its config's if not given.")
# For classes.
EACH = flags.DEFINE_integer("each", 8, "Samples of every class.", lower_bound=1)
CLASSES = flags.DEFINE_list("classes", [], "Class labels, e.g. 3,5,8; all if empty.")
# For prompts.
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; may be given several times.")
PROMPTS = flags.DEFINE_string("prompts", None, "A file of prompts, one on each line.")
NEGATIVE = flags.DEFINE_string("negative_prompt", None, "What a teacher's guidance leads away from.")
MODE = flags.DEFINE_enum("mode", None, ["student", "teacher"], "What converted weights are; a trained workdir knows.")
CONFIG = config_flags.DEFINE_config_file("config", None, "What says how to sample; by default that of the workdir.")
TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "Published weights of umT5 (Wan) or T5 (Cosmos), any layout.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "The folder of its tokenizer.json.")
VAE = flags.DEFINE_string("vae", None, "Published weights of the Wan2.1 autoencoder, any layout.")
SIZE = flags.DEFINE_string("size", None, "Pixels, e.g. 832x480; the config's if not given.")
FRAMES = flags.DEFINE_integer("frames", None, "Frames of pixels, 4n + 1; the config's if not given.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 1, "Samples at once.", lower_bound=1)
TILE = flags.DEFINE_integer("tile", None, "Decode in tiles of so many latents a side: less memory.", lower_bound=2)
SHEET = flags.DEFINE_string("sheet", None, "A .png that shows all samples, a row for each prompt.")
flags.mark_flags_as_required(["checkpoint", "out"])

FOR_CLASSES = (EACH, CLASSES)
FOR_PROMPTS = (PROMPT, PROMPTS, NEGATIVE, MODE, CONFIG, TEXT_ENCODER, TOKENIZER, VAE, SIZE, FRAMES, BATCH, TILE, SHEET)
TEACHER_STEPS = 50


def main():
    values = checkpoint.read_config(CHECKPOINT.value)
    of_classes = values.get("data", {}).get("kind") == "digits"
    wrong = [f"--{flag.name}" for flag in (FOR_PROMPTS if of_classes else FOR_CLASSES) if flag.present]
    if wrong:
        raise ValueError(
            f"{CHECKPOINT.value} samples from {'classes' if of_classes else 'prompts'}: no {', '.join(wrong)}"
        )
    if bad := [seed for seed in SEEDS.value if not seed.isdecimal() or int(seed) >= 2**32]:
        raise ValueError(f"--seeds has {', '.join(bad)}: a seed is a number from 0 to {2**32 - 1}")
    if not SEEDS.value or len(set(map(int, SEEDS.value))) < len(SEEDS.value):
        raise ValueError(f"--seeds={','.join(SEEDS.value)} must be one number or more, none of them twice")
    (sample_classes if of_classes else sample_prompts)(values)


def sample_classes(values):
    """One picture, a row for every class."""
    if not OUT.value.endswith(".png"):
        raise ValueError(f"--out={OUT.value} must end in .png")
    run = experiment.from_mapping(values)
    dataset = DATASETS[type(run.data)](run.data)
    labels = parse_classes(CLASSES.value, dataset.num_classes)
    network = experiment.make_network(run, dataset)
    if isinstance(run, experiment.Experiment):
        refuse_guidance(run.rcm.guidance)
        steps = STEPS.value or len(run.sampling.mid_times)
        sampler = experiment.student_sampler(network.F, run.sampling, steps)
    else:
        guidance = 1.0 if GUIDANCE.value is None else GUIDANCE.value
        steps = STEPS.value or TEACHER_STEPS
        sampler = experiment.teacher_sampler(network.F, dataset.uncond, guidance, run.sampling, steps)
    mesh = make_mesh(MeshConfig())
    abstract = trainer.abstract_params(jax.eval_shape(network.init, jax.random.key(0)), mesh)
    params = checkpoint.restore_item(CHECKPOINT.value, "ema", abstract, STEP.value)
    started = time.time()
    labels = jnp.repeat(jnp.array(labels), EACH.value)
    drawn = [draw(sampler, params, jax.random.key(int(seed)), labels, dataset.sample_shape) for seed in SEEDS.value]
    rows = np.stack(drawn, axis=1).reshape(-1, EACH.value * len(drawn), *drawn[0].shape[1:])
    images = dataset.to_image(rows.reshape(-1, *drawn[0].shape[1:]))
    save_png(OUT.value, grid(images, rows.shape[1], upscale=8))
    print(f"{OUT.value}: {len(images)} samples, {steps} steps, {time.time() - started:.1f} s with compilation")


def sample_prompts(values):
    """A file for every prompt and seed; whatever can be wrong is found before anything is computed."""
    clock = {}
    with timed(clock, "checks"):
        of_teacher, run = what_samples(values)
        guidance = (run.guidance if GUIDANCE.value is None else GUIDANCE.value) if of_teacher else None
        steps = STEPS.value or (TEACHER_STEPS if of_teacher else len(run.sampling.mid_times))
        network = generate.make_network(run)
        generate.make_sampler(run, network.F, steps, guidance, None)  # are there so many steps?
        checkpoint.params_of(CHECKPOINT.value, "ema", STEP.value)
        prompts, seeds = read_prompts(), [int(seed) for seed in SEEDS.value]
        paths = paths_of(pathlib.Path(OUT.value), run, len(prompts), seeds)
        encoder = generate.open_weights(run.media.text_encoder.model_type, run.media.text_encoder, path(TEXT_ENCODER))
        decoder = None
        if SHEET.value or not OUT.value.endswith(".safetensors"):
            decoder = generate.open_weights("wan_vae", run.media.vae, path(VAE))
        sentences = [*prompts, negative_prompt(run.media, guidance)]
        sentences = [text.clean(sentence) for sentence in sentences] if run.media.clean_prompts else sentences
        vocabulary = run.media.text_encoder.vocab_size
        tokens = text.tokenize(path(TOKENIZER), sentences, run.media.text_length, vocabulary)
    with timed(clock, "text"):
        texts = generate.embed(run.media, encoder, *tokens)
        if run.media.zero_negative and not sentences[-1]:
            texts[-1] = 0
    with timed(clock, "sampling"):
        mesh = generate.make_sampling_mesh(run, min(BATCH.value, len(prompts) * len(seeds)))
        params = generate.restore(run, network, CHECKPOINT.value, STEP.value, mesh)
        calls = -(-len(prompts) * len(seeds) // BATCH.value) * steps
        with tqdm(total=calls, desc="sampling", unit="step", dynamic_ncols=True) as bar, jax.set_mesh(mesh):
            F = generate.counted(network.F, bar.update)
            sampler = generate.make_sampler(run, F, steps, guidance, {"text": texts[-1]})
            latents = generate.draw(sampler, params, texts[: len(prompts)], seeds, run.shape, BATCH.value)
            jax.effects_barrier()  # the bar's last step
        del params
    with timed(clock, "writing"):
        write_all(run, decoder, latents, paths)
    print(f"{paths[0][0]}" + f" … {paths[-1][-1]}" * (len(prompts) * len(seeds) > 1) + f": {steps} steps")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.items()) + ", with compilation")


def what_samples(values) -> tuple[bool, generate.Generation]:
    """(whether it is a teacher, how it samples), from the workdir, --config, --mode and the size that is asked for."""
    mode = "student" if "rcm" in values else "teacher" if "pretrain" in values else MODE.value
    if mode is None:
        raise ValueError(
            f"{CHECKPOINT.value} holds converted weights: say --mode=teacher or, if distilled, --mode=student"
        )
    if MODE.value not in (None, mode):
        raise ValueError(f"--mode={MODE.value}, but {CHECKPOINT.value} holds a {mode}")
    if mode == "student":
        refuse_guidance(values["rcm"]["guidance"] if "rcm" in values else "of its own")
    given = values if CONFIG.value is None else CONFIG.value.to_dict()
    experiment.check_same(CHECKPOINT.value, values, given, ("model", "parametrization", "time_scale"))
    size = None
    if SIZE.value is not None:
        if not (found := re.fullmatch(r"(\d+)[x×](\d+)", SIZE.value)):
            raise ValueError(f"--size={SIZE.value} must be WIDTHxHEIGHT in pixels, e.g. 832x480")
        size = int(found[1]), int(found[2])
    return mode == "teacher", generate.generation(given, size, FRAMES.value)


def refuse_guidance(built_in) -> None:
    """ValueError for flags that a student has no use for."""
    if given := [f"--{flag.name}" for flag in (GUIDANCE, NEGATIVE) if flag.present]:
        raise ValueError(f"{', '.join(given)} is for teachers: this student was distilled with guidance {built_in}")


def negative_prompt(media, guidance) -> str:
    """That of --negative_prompt; ValueError if it is missing where it matters, or is there for nothing."""
    if guidance in (None, 1.0):
        if NEGATIVE.present:
            raise ValueError("--negative_prompt is for guidance, and with --guidance=1 there is none")
        return ""
    if NEGATIVE.value is None and not media.zero_negative:
        raise ValueError(
            "guidance needs --negative_prompt: Wan-AI's own is sample_neg_prompt in wan/configs/shared_config.py of "
            "Wan-Video/Wan2.1; --negative_prompt= is an empty one, which makes weaker samples"
        )
    return NEGATIVE.value or ""


def read_prompts() -> list[str]:
    """The prompts of --prompt and --prompts."""
    prompts = list(PROMPT.value)
    if PROMPTS.value is not None:
        lines = pathlib.Path(PROMPTS.value).read_text(encoding="utf-8-sig").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
        if not any(line.strip() for line in lines):
            raise ValueError(f"{PROMPTS.value} holds no prompt: it must have one on a line")
    if not prompts:
        raise ValueError("there is no prompt: give --prompt or --prompts=FILE")
    return prompts


def paths_of(out: pathlib.Path, run, prompts: int, seeds: list[int]) -> list[list[pathlib.Path]]:
    """The file of every prompt and seed; ValueError for names whose suffix does not fit what is written."""
    if out.suffix not in (".mp4", ".png", ".safetensors"):
        raise ValueError(f"--out={out} must end in .mp4, .png (one frame) or .safetensors (latents)")
    if out.suffix == ".png" and run.frames > 1:
        raise ValueError(f"--out={out} is for one frame, these are {run.frames}: take .mp4, or --frames=1")
    if SHEET.value is not None and not SHEET.value.endswith(".png"):
        raise ValueError(f"--sheet={SHEET.value} must end in .png")
    if out.suffix == ".mp4":
        video.check_video()
    for file in filter(None, (out, SHEET.value)):
        check_writable(file)
    if prompts == len(seeds) == 1:
        return [[out]]
    return [[out.with_stem(f"{out.stem}-{row:03d}-seed{seed}") for seed in seeds] for row in range(prompts)]


def path(flag) -> pathlib.Path:
    """The value of a flag that is needed; ValueError if it is missing or names nothing."""
    if flag.value is None:
        raise ValueError(f"--{flag.name} is needed: {flags.FLAGS[flag.name].help}")
    if not pathlib.Path(flag.value).exists():
        raise FileNotFoundError(f"--{flag.name}={flag.value}: no such file or folder")
    return pathlib.Path(flag.value)


def write_all(run, decoder, latents, paths) -> None:
    """Every sample x0 of latents [prompts, seeds, t, h, w, c] in its file, and the sheet."""
    shown, places = [], (0, 0.5, 1) if run.frames > 1 else (0,)
    params = decoder and jax.device_put(convert.from_reference("wan_vae", decoder, run.media.vae))
    with tqdm(total=latents.shape[0] * latents.shape[1], desc="writing", unit="file", dynamic_ncols=True) as bar:
        for row, samples in zip(paths, latents, strict=True):
            for out, x0 in zip(row, samples, strict=True):
                frames = video.keep(generate.frames(run.media, params, x0, TILE.value), run.frames, places, shown)
                if out.suffix != ".safetensors":
                    generate.write(out, frames, run.media.fps)
                else:
                    write_whole(out, lambda temporary, x0=x0: temporary.write_bytes(save({"x0": x0})))
                    collections.deque(frames if SHEET.value else (), maxlen=0)
                bar.update()
    if SHEET.value:
        columns = latents.shape[1] * len(places)
        save_png(SHEET.value, grid(np.array(shown, np.float32) / 255, columns))


@contextlib.contextmanager
def timed(clock: dict, name: str):
    """Adds the seconds inside to a clock."""
    started = time.perf_counter()
    yield
    clock[name] = time.perf_counter() - started


def parse_classes(classes, num_classes) -> list[int]:
    """The labels asked for, or all; ValueError for one that the data set lacks."""
    if not classes:
        return list(range(num_classes))
    if bad := [c for c in classes if not c.isdigit() or int(c) >= num_classes]:
        raise ValueError(f"--classes has {', '.join(bad)}: the classes are 0 to {num_classes - 1}")
    return [int(c) for c in classes]


if __name__ == "__main__":
    common.run(main)

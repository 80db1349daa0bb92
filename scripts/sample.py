"""Sample: videos and images from prompts, or a picture of classes.

python scripts/sample.py --checkpoint=DIR --prompt="a cat" --out=cat.mp4 \\
    --text_encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl --vae=Wan2.1_VAE.pth
python scripts/sample.py --checkpoint=wan-1.3b --mode=teacher --config=wan_1_3b.py --prompts=FILE …
python scripts/sample.py --checkpoint=DIR --image=first.png --prompt="it moves" --out=video.mp4 …
python scripts/sample.py --checkpoint=DIR --suite=VBench_full_info.json --out=FOLDER …
python scripts/sample.py --checkpoint=runs/digits --out=grid.png

DIR is a workdir of scripts/train.py (of a distillation: the averaged student samples in few steps; of a teacher: the
guided PF-ODE), or of convert_checkpoint.py, with --mode and --config. With several prompts or seeds each sample has a
file of its own, and --sheet shows them all: as one .png, or as an .html in which they play side by side. The suffix of
--out decides: .mp4, .png for one frame or a picture of classes, .safetensors for latents, which need no autoencoder.
With --suite it is a folder, of samples of all prompts under the names that benchmarks read; started again it goes on.
In Python: rcm_jax.load(DIR, …)(prompts, seeds).
"""

import common  # noqa: I001  (puts the checkout on the path)
import contextlib
import time

import numpy as np
from absl import flags
from tqdm import tqdm

import rcm_jax
from rcm_jax.evaluate.page import write_page
from rcm_jax.evaluate.report import in_steps
from rcm_jax.media import video
from rcm_jax.run import generate, suite
from rcm_jax.run.samples import check_decoder, files_of
from rcm_jax.util.files import as_path, check_writable

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir of scripts/train.py or convert_checkpoint.py.")
ADAPTER = flags.DEFINE_string("adapter", None, "A .safetensors file of an adapter (LoRA), beside the weights.")
LOW = flags.DEFINE_string("low", None, "Of a pair of networks (Wan2.2) that for little noise; --checkpoint: for much.")
LOW_ADAPTER = flags.DEFINE_string("low_adapter", None, "Of the network --low.")
STEP = flags.DEFINE_integer("checkpoint_step", None, "Training step of the checkpoint; the newest if not given.")
OUT = flags.DEFINE_string("out", None, "The file to write: .png, .mp4 or .safetensors; of a suite a folder.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; its config's if not given.", lower_bound=1)
SEEDS = flags.DEFINE_list("seeds", ["0"], "The same seed gives the same noise, for every prompt, student and teacher.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Of a teacher, or a student that takes it; its config's if not given.")
LOW_GUIDANCE = flags.DEFINE_float("low_guidance", None, "Of the teacher --low; that of --guidance if not given.")
MODE = flags.DEFINE_enum("mode", None, ["student", "teacher"], "What converted weights are; a trained workdir knows.")
CONFIG = common.config_flag("What says how to sample; by default that of the workdir.")
# For classes.
EACH = flags.DEFINE_integer("each", 8, "Samples of every class.", lower_bound=1, upper_bound=10**6)
CLASSES = flags.DEFINE_list("classes", [], "Class labels, e.g. 3,5,8; all if empty.")
# For prompts.
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; may be given several times.")
PROMPTS = flags.DEFINE_string("prompts", None, "A file of prompts, one on each line.")
IMAGE = flags.DEFINE_multi_string(
    "image", [], "What to begin with: an image, or a video to go on with. For all prompts or each."
)
SUITE = flags.DEFINE_string("suite", None, "A suite of prompts: of VBench, GenEval or the official rCM, or a text.")
NEGATIVE = flags.DEFINE_string("negative_prompt", None, "What a teacher's guidance leads away from.")
TEXT_ENCODER, TOKENIZER, VAE = common.media_flags()
CLIP = flags.DEFINE_string("clip", None, "Published weights of CLIP's image encoder, for image to video of Wan2.1.")
SIZE = flags.DEFINE_string("size", None, "Pixels, e.g. 832x480; the config's if not given.")
FRAMES = flags.DEFINE_integer("frames", None, "Frames of pixels, 4n + 1; the config's if not given.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 1, "Samples at once.", lower_bound=1)
TILE = flags.DEFINE_integer("tile", None, "Decode in tiles of so many latents a side: less memory.", lower_bound=2)
SHEET = flags.DEFINE_string("sheet", None, "A .png or .html of all samples, a row for each prompt.")
OVERWRITE = common.overwrite_flag()
flags.mark_flags_as_required(["checkpoint", "out"])

BAR: dict = dict(dynamic_ncols=True)
FOR_CLASSES = (EACH, CLASSES)
FOR_LATENTS = (VAE, BATCH, TILE)
FOR_PROMPTS = (PROMPT, PROMPTS, IMAGE, SUITE, NEGATIVE, TEXT_ENCODER, TOKENIZER, CLIP, SIZE, FRAMES, SHEET)


def main():
    """Checks everything, samples, and writes the files."""
    clock = {}
    with timed(clock, "checks"):
        generator = open_generator()
        if SUITE.value is not None:
            sample_suite(generator)
            return
        seeds, out = read_seeds(), as_path(OUT.value)
        check_names(generator, out)
        if generator.of_classes:
            asked = read_classes(generator.dataset.num_classes)
        else:
            asked = [*PROMPT.value, *(common.read_lines(PROMPTS.value) if PROMPTS.value else [])]
        wanted = request(generator, asked, seeds)
        if generator.media is not None and (SHEET.value or out.suffix != ".safetensors"):
            check_decoder(generator)
        for file in filter(None, (*files_of(wanted, out), SHEET.value)):
            check_writable(file, OVERWRITE.value)
    with timed(clock, "text"):
        given = generate.conditions(wanted)
    with timed(clock, "sampling"), tqdm(total=wanted.calls, desc="sampling", unit="step", **BAR) as progress:
        samples = generate.sample(wanted, given, progress.update)
    with timed(clock, "writing"), tqdm(desc="writing", unit="file", **BAR) as progress:
        as_page = SHEET.value is not None and SHEET.value.endswith(".html")
        paths = samples.save(OUT.value, None if as_page else SHEET.value, tile=TILE.value, tick=progress.update)
        if as_page:
            write_sheet(SHEET.value, wanted, paths)
    several = f" … {paths[-1]}" if len(paths) > 1 else ""
    print(f"{paths[0]}{several}: {len(asked) * len(seeds)} samples, {wanted.steps} steps")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.items()) + ", with compilation")


def sample_suite(generator) -> None:
    """What is not there yet of a suite, in the folder --out."""
    if wrong := [f"--{flag.name}" for flag in (PROMPT, PROMPTS, IMAGE, SHEET) if flag.present]:
        raise ValueError(f"--suite has its own prompts and files: no {', '.join(wrong)}")
    found = suite.read(SUITE.value)
    seeds = read_seeds() if SEEDS.present else list(range(found.layout.each))
    plan = suite.make_plan(found, request(generator, found.prompts, seeds), OUT.value)
    done = plan.total - len(plan.pending)
    with tqdm(desc="samples", unit="file", initial=done, total=plan.total, **BAR) as progress:
        suite.sample(plan, tile=TILE.value, tick=progress.update)
    print(f"{plan.folder / suite.SAMPLES}: {plan.total} samples for {len(found.entries)} prompts, {done} there before")


def open_generator():
    """What is sampled from, as the flags say."""
    generator = rcm_jax.load(
        CHECKPOINT.value, step=STEP.value, mode=MODE.value, low=LOW.value, adapter=ADAPTER.value,
        low_adapter=LOW_ADAPTER.value,
        config=None if CONFIG.value is None else common.experiment(CONFIG),
        size=common.as_size("--size", SIZE.value), frames=FRAMES.value, image=IMAGE.value[0] if IMAGE.value else None,
        text_encoder=TEXT_ENCODER.value, tokenizer=TOKENIZER.value, vae=VAE.value, clip=CLIP.value,
    )  # fmt: skip
    check_flags(generator)
    return generator


def request(generator, asked, seeds) -> generate.Request:
    """Samples, as the flags say."""
    return generate.request(
        generator, asked, seeds, steps=STEPS.value, guidance=GUIDANCE.value, negative_prompt=NEGATIVE.value,
        low_guidance=LOW_GUIDANCE.value, batch=BATCH.value, image=IMAGE.value,
    )  # fmt: skip


def check_flags(generator) -> None:
    """ValueError for flags that are of classes where prompts are sampled, and the other way round."""
    unfit, kind = (FOR_PROMPTS, "classes") if generator.of_classes else (FOR_CLASSES, "prompts")
    unfit += FOR_LATENTS if generator.media is None else ()
    if wrong := [f"--{flag.name}" for flag in unfit if flag.present]:
        raise ValueError(f"{CHECKPOINT.value} samples from {kind}: no {', '.join(wrong)}")


def check_names(generator, out) -> None:
    """ValueError for names whose suffix does not fit what is written."""
    if generator.of_classes and out.suffix not in (".png", ".safetensors"):
        raise ValueError(f"--out={out} must end in .png or .safetensors")
    if generator.media is None and generator.dataset.view == "video" and out.suffix == ".png":
        raise ValueError(f"--out={out}: nothing says how these latents become pixels: name a --config with media")
    if out.suffix not in (".mp4", ".png", ".safetensors"):
        raise ValueError(f"--out={out} must end in .mp4, .png (one frame) or .safetensors (latents)")
    if out.suffix == ".png" and generator.frames > 1:
        raise ValueError(f"--out={out} is for one frame, these are {generator.frames}: take .mp4, or --frames=1")
    if SHEET.value is not None and not SHEET.value.endswith((".png", ".html")):
        raise ValueError(f"--sheet={SHEET.value} must end in .png or .html")
    if SHEET.value is not None and SHEET.value.endswith(".html") and out.suffix == ".safetensors":
        raise ValueError(f"--sheet={SHEET.value} shows the files of --out, and latents cannot be shown: take a .png")
    if out.suffix == ".mp4":
        video.check_video()


def write_sheet(path: str, wanted: generate.Request, paths) -> None:
    """A page of files, one for every prompt and seed; the prompts are numbered if one was asked for twice."""
    prompts, files = wanted.asked, iter(paths)
    rows = prompts if len(set(prompts)) == len(prompts) else [f"{i}. {prompt}" for i, prompt in enumerate(prompts, 1)]
    videos: dict = {row: {f"seed {seed}": next(files) for seed in wanted.seeds} for row in rows}
    if wanted.frames is not None:
        videos = {row: {"image": image} | videos[row] for row, image in zip(rows, wanted.frames, strict=True)}
    network = "Teacher" if wanted.generator.of_teacher else "Student"
    guidance = "" if wanted.guidance is None else f", guidance {wanted.guidance:g}"
    note = f"{network}, {in_steps(wanted.steps)}{guidance}."
    write_page(path, title=f"Samples of {wanted.generator.folder}", note=note, videos=videos)


def read_seeds() -> list[int]:
    """The numbers of --seeds."""
    if bad := [seed for seed in SEEDS.value if not seed.isdecimal() or int(seed) >= 2**32]:
        raise ValueError(f"--seeds has {', '.join(bad)}: a seed is a number from 0 to {2**32 - 1}")
    seeds = [int(seed) for seed in SEEDS.value]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(SEEDS.value)} must be one number or more, none of them twice")
    return seeds


def read_classes(num_classes: int) -> list[int]:
    """The labels of --classes, or all, each --each times; ValueError for one that the data set lacks."""
    classes = CLASSES.value or [str(label) for label in range(num_classes)]
    if bad := [c for c in classes if not c.isdigit() or int(c) >= num_classes]:
        raise ValueError(f"--classes has {', '.join(bad)}: the classes are 0 to {num_classes - 1}")
    return np.repeat([int(c) for c in classes], EACH.value).tolist()


@contextlib.contextmanager
def timed(clock: dict, name: str):
    """Adds the seconds inside to a clock."""
    started = time.perf_counter()
    yield
    clock[name] = time.perf_counter() - started


if __name__ == "__main__":
    common.run(main)

"""Build a set of latents to train on: from prompts by a teacher, from videos, from published shards, or from images
with classes.

python scripts/build_dataset.py --config=wan_1_3b.py --out=SET --prompts=FILE --teacher=wan-14b \\
    --negative_prompt=… --text_encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl --vae=Wan2.1_VAE.pth
python scripts/build_dataset.py --config=wan_1_3b.py --out=SET --videos=FOLDER --negative_prompt=… (the same three)
python scripts/build_dataset.py --config=wan_1_3b.py --out=SET --shards=FOLDER --negative_prompt=… (the same three)
python scripts/build_dataset.py --config=imagenet512.py --out=SET --images=FOLDER --vae=sd-vae-ft-mse --batch=32
python scripts/build_dataset.py --out=SET --verify

The same command goes on where it was ended. Several workers build one set in a folder that all of them see: give each
its --worker, 0 to N − 1, of --workers=N. The last one to finish says that the set is whole; then --config.data.path=SET
trains on it. SET/sheets shows some of it.
"""

import common  # noqa: I001  (puts the checkout on the path)
from collections.abc import Callable
from typing import NamedTuple

from absl import flags
from tqdm import tqdm

from rcm_jax.build import codec, embeddings, engine
from rcm_jax.build.images import images
from rcm_jax.build.prompts import prompts
from rcm_jax.build.shards import shards
from rcm_jax.build.verify import verify
from rcm_jax.build.videos import videos
from rcm_jax.data.latents import read_set
from rcm_jax.run import texts
from rcm_jax.run.pixels import open_weights
from rcm_jax.util.config import revise, to_mapping

CONFIG = common.config_flag("The experiment that the set is for: it says what is sampled, and how text is embedded.")
OUT = flags.DEFINE_string(
    "out", None, "The folder of the set: new, empty, or begun by the same command.", required=True
)
PROMPTS = flags.DEFINE_string("prompts", None, "Samples of --teacher for a file of prompts, one on each line.")
VIDEOS = flags.DEFINE_string("videos", None, "A folder of videos or images.")
SHARDS = flags.DEFINE_string("shards", None, "Published shards: a folder of tars, or a pattern.")
IMAGES = flags.DEFINE_string("images", None, "A folder with a folder of images for each class.")
VERIFY = flags.DEFINE_bool("verify", False, "Read all of a finished set, and compare it with what was written.")
# Around the network.
TEXT_ENCODER, TOKENIZER, VAE = common.media_flags()
NEGATIVE = flags.DEFINE_string("negative_prompt", None, "What guidance leads away from; its embedding is kept.")
TILE = flags.DEFINE_integer("tile", None, "Latents a side that the autoencoder takes at once.", lower_bound=2)
ROUND_TRIP = flags.DEFINE_bool("round_trip", None, "Decode, clamp and encode latents again: default for sampled ones.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of x0 on disk; as it comes if not given.")
# The work.
SHARD = flags.DEFINE_integer(
    "shard", 32, "Examples in a file: what is lost, at most, when a worker ends.", lower_bound=1
)
WORKER = flags.DEFINE_integer("worker", 0, "Which worker this is, from 0.", lower_bound=0)
WORKERS = flags.DEFINE_integer("workers", 1, "How many there are.", lower_bound=1)
SKIPPED = flags.DEFINE_integer("most_skipped", 0, "So many bad items are left out; one more ends it.", lower_bound=0)
SHEET_EVERY = flags.DEFINE_integer(
    "sheet_every", 16, "Shards from one contact sheet to the next; 0: none.", lower_bound=0
)
# Of --prompts.
TEACHER = flags.DEFINE_string("teacher", None, "A workdir of scripts/train.py or convert_checkpoint.py.")
EACH = flags.DEFINE_integer("each", 1, "Samples of every prompt.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the first sample; the next has the next.", lower_bound=0)
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; the config's if not given.", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "The config's if not given.")
BATCH = flags.DEFINE_integer("batch", 1, "Samples, or --images, at once.", lower_bound=1)
SIZE = flags.DEFINE_string("size", None, "Pixels, e.g. 832x480; the config's if not given.")
# Of --prompts and --videos.
FRAMES = flags.DEFINE_integer("frames", None, "Frames of pixels, 4n + 1; the config's if not given.", lower_bound=1)
# Of --videos.
CAPTIONS = flags.DEFINE_string("captions", None, "A .csv, .tsv or .jsonl of paths and captions; else NAME.txt beside.")
BUCKETS = flags.DEFINE_list("buckets", [], "Sizes, e.g. 832x480,480x832: each video takes the nearest in aspect.")
FPS = flags.DEFINE_float("fps", None, "Frames in a second; the config's if not given.", lower_bound=1e-3)
CLIPS = flags.DEFINE_integer("clips", 1, "Clips of every video, at most, one after the other.", lower_bound=1)
FIRST_FRAME = flags.DEFINE_bool("first_frame", False, "Add the condition y of image to video.")
CLIP = flags.DEFINE_string("clip", None, "Published weights of CLIP's image encoder: adds Wan2.1's clip_features.")


def main():
    """Builds, or goes on building, or verifies."""
    if VERIFY.value:
        read_again()
        return
    run = read_run()
    kind = read_kind(run.media)
    round_trip = kind.sampled if ROUND_TRIP.value is None else ROUND_TRIP.value
    encodes = round_trip or not kind.sampled
    if encodes and not VAE.value:
        why = "the round trip of sampled latents (--noround_trip leaves it out)" if round_trip else "encoding"
        raise ValueError(f"{why} needs --vae: published weights of the autoencoder")
    negative = read_negative(run.media)
    settings = {
        "text_encoder": TEXT_ENCODER.value, "negative_prompt": negative, "round_trip": round_trip,
        "vae": VAE.value if encodes else None, "dtype": DTYPE.value, "tile": TILE.value,
        "media": to_mapping(revise(run.media, {"vae_path": ""})),
    }  # fmt: skip
    plan = engine.make_plan(OUT.value, kind.make(run), SHARD.value, settings)
    if not WORKER.value < WORKERS.value:
        raise ValueError(f"--worker={WORKER.value} must be below --workers={WORKERS.value}")
    encoder = check_files(run.media, negative)
    engine.claim(plan)
    if not plan.finished:
        work(run.media, plan, negative, encoder, round_trip)
    if (count := engine.close(plan)) is None:
        left = len(plan.pending())
        print(
            f"{OUT.value}: {left} of {len(plan.shards)} shards are left to other workers; the last one closes the set"
        )
        return
    told = read_set(plan.folder)
    skipped = f", {len(told['skipped'])} skipped" if told["skipped"] else ""
    shapes = sorted({tuple(shard["shape"]) for shard in told["shards"]})
    print(f"{OUT.value}: {count} examples{skipped} of {', '.join(map(str, map(list, shapes)))}, whole")


def check_files(media, negative: str | None) -> dict:
    """The tensors of the text encoder, not read yet; ValueError or OSError unless all files fit the config."""
    if VAE.value:
        open_weights(media.vae, VAE.value)
    if media.text_encoder is None:
        return {}
    texts.tokenize(media, needed(TOKENIZER), [negative or ""])
    return open_weights(media.text_encoder, needed(TEXT_ENCODER))


def work(media, plan, negative: str | None, encoder: dict, round_trip: bool) -> None:
    """The part of this worker: texts, then shards."""
    pending = plan.pending(WORKER.value, WORKERS.value)
    with tqdm(desc="texts", unit="shard", total=len(pending), dynamic_ncols=True, disable=not pending) as bar:
        embeddings.embed(plan, pending, media, negative, encoder, TOKENIZER.value, bar.update)
    own = plan.shards[WORKER.value :: WORKERS.value]
    total, left = (sum(len(shard.places) for shard in some) for some in (own, pending))
    opened = codec.open_codec(media, VAE.value, TILE.value) if VAE.value and pending else None

    def finish(example):
        x0 = codec.round_trip(opened, example["x0"]) if round_trip else example["x0"]
        x0 = x0 if DTYPE.value is None else x0.astype(DTYPE.value)
        text = {"text": example["text"].astype(media.text_encoder.dtype)} if "text" in example else {}
        return {**example, "x0": x0, **text}

    def made(shard, items, examples):
        if opened and SHEET_EVERY.value and shard.number % SHEET_EVERY.value == 0:
            codec.write_sheet(opened, plan.folder / "sheets" / f"{shard.number:05d}.png", items, examples)

    with tqdm(desc="examples", unit="example", initial=total - left, total=total, dynamic_ncols=True) as bar:
        job = engine.Work(lambda shard: embeddings.read(plan, shard, media), finish, SKIPPED.value, bar.update, made)
        engine.build(plan, pending, job)


def from_prompts(run):
    """A teacher's samples."""
    return prompts(
        run, needed(TEACHER), common.read_lines(PROMPTS.value), lambda: engine.read_uncond(OUT.value), each=EACH.value,
        seed=SEED.value, steps=STEPS.value, guidance=GUIDANCE.value, size=common.as_size("--size", SIZE.value),
        frames=FRAMES.value, batch=BATCH.value,
    )  # fmt: skip


def from_videos(run):
    """Videos and images, encoded."""
    return videos(
        run, VAE.value, VIDEOS.value, captions=CAPTIONS.value, fps=FPS.value, frames=FRAMES.value, clips=CLIPS.value,
        buckets=[common.as_size("--buckets", size) for size in BUCKETS.value], first_frame=FIRST_FRAME.value,
        tile=TILE.value, clip=CLIP.value,
    )  # fmt: skip


def from_shards(run):
    """Latents that were published."""
    return shards(run, SHARDS.value)


def from_images(run):
    """Images with classes, encoded."""
    return images(run, VAE.value, IMAGES.value, batch=BATCH.value)


class Kind(NamedTuple):
    """What makes a source of an experiment, and its own flags."""

    make: Callable
    flags: tuple
    sampled: bool  # its latents are samples: they make the round trip unless told otherwise


SOURCES = {
    PROMPTS.name: Kind(from_prompts, (TEACHER, EACH, SEED, STEPS, GUIDANCE, BATCH, SIZE, FRAMES), sampled=True),
    VIDEOS.name: Kind(from_videos, (CAPTIONS, BUCKETS, FPS, CLIPS, FIRST_FRAME, CLIP, FRAMES), sampled=False),
    SHARDS.name: Kind(from_shards, (), sampled=True),
    IMAGES.name: Kind(from_images, (BATCH,), sampled=False),
}


def read_run():
    """The experiment of --config; ValueError for one without text and pixels."""
    if CONFIG.value is None:
        raise ValueError("--config is needed: the experiment that the set is for, e.g. --config=wan_1_3b.py")
    run = common.experiment(CONFIG)
    if run.media is None:
        raise ValueError("this config has no media: nothing says how its prompts and pixels become conditions and x0")
    return run


def read_kind(media) -> Kind:
    """The one source that is asked for; ValueError for none, for several, for flags or a config of another."""
    asked = [name for name in SOURCES if flags.FLAGS[name].value]
    if len(asked) != 1:
        known = ", ".join(f"--{name}" for name in SOURCES)
        raise ValueError(f"one of {known} is needed, got {' and '.join(asked) or 'none'}")
    kind = SOURCES[asked[0]]
    own = {flag.name for flag in kind.flags}
    others = {flag.name: flag.present for other in SOURCES.values() for flag in other.flags}
    if wrong := [f"--{name}" for name, present in others.items() if present and name not in own]:
        raise ValueError(f"--{asked[0]} takes no {', '.join(wrong)}")
    if (asked[0] == IMAGES.name) != (media.text_encoder is None):
        has = "has no text encoder: its data are --images" if media.text_encoder is None else "is conditioned on text"
        raise ValueError(f"--{asked[0]}: this config {has}")
    return kind


def read_negative(media) -> str | None:
    """The negative prompt; None for zeros, or where there is no text."""
    if media.text_encoder is None:
        return None
    given = texts.negative_prompt(media, NEGATIVE.value)
    return None if media.zero_negative and not given else given


def needed(flag) -> str:
    """The value of a flag; ValueError if it was not given."""
    if not flag.value:
        raise ValueError(f"--{flag.name} is needed: {flags.FLAGS[flag.name].help}")
    return flag.value


def read_again() -> None:
    """Reads the whole set."""
    total = sum(shard["examples"] for shard in read_set(OUT.value)["shards"])
    with tqdm(desc="verifying", unit="example", total=total, dynamic_ncols=True) as bar:
        count = verify(OUT.value, bar.update)
    print(f"{OUT.value}: {count} examples, all as they were written")


if __name__ == "__main__":
    common.run(main)

"""Evaluate: FID, precision, recall, density, coverage and the inception score of images, videos or a checkpoint.

python scripts/evaluate.py --samples_from=images/ --reference=photographs.zip --weights=pt_inception-2015-12-05.pth
python scripts/evaluate.py --checkpoint=runs/digits --samples=50000 --reference=cifar10-32x32.npz --weights=…
python scripts/evaluate.py --reference=photographs/ --save_reference=photographs.npz --weights=…

--samples_from and --reference are folders or .zip files of PNG and JPEG, .npy or .npz of uint8 [n, h, w, c], folders of
.mp4; --reference besides what --save_reference wrote, or NVlabs' .npz and .pkl of mu and sigma; --config=digits.py in
its place the data set of a config. The table goes to the console, with all settings to --out. See docs/evaluation.md.
"""

import common  # noqa: I001  (puts the checkout on the path)
import json
import time

from absl import flags
from tqdm import tqdm

import rcm_jax
from rcm_jax.evaluate import extractors, features, inputs, quality
from rcm_jax.evaluate.table import format_table
from rcm_jax.parallel import distributed
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.run.program import load_data
from rcm_jax.util.files import check_writable, write_text

SAMPLES_FROM = flags.DEFINE_string("samples_from", None, "Images or videos: a folder, .zip, .npy or .npz.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir of scripts/train.py or convert_checkpoint.py.")
STEP = flags.DEFINE_integer("checkpoint_step", None, "Training step of the checkpoint; the newest if not given.")
MODE = flags.DEFINE_enum("mode", None, ["student", "teacher"], "What converted weights are; a trained workdir knows.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; its config's if not given.", lower_bound=1)
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "Of a teacher, or of a student that is given it; its config's if not given."
)
VAE = flags.DEFINE_string("vae", None, "Published weights of the autoencoder, for a checkpoint that samples latents.")
SAMPLES = flags.DEFINE_integer(
    "samples", None, "How many: 50,000 of a checkpoint, all of files, if not given.", lower_bound=2
)
SEED = flags.DEFINE_integer("seed", 0, "Of samples, their classes, and of which files are taken.", lower_bound=0)
REFERENCE = flags.DEFINE_string("reference", None, "What samples are measured against: images, videos, or statistics.")
CONFIG = common.config_flag("In the place of --reference: the training data of this config.")
SAVE = flags.DEFINE_string("save_reference", None, "An .npz for the statistics of the reference.")
SAVE_FEATURES = flags.DEFINE_bool("save_features", False, "With --save_reference: its features, too, for precision &c.")
EXTRACTOR = flags.DEFINE_string("extractor", "inception", f"One of {', '.join(extractors.EXTRACTORS)}.")
WEIGHTS = flags.DEFINE_string("weights", None, "Published weights of the extractor.")
METRICS = flags.DEFINE_list("metrics", ["frechet"], f"Of {', '.join(quality.METRICS)}.")
NEIGHBOURS = flags.DEFINE_integer("neighbours", 3, "k of precision, recall, density and coverage.", lower_bound=1)
SPLITS = flags.DEFINE_integer("splits", 10, "Parts of the samples for the inception score.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 64, "Images at once on each device.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "A .json for the numbers and all settings.")
OVERWRITE = common.overwrite_flag()
CLUSTER = common.cluster_flags()


def main():
    """Checks everything, extracts features, and reports."""
    started = time.time()
    common.join_cluster(CLUSTER)
    asked = quality.Asked(tuple(METRICS.value), NEIGHBOURS.value, SPLITS.value)
    check_flags()
    opened = extractors.open_extractor(EXTRACTOR.value, WEIGHTS.value)
    quality.check(asked, opened)
    for path in filter(None, (OUT.value, SAVE.value)):
        distributed.by_first(lambda path=path: check_writable(path, OVERWRITE.value))
    mesh, samples, reference = make_mesh(MeshConfig()), open_samples(), open_reference()
    if samples and asked.reference and reference is None:
        raise ValueError(f"{', '.join(asked.metrics)}: name what samples are measured against, by --reference")
    if samples and reference and asked.reference:
        if isinstance(reference, features.Features):
            quality.check_reference(asked, opened, reference)
        of_reference = reference.counts if isinstance(reference, features.Features) else features.counts_of(reference)
        quality.check_counts(asked, features.counts_of(samples), of_reference)
    keep = asked.features or SAVE_FEATURES.value
    if isinstance(reference, inputs.Clips):
        reference = extracted(opened, reference, mesh, keep, False)
        if SAVE.value and distributed.first():
            features.save(SAVE.value, reference, features=SAVE_FEATURES.value)
    if samples is None:
        say(f"{SAVE.value}: {in_words(reference.counts)}")
        return
    found = extracted(opened, samples, mesh, asked.features, asked.logits)
    if distributed.first():
        report(quality.measure(asked, found, reference), found, reference)
        print(f"{time.time() - started:.1f} s, with compilation")


def check_flags() -> None:
    """ValueError for flags that exclude or need each other."""
    if SAMPLES_FROM.value and CHECKPOINT.value:
        raise ValueError("--samples_from and --checkpoint: name one of them")
    if REFERENCE.value and CONFIG.value:
        raise ValueError("--reference and --config: name one of them")
    if not (SAMPLES_FROM.value or CHECKPOINT.value or SAVE.value):
        raise ValueError("nothing to do: name --samples_from, --checkpoint, or --save_reference")
    if SAVE.value and not (REFERENCE.value or CONFIG.value):
        raise ValueError("--save_reference needs --reference, or --config")
    if SAVE.value and not SAVE.value.endswith(".npz"):
        raise ValueError(f"--save_reference={SAVE.value} must end in .npz")
    if unfit := [f"--{f.name}" for f in (STEP, MODE, STEPS, GUIDANCE, VAE) if f.present and not CHECKPOINT.value]:
        raise ValueError(f"{', '.join(unfit)}: for --checkpoint")


def open_samples() -> inputs.Clips | None:
    """What is evaluated, if anything."""
    if SAMPLES_FROM.value:
        return inputs.open_clips(SAMPLES_FROM.value, SAMPLES.value, SEED.value)
    if CHECKPOINT.value is None:
        return None
    generator = rcm_jax.load(CHECKPOINT.value, step=STEP.value, mode=MODE.value, vae=VAE.value)
    count = 50_000 if SAMPLES.value is None else SAMPLES.value
    return inputs.of_checkpoint(generator, count, SEED.value, steps=STEPS.value, guidance=GUIDANCE.value)


def open_reference() -> features.Features | inputs.Clips | None:
    """What samples are measured against: statistics, or images that are still to be looked at."""
    if CONFIG.value:
        run = common.experiment(CONFIG)
        return inputs.of_dataset(f"the training data of {type(run.data).__name__}", load_data(run))
    if REFERENCE.value is None:
        return None
    if REFERENCE.value.endswith((".npz", ".pkl")) and (known := features.load(REFERENCE.value)):
        if SAVE.value:
            raise ValueError(f"--save_reference: {REFERENCE.value} holds statistics already")
        return known
    return inputs.open_clips(REFERENCE.value)


def extracted(opened, clips, mesh, keep, logits) -> features.Features:
    """Features, with a bar of progress."""
    off = not distributed.first()
    with tqdm(total=clips.count, desc=clips.source, unit="sample", dynamic_ncols=True, disable=off) as bar:
        return features.extract(opened, clips, mesh, batch=BATCH.value, keep=keep, logits=logits, progress=bar.update)


def say(text: str) -> None:
    """On the console, of the first process."""
    if distributed.first():
        print(text)


def in_words(counts) -> str:
    """How many images there are of each view."""
    return ", ".join(f"{count} {view}" for view, count in counts.items())


def report(rows, found: features.Features, reference: features.Features | None) -> None:
    """The table, and the file with all settings."""
    settings = {
        "samples": {"source": found.source, "count": found.counts},
        "reference": reference and {"source": reference.source, "count": reference.counts},
        "seed": SEED.value,
        "extractor": found.extractor,
        "weights": found.checksum,
        "neighbours": NEIGHBOURS.value,
        "splits": SPLITS.value,
    }
    print(f"{found.source}: {in_words(found.counts)}, features of {found.extractor}")
    print(format_table(rows))
    if OUT.value:
        write_text(OUT.value, json.dumps({"metrics": rows, "settings": settings}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    common.run(main)

"""Sample: python scripts/sample.py --checkpoint=DIR --steps=4 --out=grid.png

DIR is a workdir of scripts/train.py: of a distillation (the averaged student samples in few steps) or of a teacher
(DIR/teacher: the guided PF-ODE). One row per class.
"""

import common  # noqa: I001  (puts the checkout on the path)
import time

import jax
import jax.numpy as jnp
from absl import flags

from rcm_jax import checkpoint, experiment, trainer
from rcm_jax.data import DATASETS, DigitsConfig
from rcm_jax.evaluate.distillation import draw
from rcm_jax.evaluate.picture import grid, save_png
from rcm_jax.sharding import MeshConfig, make_mesh

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir of scripts/train.py.")
OUT = flags.DEFINE_string("out", None, "The PNG to write.")
STEPS = flags.DEFINE_integer("steps", 4, "Sampling steps.", lower_bound=1)
EACH = flags.DEFINE_integer("each", 8, "Samples of every class.", lower_bound=1)
CLASSES = flags.DEFINE_list("classes", [], "Class labels, e.g. 3,5,8; all if empty.")
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same noise for teacher and student.")
GUIDANCE = flags.DEFINE_float("guidance", 1.0, "Guidance of a teacher; a student has it built in.")
STEP = flags.DEFINE_integer("checkpoint_step", None, "Training step of the checkpoint; the newest if not given.")
flags.mark_flags_as_required(["checkpoint", "out"])


def main():
    """Read the averaged parameters, sample, write one picture."""
    if not OUT.value.endswith(".png"):
        raise ValueError(f"--out={OUT.value} must end in .png")
    run = experiment.from_mapping(checkpoint.read_config(CHECKPOINT.value))
    if not isinstance(run, experiment.Pretraining) or not isinstance(run.data, DigitsConfig):
        raise ValueError(f"{CHECKPOINT.value} makes no pictures of classes, and nothing else is sampled so far")
    dataset = DATASETS[type(run.data)](run.data)
    labels = parse_classes(CLASSES.value, dataset.num_classes)
    network = experiment.make_network(run, dataset)
    if isinstance(run, experiment.Experiment):
        if GUIDANCE.present:
            raise ValueError(f"--guidance is for teachers: this student was distilled with {run.rcm.guidance}")
        sampler = experiment.student_sampler(network.F, run.sampling, STEPS.value)
    else:
        sampler = experiment.teacher_sampler(network.F, dataset.uncond, GUIDANCE.value, run.sampling, STEPS.value)
    mesh = make_mesh(MeshConfig())
    abstract = trainer.abstract_params(jax.eval_shape(network.init, jax.random.key(0)), mesh)
    params = checkpoint.restore_item(CHECKPOINT.value, "ema", abstract, STEP.value)
    started = time.time()
    key = jax.random.key(SEED.value)
    images = draw(sampler, params, key, jnp.repeat(jnp.array(labels), EACH.value), dataset.sample_shape)
    save_png(OUT.value, grid(dataset.to_image(images), EACH.value, upscale=8))
    print(f"{OUT.value}: {len(images)} samples, {STEPS.value} steps, {time.time() - started:.1f} s with compilation")


def parse_classes(classes, num_classes) -> list[int]:
    """The labels asked for, or all; ValueError for one that the data set lacks."""
    if not classes:
        return list(range(num_classes))
    if bad := [c for c in classes if not c.isdigit() or int(c) >= num_classes]:
        raise ValueError(f"--classes has {', '.join(bad)}: the classes are 0 to {num_classes - 1}")
    return [int(c) for c in classes]


if __name__ == "__main__":
    common.run(main)

"""The report of a distillation: real data, teacher and student side by side, in pictures and numbers."""

import pathlib

import jax
import numpy as np

from rcm_jax.evaluate.report import write_report
from rcm_jax.evaluate.table import evaluate_samples, make_reference, table
from rcm_jax.media.picture import grid, save_png
from rcm_jax.run.experiment import Experiment, student_sampler, teacher_sampler
from rcm_jax.train.metrics import read_metrics

SAMPLES = 3600  # of every row of the table
BATCH = 400  # sampled at once
TEACHER_STEPS = (50, 4)
STUDENT_STEPS = (1, 2, 4)
HIDDEN = {f"teacher {k}" for k in TEACHER_STEPS[1:]}  # in the table, not in the picture
SHOWN = 8  # samples of a class in the picture
BASELINE = f"teacher {TEACHER_STEPS[0]}"
REAL = "real (training split)"


def draw(sampler, params, key, labels, shape) -> np.ndarray:
    """Samples [n, *shape] for class labels [n], BATCH at a time; sample i depends on key, i and its label alone."""
    labels = np.asarray(labels, np.int32)
    size = min(BATCH, len(labels))
    padded = np.pad(labels, (0, -len(labels) % size))
    parts = [
        np.asarray(sampler(params, key, np.arange(i, i + size), {"label": padded[i : i + size]}, shape))
        for i in range(0, len(padded), size)
    ]
    return np.concatenate(parts)[: len(labels)]


def write_samples(run: Experiment, workdir, dataset, sampler, params, step: int) -> None:
    """A picture of what a network samples while it trains: workdir/samples/STEP.png, a row per class."""
    key = jax.random.fold_in(jax.random.key(run.seed), 4)
    images = draw(sampler, params, key, labels_by_class(dataset, SHOWN), dataset.sample_shape)
    save_png(pathlib.Path(workdir) / "samples" / f"{step:08d}.png", grid(dataset.to_image(images), SHOWN, upscale=4))


def labels_by_class(dataset, each: int) -> np.ndarray:
    """0, 0, …, 1, 1, …: `each` of every class."""
    return np.repeat(np.arange(dataset.num_classes), each)


def write_distillation_report(trained) -> str:
    """Writes report/ (report.png, report.json) of a pipeline.Trained; returns the table for the console.

    Every row has the same labels, and every generated one starts from the same noise. Without a teacher the rows are
    the student's, and ratios are to the real images.
    """
    run, dataset = trained.run, trained.dataset
    samplers, baseline = {}, REAL
    if trained.teacher_folder:
        baseline = BASELINE
        F, teacher = trained.teacher_F, trained.teacher
        samplers = {
            f"teacher {k}": (teacher_sampler(F, teacher.uncond, run.rcm.guidance, run.sampling, k), teacher.params)
            for k in TEACHER_STEPS
        }
    student_steps = [k for k in STUDENT_STEPS if k <= len(run.sampling.mid_times)]
    samplers |= {
        f"student {k}": (student_sampler(trained.network.F, run.sampling, k), trained.state.ema) for k in student_steps
    }
    key = jax.random.fold_in(jax.random.key(run.seed), 3)
    labels = labels_by_class(dataset, SAMPLES // dataset.num_classes)
    images = {
        name: dataset.to_image(draw(sampler, params, key, labels, dataset.sample_shape))
        for name, (sampler, params) in samplers.items()
    }
    train = dataset.to_image(dataset.train["x0"]), dataset.train["cond"]["label"]
    test = dataset.to_image(dataset.test["x0"]), dataset.test["cond"]["label"]
    reference = make_reference(*train, *test, jax.random.key(run.seed))
    rows = {REAL: evaluate_samples(*train, reference)}
    rows |= {name: evaluate_samples(samples, labels, reference) for name, samples in images.items()}

    shown = (np.arange(dataset.num_classes)[:, None] * (SAMPLES // dataset.num_classes) + np.arange(SHOWN)).ravel()
    panels = {"real digits": _first_of_each_class(*test, dataset.num_classes)}
    panels |= {_title(name): images[name][shown] for name in images if name not in HIDDEN}
    panels = {name: 1 - pixels for name, pixels in panels.items()}  # ink on paper
    return write_report(
        trained.folder / "report",
        panels=panels,
        curves=_curves(trained.folder, trained.teacher_folder),
        rows=table(rows, relative_to=baseline),
        title=f"{run.rcm.name} on digits",
        footer=f"Seed {run.seed}. Fréchet distances (FD) of {SAMPLES} samples to {len(test[1])} held-out real images; "
        f"ratios to {baseline}.\nThe real row is the {len(train[1])} images that trained the classifier; "
        f"its accuracy on the held-out ones is {reference.accuracy:.3f}.",
        columns=SHOWN,
        row_labels=[str(c) for c in range(dataset.num_classes)],
        metadata={"seed": run.seed, "samples": SAMPLES, "classifier_accuracy": reference.accuracy},
    )


def _first_of_each_class(images, labels, num_classes):
    return np.concatenate([images[labels == c][:SHOWN] for c in range(num_classes)])


def _title(name):
    kind, steps = name.split()
    return f"{kind}, {steps} step{'s' if steps != '1' else ''}"


def _curves(workdir, teacher_dir) -> dict:
    """Loss and norm curves of the trainings that there were, from their metrics files."""

    def series(folder, name):
        rows = read_metrics(folder) if folder else []
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return np.array(points, float).reshape(-1, 2)

    plots = {
        "teacher loss": {"diffusion": series(teacher_dir, "diffusion/loss")},
        "student losses": {name: series(workdir, f"{name.lower()}/loss") for name in ("sCM", "dCM", "DMD")},
        "fake score loss": {"critic": series(workdir, "critic/loss")},
        "norms": {
            "tangent": series(workdir, "scm/tangent_norm"),
            "student gradient": series(workdir, "student/grad_norm"),
        },
    }
    # A run without DMD, or one that ended before it, has no such curve.
    plots = {title: {name: points for name, points in plot.items() if len(points)} for title, plot in plots.items()}
    return {title: plot for title, plot in plots.items() if plot}

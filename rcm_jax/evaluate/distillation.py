"""The report on labelled images: real ones, teacher and student side by side, in pictures and numbers."""

import jax
import numpy as np

from rcm_jax.evaluate import curves
from rcm_jax.evaluate.arrays import labelled
from rcm_jax.evaluate.page import previews_of
from rcm_jax.evaluate.report import data_name, in_steps, write_report
from rcm_jax.evaluate.table import evaluate_samples, make_reference, table
from rcm_jax.media.picture import strokes
from rcm_jax.run.previews import draw, labels_by_class
from rcm_jax.util.config import to_mapping

SAMPLES = 3600  # of every row of the table, unless sampling.report_samples says otherwise
FEW_STEPS = 4  # of a teacher, beside its own number: in the table, not in the picture
STUDENT_STEPS = (1, 2, 4)
SHOWN, CLASSES = 8, 10  # in the picture: samples of a class; classes, at most
REAL = "real (training split)"


def write_distillation_report(trained) -> str:
    """Writes report/ (index.html, report.png, report.json) of a pipeline.Trained; returns the table for the console.

    Every row has the same labels, and every generated one starts from the same noise. Without a teacher the rows are
    the student's, and ratios are to the real images.
    """
    run, dataset = trained.run, trained.dataset
    key = jax.random.fold_in(jax.random.key(run.seed), 3)
    each = max(SHOWN, (run.sampling.report_samples or SAMPLES) // dataset.num_classes)
    labels = labels_by_class(dataset, each)
    images = {
        name: dataset.to_image(draw(sampler, params, key, labels, dataset.sample_shape))
        for name, (sampler, params) in _samplers(trained).items()
    }
    (train, train_labels), (test, test_labels) = (labelled(part) for part in (dataset.train, dataset.test))
    train, test = dataset.to_image(train), dataset.to_image(test)
    reference = make_reference(train, train_labels, test, test_labels, jax.random.key(run.seed))
    some = np.sort(np.concatenate([np.flatnonzero(train_labels == c)[:each] for c in range(dataset.num_classes)]))
    rows = {REAL: evaluate_samples(train[some], train_labels[some], reference)}
    rows |= {name: evaluate_samples(samples, labels, reference) for name, samples in images.items()}

    first, name = next(iter(images)), data_name(run.data)
    baseline = first if trained.teacher_folder else REAL
    real = f"the {len(train)}" if len(some) == len(train) else f"{len(some)} of the {len(train)}"
    panels = {f"real {name}": _by_class(test, test_labels, dataset.num_classes)}
    for row, samples in images.items():
        network, steps = row.split()
        if row == first or network == "student":
            panels[f"{network}, {in_steps(int(steps))}"] = _by_class(samples, labels, dataset.num_classes)
    if strokes(train):
        panels = {title: 1 - pixels for title, pixels in panels.items()}
    plots = curves.of_training(trained.folder, trained.teacher_folder)
    return write_report(
        trained.folder / "report",
        panels=panels,
        curves=plots,
        rows=table(rows, relative_to=baseline),
        title=f"{run.rcm.name} on {name}",
        footer=f"Seed {run.seed}. Fréchet distances (FD) of {len(labels)} samples to {len(test)} held-out real images; "
        f"ratios to {baseline}.\nThe real row is {real} images that trained the classifier; "
        f"its accuracy on the held-out ones is {reference.accuracy:.3f}." + curves.note(plots),
        columns=SHOWN,
        row_labels=[str(c) for c in range(dataset.num_classes)][:CLASSES],
        metadata={"seed": run.seed, "samples": len(labels), "classifier_accuracy": reference.accuracy},
        previews=previews_of(trained.folder),
        config=to_mapping(run),
    )


def _samplers(trained) -> dict:
    """{row of the table: (sampler, its parameters)}; the teacher's rows, if there is one, begin with the best."""
    program, samplers = trained.program, {}
    sampling = program.run.sampling
    if trained.teacher_folder:
        for k in (sampling.teacher_steps, FEW_STEPS):
            samplers[f"teacher {k}"] = program.teacher_sampler(k), trained.teacher.params
    students = program.student_samplers(STUDENT_STEPS).items()
    return samplers | {f"student {k}": (sampler, trained.student) for k, sampler in students}


def _by_class(images, labels, num_classes: int) -> np.ndarray:
    """The first SHOWN images of each of at most CLASSES classes, [n, h, w, c]; NaN where a class has fewer."""
    rows = np.full((min(num_classes, CLASSES), SHOWN, *images.shape[1:]), np.nan, np.float32)
    for label, row in enumerate(rows):
        found = images[labels == label][:SHOWN]
        row[: len(found)] = found
    return rows.reshape(-1, *images.shape[1:])

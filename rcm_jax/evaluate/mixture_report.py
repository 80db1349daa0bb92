"""The report on labelled points in the plane: pictures, and distances from a mixture's exact teacher or from data."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from rcm_jax.data import mixture
from rcm_jax.evaluate import curves
from rcm_jax.evaluate.arrays import labelled
from rcm_jax.evaluate.mixture import Reference, data_reference, evaluate, make_reference
from rcm_jax.evaluate.page import previews_of
from rcm_jax.evaluate.report import data_name, in_steps, write_report
from rcm_jax.media.picture import SIZE, scatter
from rcm_jax.method import samplers
from rcm_jax.run.experiment import Experiment
from rcm_jax.run.program import Network, student_sampler
from rcm_jax.util.config import to_mapping

SAMPLES = 6000  # unless sampling.report_samples says otherwise; at most, where they are measured against data
FLOOR = "exact teacher, other noise"
STEPS = (1, 2, 4)  # of the student
MAP_ERROR = "map error: root mean square distance to where the exact ODE takes the same noise"
VARIANCE = "variance: within modes, over the teacher's."


class Judge(NamedTuple):
    """What every student of one data set and seed is measured by: the same labels, and the same noise."""

    reference: Reference
    samplers: dict[int, Callable]  # steps -> params -> samples [n, 2]

    def samples(self, params) -> dict[int, np.ndarray]:
        """{steps: samples [n, 2]} of a student."""
        return {steps: np.asarray(sampler(params)) for steps, sampler in self.samplers.items()}


def make_judge(run: Experiment, network: Network, reference: Reference | None = None) -> Judge:
    """The judge of the students of a run, by the exact teacher of its mixture if no other reference is given."""
    reference = exact_reference(run) if reference is None else reference
    labels, ids = reference.labels, np.arange(len(reference.labels))

    def sampler(steps):
        sample = student_sampler(network.F, run.sampling, steps)
        return lambda params: sample(params, _key(run), ids, {"label": labels}, (2,))

    return Judge(reference, {k: sampler(k) for k in STEPS if k <= len(run.sampling.mid_times)})


def exact_reference(run) -> Reference:
    """The exact teacher of a run on a mixture, for the noise of its samples; labels have their shares of the data."""
    modes = mixture.standardise(run.data)
    count = run.sampling.report_samples or SAMPLES
    labels = mixture.sample(modes, np.random.default_rng(run.seed), count)[1]
    noise = samplers.unit_noise(jax.random.fold_in(_key(run), 0), np.arange(count), (2,))  # student_sampler's first
    return make_reference(modes, run.teacher_guidance, np.asarray(noise), labels, run.sampling.sigma_max, run.seed)


def _key(run):
    return jax.random.fold_in(jax.random.key(run.seed), 3)


def floor(reference: Reference) -> dict[str, float]:
    """What the exact teacher scores with other noise, or data with other data: how far from perfect so few samples
    look. It has no map error."""
    values = evaluate(reference.independent, dataclasses.replace(reference, independent=reference.target))
    return {name: value for name, value in values.items() if name != "map_error"}


def picture(reference: Reference, samples) -> np.ndarray:
    """Samples [n, 2] in the colours of their classes, over the true density of a mixture: [SIZE, SIZE, 3]."""
    modes = reference.mixture
    if modes is None:
        size = SIZE if len(samples) > 2000 else SIZE // 3  # a report enlarges small pictures: dots that can be seen
        return scatter(samples, reference.labels, size=size, reach=1.1 * np.abs(reference.target).max())
    return scatter(samples, reference.labels, size=SIZE, density=lambda x: np.exp(mixture.log_density(modes, x)))


def write_scatter_report(trained) -> str:
    """Writes report/ (index.html, report.png, report.json) of a pipeline.Trained on points; returns the table."""
    run, dataset = trained.run, trained.dataset
    count = run.sampling.report_samples or SAMPLES
    if isinstance(run.data, mixture.MixtureConfig):
        reference, name, target, other = exact_reference(run), "a mixture", "exact teacher", FLOOR
        note = f"{MAP_ERROR}.\n{VARIANCE}"
    else:
        reference = data_reference(labelled(dataset.train), labelled(dataset.test), count, run.seed)
        name, target, other = data_name(run.data), "training data", "training data"
        note = "Distances to held-out data, class by class."
    judge, n = make_judge(run, trained.program.network, reference), len(reference.labels)
    samples = {f"student, {in_steps(k)}": sample for k, sample in judge.samples(trained.student).items()}
    panels = {target: reference.target} | samples
    plots = curves.of_training(trained.folder, None if run.exact_teacher else trained.teacher_folder)
    return write_report(
        trained.folder / "report",
        panels={title: picture(reference, sample)[None] for title, sample in panels.items()},
        curves=plots,
        rows={other: floor(reference)} | {row: evaluate(sample, reference) for row, sample in samples.items()},
        title=f"{run.rcm.name} on {name}",
        footer=f"Seed {run.seed}. {n} samples, guidance {run.teacher_guidance:g}. {note}{curves.note(plots)}",
        columns=1,
        metadata={"seed": run.seed, "samples": n},
        previews=previews_of(trained.folder),
        config=to_mapping(run),
    )


def write_comparison(folder: pathlib.Path, results: dict[str, list[dict]], pictures: dict, curves: dict) -> str:
    """Writes index.html, report.png and report.json: a row for each method and number of steps; returns the table.

    results: {row: [metrics of each seed]}; pictures: {method: [SIZE, SIZE, 3] for each of STEPS}; curves as
    write_report takes them.
    """
    rows = {
        name: {metric: float(np.mean([values[metric] for values in seeds])) for metric in seeds[0]}
        for name, seeds in results.items()
    }
    return write_report(
        folder,
        panels={name: np.stack(images) for name, images in pictures.items()},
        curves=curves,
        rows=rows,
        title="Methods on a mixture",
        footer=f"Means over {len(next(iter(results.values())))} seeds, pictures and curves of the first. {SAMPLES} "
        f"samples of each. {MAP_ERROR} (more than one step adds new noise).\n{VARIANCE} "
        "Curves over updates of the student.",
        columns=1,
        row_labels=[in_steps(steps) for steps in STEPS],
        metadata={"seeds": results},
    )

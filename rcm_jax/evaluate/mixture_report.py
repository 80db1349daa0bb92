"""Reports on mixtures: samples over the true density, and their distance from the exact teacher."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import matplotlib.colors
import numpy as np

from rcm_jax.data import mixture
from rcm_jax.evaluate.mixture import Reference, evaluate, make_reference
from rcm_jax.evaluate.report import SERIES, write_report
from rcm_jax.method import samplers
from rcm_jax.run.experiment import Experiment, Network, student_sampler
from rcm_jax.train.metrics import read_metrics

SAMPLES = 6000
FLOOR = "exact teacher, other noise"
STEPS = (1, 2, 4)  # of the student
SIZE, REACH = 368, 2.4  # of a picture: pixels, standard deviations of the data from the middle to the edge


class Judge(NamedTuple):
    """What every student of one mixture and seed is measured by: the same labels, and the same noise."""

    reference: Reference
    samplers: dict[int, Callable]  # steps -> params -> samples [n, 2]

    def samples(self, params) -> dict[int, np.ndarray]:
        """{steps: samples [n, 2]} of a student."""
        return {steps: np.asarray(sampler(params)) for steps, sampler in self.samplers.items()}


def make_judge(run: Experiment, network: Network) -> Judge:
    """The judge of the students of a run; labels have the shares that they have in the data."""
    modes = mixture.standardise(run.data)
    labels = mixture.sample(modes, np.random.default_rng(run.seed), SAMPLES)[1]
    key, ids = jax.random.fold_in(jax.random.key(run.seed), 3), np.arange(SAMPLES)
    noise = samplers.unit_noise(jax.random.fold_in(key, 0), ids, (2,))  # student_sampler's first
    reference = make_reference(modes, run.rcm.guidance, np.asarray(noise), labels, run.sampling.sigma_max, run.seed)

    def sampler(steps):
        sample = student_sampler(network.F, run.sampling, steps)
        return lambda params: sample(params, key, ids, {"label": labels}, (2,))

    return Judge(reference, {k: sampler(k) for k in STEPS if k <= len(run.sampling.mid_times)})


def floor(reference: Reference) -> dict[str, float]:
    """What the exact teacher scores with other noise: how far from perfect so few samples look. It has no map error."""
    values = evaluate(reference.independent, dataclasses.replace(reference, independent=reference.target))
    return {name: value for name, value in values.items() if name != "map_error"}


def picture(reference: Reference, samples) -> np.ndarray:
    """Samples [n, 2] in the colours of their classes over the true density: [SIZE, SIZE, 3] in [0, 1]."""
    line = np.linspace(-REACH, REACH, SIZE)
    grid = np.stack(np.meshgrid(line, -line), axis=-1).reshape(-1, 2)
    density = np.exp(mixture.log_density(reference.mixture, grid)).reshape(SIZE, SIZE, 1)
    image = 1 - 0.35 * (density / density.max()) ** 0.25 * np.array([1.0, 0.9, 0.8])
    column, row = np.round((samples * [1, -1] / REACH + 1) / 2 * (SIZE - 1)).astype(int).T
    inside = (np.minimum(column, row) >= 0) & (np.maximum(column, row) < SIZE)
    colors = np.array([matplotlib.colors.to_rgb(SERIES[label % len(SERIES)]) for label in reference.labels])
    image[row[inside], column[inside]] = colors[inside]
    return image


def write_mixture_report(trained) -> str:
    """Writes report/ (report.png, report.json) of a pipeline.Trained on a mixture; returns the table."""
    run = trained.run
    judge = make_judge(run, trained.network)
    samples = judge.samples(trained.state.ema)
    names = {steps: f"student, {steps} step{'s' * (steps > 1)}" for steps in samples}
    panels = {"exact teacher": picture(judge.reference, judge.reference.target)}
    panels |= {names[steps]: picture(judge.reference, points) for steps, points in samples.items()}
    rows = {FLOOR: floor(judge.reference)}
    rows |= {names[steps]: evaluate(points, judge.reference) for steps, points in samples.items()}
    metrics = read_metrics(trained.folder)

    def series(name):
        return np.array([(row["step"], row[name]) for row in metrics if row.get(name) is not None]).reshape(-1, 2)

    curves = {
        "student losses": {name: series(f"{name.lower()}/loss") for name in ("sCM", "dCM", "DMD")},
        "fake score loss": {"critic": series("critic/loss")},
        "norms": {"tangent": series("scm/tangent_norm"), "student gradient": series("student/grad_norm")},
    }
    curves = {title: {k: v for k, v in plot.items() if len(v)} for title, plot in curves.items()}
    return write_report(
        trained.folder / "report",
        panels={name: image[None] for name, image in panels.items()},
        curves={title: plot for title, plot in curves.items() if plot},
        rows=rows,
        title=f"{run.rcm.name} on a mixture",
        footer=f"Seed {run.seed}. {SAMPLES} samples, guidance {run.rcm.guidance:g}. map error: root mean square "
        "distance to where the exact ODE takes the same noise.\nvariance: within modes, over the teacher's.",
        columns=1,
        metadata={"seed": run.seed, "samples": SAMPLES},
    )


def write_comparison(folder: pathlib.Path, results: dict[str, list[dict]], pictures: dict, curves: dict) -> str:
    """Writes comparison.png and comparison.json: a row for each method and number of steps; returns the table.

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
        "samples of each. map error: root mean square distance to where the exact ODE takes the same noise (more than "
        "one step adds new noise).\nvariance: within modes, over the teacher's. Curves over updates of the student.",
        columns=1,
        row_labels=[f"{steps} step{'s' * (steps > 1)}" for steps in STEPS],
        metadata={"seeds": results},
    )

"""Curves of the metrics of workdirs: those of a report, and what rcm_jax.train.stability watches."""

import math
from collections.abc import Mapping

import numpy as np

from rcm_jax.media.picture import GREY, INK, SERIES, figure
from rcm_jax.train.metrics import read_metrics
from rcm_jax.train.stability import BUCKETS, PROBED

RESIDUALS = "residuals"
OF_RESIDUALS = (
    "A consistency loss in continuous time is the square of a tangent of limited length: it need not fall. The "
    "residual should: it is 0 for a student that is consistent along the whole trajectory."
)
NORMS = {"tangent": "scm/tangent_norm", "student gradient": "student/grad_norm"}  # in a report: {label: metric}
TIMES = [f"t{k}" for k in range(BUCKETS)]
# What is watched: {title: ({label: metric}, logarithmic?)}
PANELS = {
    "‖g‖, the tangent, by time": ({time: f"scm/tangent_norm/{time}" for time in TIMES}, True),
    "residual: rms of c·df/dt, by time": ({time: f"scm/residual/{time}" for time in TIMES}, True),
    "jvp against a difference": ({f"t = {t}": f"probe/jvp_error/t={t}" for t in PROBED}, True),
    "gradient norms": ({"student": "student/grad_norm", "fake score": "critic/grad_norm"}, True),
    "DMD: weight w": ({"w": "dmd/weight"}, False),
    "shares not finite": (
        {"samples": "scm/nonfinite", "updates": "student/skipped", "fake score's": "critic/skipped"},
        False,
    ),
}
COLORS = (*SERIES, INK)
COLUMNS = 3


def of_training(student, teacher=None) -> dict[str, dict[str, np.ndarray]]:
    """{title: {label: [k, 2]}} for write_report: every metric NAME/loss and NAME/residual of a student's workdir, and
    its NORMS.

    The critic's loss has axes of its own, and so have those of the workdir where the teacher was pretrained, if any.
    """
    rows = read_metrics(student)
    losses = _every(rows, "loss")
    plots = {
        "teacher loss": _every(read_metrics(teacher), "loss") if teacher else {},
        "student losses": {name: points for name, points in losses.items() if name != "critic"},
        RESIDUALS: _every(rows, "residual"),
        "fake score loss": {name: points for name, points in losses.items() if name == "critic"},
        "norms": _series(rows, NORMS),
    }
    return {title: plot for title, plot in plots.items() if plot}


def note(plots) -> str:
    """What to read beside the plots of `of_training`: a line of its own, or nothing."""
    return f"\n{OF_RESIDUALS}" if RESIDUALS in plots else ""


def _every(rows: list[dict], kind: str) -> dict[str, np.ndarray]:
    """{NAME: [k, 2]} of every metric NAME/kind, in the order in which they come."""
    names = dict.fromkeys(name for row in rows for name in row if name.endswith(f"/{kind}") and name.count("/") == 1)
    return _series(rows, {name.removesuffix(f"/{kind}"): name for name in names})


def _series(rows: list[dict], metrics: Mapping[str, str]) -> dict[str, np.ndarray]:
    """{label: (step, value) pairs [k, 2]} of {label: metric}, without those that have no value."""
    series = {
        label: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for label, key in metrics.items()
    }
    return {label: np.array(points, float) for label, points in series.items() if points}


def draw(runs: Mapping[str, list[dict]]):
    """A figure of rows of metrics, {name: rows as read_metrics gives them}; a metric that a run lacks is left out."""
    lines = len(PANELS) // COLUMNS  # of a run
    page = figure(4 * COLUMNS, 2.6 * lines * len(runs), dpi=100, layout="constrained")
    axes = page.subplots(lines * len(runs), COLUMNS, squeeze=False).reshape(len(runs), len(PANELS))
    for row, (name, metrics) in zip(axes, runs.items(), strict=True):
        for axis, (title, (series, logarithmic)) in zip(row, PANELS.items(), strict=True):
            _plot(axis, metrics, series, logarithmic)
            axis.set_title(title, fontsize=9, color=INK)
        row[0].set_ylabel(name, fontsize=11, color=INK)
    return page


def _plot(axis, rows, metrics, logarithmic) -> None:
    found = _series(rows, metrics)
    for color, label in zip(COLORS, metrics, strict=False):
        if label in found:
            axis.plot(*found[label].T, color=color, label=label, linewidth=1)
    if logarithmic:
        axis.set_yscale("log")
        low, high = axis.get_ylim()  # two decades at least: what is level looks level
        middle, half = math.sqrt(low * high), max(math.sqrt(high / low), 10)
        axis.set_ylim(middle / half, middle * half)
    else:
        axis.set_ylim(bottom=0)
    axis.tick_params(which="both", labelsize=7, colors=GREY)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(fontsize=7, frameon=False, ncols=math.ceil(len(axis.lines) / 2))

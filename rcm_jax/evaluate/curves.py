"""Draws what rcm_jax.train.stability watches, from the metrics of one or several workdirs, two lines of panels each.

python -m rcm_jax.evaluate.curves digits=runs/digits mixture=runs/mixture --out=curves.png
"""

import argparse
import math
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rcm_jax.evaluate.report import GREY, INK, SERIES
from rcm_jax.train.metrics import read_metrics
from rcm_jax.train.stability import BUCKETS, PROBED
from rcm_jax.util.files import write_whole

TIMES = [f"t{k}" for k in range(BUCKETS)]
# Panels: {title: ({label: metric}, logarithmic?)}
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


def draw(runs: dict[str, list[dict]]) -> Figure:
    """A figure of rows of metrics, {name: rows as read_metrics gives them}; a metric that a run lacks is left out."""
    lines = len(PANELS) // COLUMNS  # of a run
    figure = Figure(figsize=(4 * COLUMNS, 2.6 * lines * len(runs)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines * len(runs), COLUMNS, squeeze=False).reshape(len(runs), len(PANELS))
    for row, (name, metrics) in zip(axes, runs.items(), strict=True):
        for axis, (title, (series, logarithmic)) in zip(row, PANELS.items(), strict=True):
            _plot(axis, metrics, series, logarithmic)
            axis.set_title(title, fontsize=9, color=INK)
        row[0].set_ylabel(name, fontsize=11, color=INK)
    return figure


def _plot(axis, metrics, series, logarithmic) -> None:
    for color, (label, key) in zip(COLORS, series.items(), strict=False):
        points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="a PNG file")
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        name, _, folder = run.partition("=")
        runs[name] = read_metrics(folder)
        if not runs[name]:
            parser.error(f"{run}: there is no metrics.jsonl in {folder or name}; write NAME=WORKDIR")
    figure = draw(runs)
    write_whole(args.out, lambda path: figure.savefig(path, format="png"))


if __name__ == "__main__":
    main()

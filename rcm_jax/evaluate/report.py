"""The end of a run: samples side by side, training curves, metrics. index.html, report.png and report.json."""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rcm_jax.evaluate.page import plain, write_page
from rcm_jax.evaluate.series import logarithmic, pairs, smooth
from rcm_jax.evaluate.table import COLUMNS, Rows, cells, format_table
from rcm_jax.media.picture import GREY, INK, RULE, SERIES, figure, grid, save_figure
from rcm_jax.util.files import as_path, write_text

if TYPE_CHECKING:  # only what draws imports matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE, TEXT, SMALL = 16, 9, 8  # points
DPI = 120
# Pixels of the page.
WIDTH, MARGIN, GAP = 1640, 72, 24
PANEL_WIDTH, SEPARATOR = 380, 3  # a panel's width at most, the white between its images
PLOT_HEIGHT, PLOT_LEFT = 196, 52  # PLOT_LEFT: room for the numbers on the vertical axis
ROW = 32
PANELS, PLOTS = 6, 5  # on one line, at most


def write_report(
    folder,
    *,
    panels: Mapping[str, np.ndarray],
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]] | np.ndarray]],
    rows: Rows,
    title: str,
    footer: str = "",
    columns: int = 8,
    row_labels: Sequence[str] = (),
    metadata: Mapping | None = None,
    previews: Sequence[tuple[int, str | os.PathLike]] = (),
    config: Mapping | None = None,
) -> str:
    """Writes index.html, report.png and report.json in a folder; returns the table as text for the console.

    panels: title → images [n, h, w, c] in [0, 1], laid out in order with `columns` images to a row; give all panels
    the same order (say one class per row, and the same noise at the same place) and they can be compared place by
    place. Strokes read best as ink on paper: pass 1 − images. row_labels name the rows of the first panel.
    curves: title → label → (step, value) pairs; values that are not finite leave gaps. rows: name → metrics, as `table`
    returns them. metadata is added to the JSON file as it is, but NaN and infinity become null there. previews and
    config are shown on the page alone (see `write_page`).

    Raises:
      ValueError: a panel or a series of another shape; another number of row labels than of rows.
    """
    curves = {name: {label: pairs(label, of) for label, of in plot.items()} for name, plot in curves.items()}
    grids = {name: _panel(images, columns, len(_lines(panels, PANELS)[0])) for name, images in panels.items()}
    image_rows = -(-len(next(iter(panels.values()))) // columns) if panels else 0
    if row_labels and len(row_labels) != image_rows:
        raise ValueError(f"{len(row_labels)} row labels for the first panel's {image_rows} rows; give one for each row")
    folder = as_path(folder)
    save_figure(folder / "report.png", _draw(grids, curves, rows, title, footer, row_labels))
    lines = f"\nRows of the pictures: {', '.join(row_labels)}." if row_labels else ""
    write_page(
        folder / "index.html", title=title, note=footer + lines, pictures=grids, previews=previews, curves=curves,
        rows=rows, config=config,
    )  # fmt: skip
    shapes = {name: list(np.shape(images)) for name, images in panels.items()}
    write_record(folder, title=title, footer=footer, rows=rows, panels=shapes, curves=curves, metadata=metadata or {})
    return format_table(rows)


def write_record(folder, **record) -> None:
    """Writes folder/report.json; NaN and infinity become null."""
    text = json.dumps(plain(record), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(as_path(folder) / "report.json", text + "\n")


def data_name(config) -> str:
    """What a report calls data: their config's name, or its class: "digits" of a DigitsConfig."""
    return getattr(config, "name", "") or type(config).__name__.removesuffix("Config").lower()


def in_steps(steps: int) -> str:
    """Their number in words: 1 step, 2 steps."""
    return "1 step" if steps == 1 else f"{steps} steps"


@dataclasses.dataclass
class _Page:
    """A figure measured in pixels from its top left corner; `top` is where the next band begins."""

    figure: "Figure"
    height: int
    top: float = 0

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        bottom = self.height - top - height
        return self.figure.add_axes((left / WIDTH, bottom / self.height, width / WIDTH, height / self.height))

    def text(self, x: float, y: float, text: str, size: float = TEXT, color: str = INK, **style) -> None:
        self.figure.text(x / WIDTH, 1 - y / self.height, text, fontsize=size, color=color, **style)

    def rule(self, y: float, color: str = RULE) -> None:
        from matplotlib.lines import Line2D

        ends = (MARGIN / WIDTH, 1 - MARGIN / WIDTH)
        self.figure.add_artist(Line2D(ends, (1 - y / self.height,) * 2, color=color, linewidth=0.8))


def _draw(grids, curves, rows: Rows, title: str, footer: str, row_labels: Sequence[str]) -> "Figure":
    """The bands from top to bottom: title, panels, curves, table, footer."""
    panel_lines, plot_lines = _lines(grids, PANELS), _lines(curves, PLOTS)
    panel_heights = [max(_size(grids[name], len(line))[1] for name in line) for line in panel_lines]
    head, plot_band = 104, PLOT_HEIGHT + 108
    table = 58 + ROW * len(rows) if rows else 0
    foot = 36 + (16 * (1 + footer.count("\n")) + 20 if footer else 0)
    height = round(head + sum(panel_heights) + 58 * len(panel_lines) + plot_band * len(plot_lines) + table + foot)
    page = _Page(figure(WIDTH / DPI, height / DPI, dpi=DPI), height, top=head)
    page.text(MARGIN, 62, title, TITLE, weight="bold")
    for i, (line, panel_height) in enumerate(zip(panel_lines, panel_heights, strict=True)):
        _draw_panels(page, {name: grids[name] for name in line}, row_labels if i == 0 else ())
        page.top += panel_height + 58
    for line in plot_lines:
        _draw_plots(page, {name: curves[name] for name in line}, len(plot_lines[0]))
        page.top += plot_band
    if rows:
        _draw_table(page, rows)
        page.top += table
    page.text(MARGIN, page.top + 20, footer, SMALL, GREY, va="top", linespacing=1.5)
    return page.figure


def _draw_panels(page: _Page, grids: Mapping[str, np.ndarray], row_labels: Sequence[str]) -> None:
    """One line of pictures with their titles above, spread over the page; row labels in the left margin."""
    sizes = [_size(image, len(grids)) for image in grids.values()]
    spare = WIDTH - 2 * MARGIN - sum(width for width, _ in sizes)
    gap = min(2 * GAP, spare // max(1, len(grids) - 1))
    left, top = MARGIN, page.top + 14
    for (name, image), (width, height) in zip(grids.items(), sizes, strict=True):
        page.text(left, page.top, name, weight="bold")
        axes = page.axes(left, top, width, height)
        axes.set_axis_off()
        axes.imshow(image.repeat(3 // image.shape[-1], axis=-1), interpolation="antialiased", aspect="auto")
        for row, label in enumerate(row_labels if left == MARGIN else ()):
            y = top + (row + 0.5) * height / len(row_labels)
            page.text(left - 12, y, label, SMALL, GREY, ha="right", va="center_baseline")
        left += width + gap


def _draw_plots(page: _Page, curves: Mapping[str, dict[str, np.ndarray]], places: int) -> None:
    """One line of axes, each of 1/places of the page: raw values faint, their moving average on top."""
    cell = (WIDTH - 2 * MARGIN + GAP) / places
    for place, (name, series) in enumerate(curves.items()):
        left = MARGIN + place * cell
        page.text(left, page.top + 8, name, weight="bold")
        axes = page.axes(left + PLOT_LEFT, page.top + 44, cell - GAP - PLOT_LEFT, PLOT_HEIGHT)
        means = {label: smooth(points) for label, points in series.items()}
        for color, (label, points) in zip(itertools.cycle(SERIES), series.items(), strict=False):
            axes.plot(*points.T, color=color, linewidth=0.8, alpha=0.25)
            marker = "o" if len(points) == 1 else None
            axes.plot(points[:, 0], means[label], color=color, linewidth=1.5, marker=marker, label=label)
        _style(axes, np.concatenate(list(means.values())))
        if len(series) > 1:
            spaces = dict(borderaxespad=0.2, borderpad=0, handlelength=1.2, columnspacing=1.2)
            style = dict(ncols=len(series), frameon=False, fontsize=SMALL, labelcolor=GREY)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), **spaces, **style)


def _style(axes: "Axes", values: np.ndarray) -> None:
    """Quiet axes: horizontal grid lines, few numbers; a logarithmic scale where it serves."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if logarithmic(values):
        values = values[np.isfinite(values)]
        axes.set_yscale("log")
        wide = values.max() > 300 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=6 if wide else 12))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("step", fontsize=SMALL, color=GREY, loc="right", labelpad=2)
    axes.tick_params(which="both", length=0, labelsize=SMALL, labelcolor=GREY)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.margins(x=0.01)


def _draw_table(page: _Page, rows: Rows) -> None:
    """Names on the left, numbers on the right of equal columns; an arrow tells which way is better."""
    names, headings, values = cells(rows)
    first = 40 + 9 * max(map(len, rows))
    column = min(150.0, (WIDTH - 2 * MARGIN - first) / max(1, len(names)))
    rights = [MARGIN + first + column * (i + 1) for i in range(len(names))]
    arrows = {"low": " ↓", "high": " ↑", None: ""}
    for right, name, (upper, lower) in zip(rights, names, headings, strict=True):
        page.text(right, page.top + 18, upper, SMALL, GREY, ha="right")
        better = COLUMNS[name][-1] if name in COLUMNS else None
        page.text(right, page.top + 36, lower + arrows[better], SMALL, GREY, ha="right")
    top = page.top + 50
    page.rule(top, GREY)
    for name, numbers in zip(rows, values, strict=True):
        page.text(MARGIN, top + ROW / 2, name, va="center_baseline")
        for right, number in zip(rights, numbers, strict=True):
            page.text(right, top + ROW / 2, number, ha="right", va="center_baseline")
        top += ROW
        page.rule(top)


def _panel(images, columns: int, panels: int) -> np.ndarray:
    """The images as one picture on white; tiny ones enlarged by the integer that fills a panel's share of the line."""
    lines = (columns - 1) * SEPARATOR
    upscale = max(1, (_share(panels) - lines) // (columns * np.shape(images)[2])) if np.ndim(images) == 4 else 1
    picture = grid(images, columns, upscale=upscale, separator=SEPARATOR, background=1.0)
    return picture[SEPARATOR:-SEPARATOR, SEPARATOR:-SEPARATOR]


def _size(image: np.ndarray, panels: int) -> tuple[int, int]:
    """(width, height) on the page: the grid's own pixels, or smaller to fit."""
    height, width = image.shape[:2]
    scale = min(1, _share(panels) / width)
    return round(width * scale), round(height * scale)


def _share(panels: int) -> int:
    """Width of one of the panels that share a line."""
    return min(PANEL_WIDTH, (WIDTH - 2 * MARGIN - (panels - 1) * GAP) // panels)


def _lines(items: Mapping, most: int) -> list[list]:
    """Names of items in lines of nearly equal length, at most `most` to a line."""
    names, lines = list(items), -(-len(items) // most)
    length = -(-len(names) // max(1, lines))
    return [names[i : i + length] for i in range(0, len(names), max(1, length))]

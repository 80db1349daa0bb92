"""A page to look at: pictures, videos, curves and a table in one HTML file that needs nothing beside it.

How it looks and what it does is in page.html; here it gets its content.
"""

import base64
import html
import importlib.resources
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rcm_jax.evaluate import series
from rcm_jax.evaluate.table import COLUMNS, Rows, cells
from rcm_jax.media.picture import GREY, INK, PAPER, RULE, SERIES, encode_png
from rcm_jax.util.config import flatten
from rcm_jax.util.files import as_path, size, write_text

TYPES = {".png": "image/png", ".mp4": "video/mp4"}
MOST, BYTES = 60, 20e6  # of previews on one page; in base64 they are a third larger


def write_page(
    path: str | os.PathLike,
    *,
    title: str,
    note: str = "",
    pictures: Mapping[str, np.ndarray] = {},
    videos: Mapping[str, Mapping[str, str | os.PathLike | np.ndarray]] = {},
    previews: Sequence[tuple[int, str | os.PathLike]] = (),
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]] | np.ndarray]] = {},
    rows: Mapping[str, Mapping[str, float | None]] = {},
    config: Mapping | None = None,
) -> None:
    """Writes one HTML file with everything in it, whole or not at all; what is empty has no section.

    Args:
      title, note: the heading, and what is small below it.
      pictures: title → uint8 [H, W, 1 or 3], side by side.
      videos: row (a prompt) → column ("teacher, 50 steps") → path of an .mp4 or .png, or a picture as above;
        all are played in step.
      previews: (training step, path of a .png or .mp4), rising, behind a slider.
      curves: title → label → (step, value) pairs; values that are not finite leave gaps.
      rows: the table, name → metrics, as `table` returns them.
      config: nested mapping, as util.config.to_mapping makes it.

    Raises:
      ValueError: a picture or a series of another shape, a file of another suffix.
      OSError: a file that is not there, a place that cannot be written to.
    """
    content = {
        "title": title,
        "note": note,
        "pictures": [{"title": name, "media": _inline(".png", encode_png(image))} for name, image in pictures.items()],
        "videos": _grid(videos),
        "previews": [{"step": int(step), "media": _file(file)} for step, file in previews],
        "plots": [_plot(name, plot) for name, plot in curves.items()],
        "table": _table(rows),
        "config": [[key.removeprefix("config."), _text(leaf)] for key, leaf in flatten(config or {}).items()],
    }
    colors = dict(ink=INK, grey=GREY, rule=RULE, paper=PAPER) | {f"s{i}": color for i, color in enumerate(SERIES)}
    parts = {
        "title": html.escape(title),
        "colors": " ".join(f"--{name}: {color};" for name, color in colors.items()),
        # "<" would end the script early, or begin a comment in it
        "content": json.dumps(plain(content), allow_nan=False).replace("<", "\\u003c"),
    }
    template = importlib.resources.files("rcm_jax.evaluate").joinpath("page.html").read_text(encoding="utf-8")
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


def previews_of(folder: str | os.PathLike) -> list[tuple[int, Any]]:
    """(step, path) of what was drawn while a workdir was trained, samples/STEP.mp4 or STEP.png, by rising steps.

    Of many at most MOST, and together at most BYTES, evenly spread with the last one among them: a page should open.
    """
    found = {}
    for suffix in TYPES:  # a video rather than a picture of the same step
        files = (as_path(folder) / "samples").glob(f"*{suffix}")
        found |= {int(file.stem): file for file in files if file.stem.isdecimal()}
    every = sorted(found.items())
    for count in range(min(MOST, len(every)), 0, -1):
        places = np.linspace(len(every) - 1, 0, count).round().astype(int)[::-1]
        chosen = [every[place] for place in places]
        if count == 1 or sum(size(path) for _, path in chosen) <= BYTES:
            return chosen
    return []


def plain(value):
    """value as JSON can hold it: arrays as lists, numpy scalars as numbers, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _inline(suffix: str, content: bytes) -> dict:
    return {"type": TYPES[suffix], "data": base64.b64encode(content).decode()}


def _file(path) -> dict:
    if isinstance(path, np.ndarray):
        return _inline(".png", encode_png(path))
    place = as_path(path)
    if place.suffix not in TYPES:
        raise ValueError(f"{place} cannot be shown on a page: it must end in {' or '.join(TYPES)}")
    return _inline(place.suffix, place.read_bytes())


def _grid(videos) -> dict:
    """The columns in the order in which rows name them, and rows with a cell for each: media, or None."""
    columns = list(dict.fromkeys(column for row in videos.values() for column in row))
    rows = [
        {"title": name, "cells": [_file(row[column]) if column in row else None for column in columns]}
        for name, row in videos.items()
    ]
    return {"columns": columns, "rows": rows}


def _plot(title: str, plot) -> dict:
    """Lines of [step, value, moving average], and whether their scale is logarithmic at first."""
    points = {label: series.pairs(label, line) for label, line in plot.items()}
    means = {label: series.smooth(line) for label, line in points.items()}
    lines = [
        {"label": label, "points": [[float(f"{x:.7g}") for x in point] for point in np.c_[line, means[label]]]}
        for label, line in points.items()
    ]
    log = bool(means) and series.logarithmic(np.concatenate(list(means.values())))
    return {"title": title, "log": log, "lines": lines}


def _table(rows: Rows) -> dict:
    """Columns with their headings and the side that is better; cells of [number or None, its text]."""
    names, headings, texts = cells(rows)
    columns = [
        {"heading": heading, "better": COLUMNS[name][-1] if name in COLUMNS else None}
        for name, heading in zip(names, headings, strict=True)
    ]
    lines = []
    for (title, metrics), row in zip(rows.items(), texts, strict=True):
        values = [metrics.get(name) for name in names]
        known = [value is not None and math.isfinite(value) for value in values]
        shown = [[value, text] if there else [None, "–"] for value, text, there in zip(values, row, known, strict=True)]
        lines.append({"title": title, "cells": shown})
    return {"columns": columns, "rows": lines}


def _text(leaf) -> str:
    """A value of a config as it is typed: text without quotes, the rest as in config.json."""
    return leaf if isinstance(leaf, str) and leaf else json.dumps(leaf, ensure_ascii=False)

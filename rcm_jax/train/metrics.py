"""Training metrics: a JSON line for each step logged and for each preview with numbers, events of TensorBoard, and
Weights & Biases if asked for.

What is learned and how fast are two files: the first is the same whenever and wherever a run is made again.
"""

import json
import math
import pathlib
import secrets
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from tensorboardX import SummaryWriter

from rcm_jax.util.extras import require
from rcm_jax.util.files import as_path, listed, local, read_json, write_text
from rcm_jax.util.mirror import Mirror


class Shown(NamedTuple):
    """What a preview shows, under the names of curves and panels."""

    pictures: Mapping[str, np.ndarray] = {}  # uint8 [H, W, 1 or 3]; of a video, some of its frames
    videos: Mapping[str, pathlib.Path] = {}  # files that Weights & Biases play; TensorBoard has their pictures
    values: Mapping[str, float] = {}


class MetricsWriter:
    """Writes metrics.jsonl, pace.jsonl and TensorBoard events to a workdir.

    Opened at the step of a resume, it forgets later lines. A workdir in an object store has them from a `Mirror`.
    The workdir's config.json, if it is there, goes to TensorBoard as a text and to Weights & Biases as the config.
    project, name: of the run in Weights & Biases; "": the workdir's name.
    """

    def __init__(self, workdir, step: int, wandb: bool = False, project: str = "rcm_jax", name: str = ""):
        there = as_path(workdir)
        self.mirror = Mirror(there, ("metrics.jsonl", "pace.jsonl", "wandb_id"))
        workdir = self.mirror.here
        self.paths = [workdir / "metrics.jsonl", workdir / "pace.jsonl"]
        for path in self.paths:
            kept = [row for row in _rows(path, aside=True) if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        config = read_json(made) if (made := there / "config.json").exists() else {}
        self.events.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", step)
        self.wandb = None
        if wandb:
            self.library = library = wandb_library()
            note = workdir / "wandb_id"  # a resumed run goes on in the same curves
            if not note.exists():
                write_text(note, secrets.token_hex(4))
            again = dict(id=note.read_text(), resume="allow", allow_val_change=True)
            self.wandb = library.init(
                project=project, name=name or there.name, config=config, dir=str(workdir), **again
            )

    def write(self, step: int, values: Mapping[str, float], pace: Mapping[str, float] | None = None) -> None:
        """A line of {name: number} in each file; a number that is not finite is written as null."""
        for path, numbers in zip(self.paths, (values, pace), strict=True):
            if numbers is None:
                continue
            row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        numbers = {**values, **(pace or {})}
        for name, value in numbers.items():
            self.events.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def show(self, step: int, shown: Shown | None) -> None:
        """The pictures, videos and values of a preview; None: there is nothing."""
        if shown is None:
            return
        if shown.values:
            self.write(step, shown.values)
        for name, picture in shown.pictures.items():
            self.events.add_image(name, picture, step, dataformats="HWC")
        if self.wandb:
            pictures = {name: self.library.Image(picture) for name, picture in shown.pictures.items()}
            videos = {name: self.library.Video(str(local(path)), format="mp4") for name, path in shown.videos.items()}
            self.wandb.log(pictures | videos, step=step)

    def close(self) -> None:
        """Flush and close."""
        self.events.close()
        if self.wandb:
            self.wandb.finish()
        self.mirror.close()


def read_metrics(workdir) -> list[dict]:
    """The rows of metrics.jsonl; a last line cut off by a crash is left out."""
    return _rows(as_path(workdir) / "metrics.jsonl")


def read_pace(workdir) -> list[dict]:
    """The rows of pace.jsonl: how fast it went (rcm_jax.train.pace)."""
    return _rows(as_path(workdir) / "pace.jsonl")


def _rows(path, aside: bool = False) -> list[dict]:
    """The rows that can be read, of all but a last line that is cut off; aside: the others are kept in PATH.bad."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.endswith(b"\n"):
            bad.append((number, line))
    if bad:
        logging.warning("%s, line %s cannot be read: left out", path, listed(number for number, _ in bad))
    if bad and aside:
        with path.with_name(f"{path.name}.bad").open("ab") as file:
            file.writelines(line for _, line in bad)
    return rows


def _row(line: bytes) -> dict | None:
    """What a whole line says; None if it is none, or says something else than numbers at a step."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


class Window:
    """The metrics since the last line of the log. They stay on the device until read: logging does not stall a step."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(self, metrics: Mapping) -> None:
        """Remembers the scalars of a step (phases have different names), or of something that is no step.

        Pairs are sum and count. "watched" is not for the log (rcm_jax.train.guard).
        """
        self.rows.append({name: value for name, value in metrics.items() if name != "watched"})

    def read(self) -> dict[str, float]:
        """The mean of every name over the steps that had it; the window then begins anew. A name whose pairs count 0
        has no value."""
        rows, self.rows = jax.device_get(self.rows), []
        totals = {}
        for row in rows:
            for name, value in row.items():
                total, count = value if isinstance(value, tuple) else (value, 1)
                before = totals.get(name, (0.0, 0))
                totals[name] = before[0] + float(total), before[1] + int(count)
        return {name: total / count for name, (total, count) in sorted(totals.items()) if count}


def wandb_library():
    """The package; ValueError that says how to install it."""
    return require("wandb", "wandb", "config.train.wandb")

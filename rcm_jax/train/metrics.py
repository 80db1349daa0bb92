"""Training metrics: one JSON line a step logged, TensorBoard events, and Weights & Biases if asked for."""

import json
import math
import pathlib
import secrets

import jax
from tensorboardX import SummaryWriter

from rcm_jax.util.extras import require
from rcm_jax.util.files import write_text


class MetricsWriter:
    """Writes workdir/metrics.jsonl and TensorBoard events. Opened at the step of a resume, it forgets later lines."""

    def __init__(self, workdir, step: int, wandb: bool = False):
        workdir = pathlib.Path(workdir)
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self.wandb = None
        if wandb:
            library = require("wandb", "wandb", "config.train.wandb")
            note = workdir / "wandb_id"  # a resumed run goes on in the same curves
            if not note.exists():
                write_text(note, secrets.token_hex(4))
            self.wandb = library.init(
                project="rcm_jax", name=workdir.name, id=note.read_text(), resume="allow", dir=str(workdir)
            )

    def write(self, step: int, values: dict) -> None:
        """One line of {name: number}; a number that is not finite is written as null."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close."""
        self.events.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(workdir) -> list[dict]:
    """The rows of metrics.jsonl; a last line cut off by a crash is left out."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Mean:
    """Running means of scalar metrics that stay on the device until read: logging does not stall the step."""

    def __init__(self):
        self.rows, self.steps = [], 0

    def add(self, metrics: dict, steps: int = 1) -> None:
        """Remember one step's scalars (phases have different names), or something that is no step, with steps = 0."""
        self.rows.append(metrics)
        self.steps += steps

    def read(self) -> dict[str, float]:
        """Mean of every name over the steps that had it, then forget. Pairs are sum and count; a count of 0 is none."""
        rows, self.rows, self.steps = jax.device_get(self.rows), [], 0
        totals = {}
        for row in rows:
            for name, value in row.items():
                total, count = value if isinstance(value, tuple) else (value, 1)
                before = totals.get(name, (0.0, 0))
                totals[name] = before[0] + float(total), before[1] + int(count)
        return {name: total / count for name, (total, count) in sorted(totals.items()) if count}

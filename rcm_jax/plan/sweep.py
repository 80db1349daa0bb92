"""Many plans in one go: meshes and remat policies, ranked by the time of a cycle; one config on more and more chips."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rcm_jax.media.picture import GREY, INK, RULE, SERIES, figure, save_figure
from rcm_jax.models import token_grid
from rcm_jax.parallel.chips import Chip
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.plan import report, topologies
from rcm_jax.plan.program import Programs, prepare
from rcm_jax.plan.report import Planned
from rcm_jax.run.experiment import Experiment
from rcm_jax.util.config import revise

REMATS = ("full", "save_attention", "save_products", "none")  # of rcm_jax.models.layers, by what they keep
HEAD = "| chips | mesh data × fsdp × seq | batch | student | critic | student receives | critic receives | a cycle |"


class Row(NamedTuple):
    """One candidate: its mesh, remat, batch, programs, seconds of a cycle (inf: it does not fit) and what there is to
    say."""

    mesh: tuple[int, int, int]
    remat: str
    batch: int
    steps: dict[str, Planned]
    seconds: float
    words: str


def meshes(chips: int, batch: int, heads: int, tokens: int) -> list[tuple[int, int, int]]:
    """All (data, fsdp, seq) that multiply to chips, whose data × fsdp divides batch, and whose seq heads and tokens."""
    found = []
    for seq in divisors(chips):
        if heads % seq == 0 and tokens % seq == 0 and batch % (chips // seq) == 0:
            found += [(data, chips // seq // data, seq) for data in divisors(chips // seq)]
    return found


def divisors(n: int) -> list[int]:
    """All of them, rising."""
    return [d for d in range(1, n + 1) if n % d == 0]


def tokens_of(programs: Programs) -> int:
    """Tokens of one sample, in patches of the network."""
    if (grid := token_grid(programs.run.model, programs.shape)) is None:
        raise ValueError("a network without tokens is not worth a sweep")
    return math.prod(grid)


def sweep(run: Experiment, chip: Chip, devices, remats=REMATS) -> Iterator[Row]:
    """Plans every candidate, student and critic. Not compiled: meshes whose state alone is too large, and remat
    policies that keep more than one that does not fit."""
    one = prepare(revise(run, {"mesh": MeshConfig(1, 1, 1)}), chip, devices[:1])
    for mesh in meshes(len(devices), run.train.batch_size, run.model.num_heads, tokens_of(one)):
        for remat in sorted(remats, key=REMATS.index):
            row = plan_row(revise(run, {"mesh": MeshConfig(*mesh), "model.remat": remat}), chip, devices)
            yield row
            if math.isinf(row.seconds):
                break


def scale(run: Experiment, names: Iterable[str], batch_per_chip: int | None = None) -> Iterator[tuple[str, Row]]:
    """(topology, its row) of the same config on topologies by name; with a batch of so many for each chip, if given."""
    for topology in names:
        chip, devices = topologies.devices(topology)
        batch = batch_per_chip * len(devices) if batch_per_chip else run.train.batch_size
        yield topology, plan_row(revise(run, {"train.batch_size": batch}), chip, devices)


def plan_row(run: Experiment, chip: Chip, devices) -> Row:
    """Student and critic; a config that is refused, or does not fit, is a row that says so."""
    batch, remat = run.train.batch_size, getattr(run.model, "remat", "none")
    try:
        programs = prepare(run, chip, devices)
    except ValueError as error:
        return Row(dataclasses.astuple(run.mesh), remat, batch, {}, math.inf, f"refused: {error}")
    steps, row = {}, Row(tuple(programs.mesh.shape.values()), remat, batch, {}, math.inf, "")
    if programs.held > chip.hbm:
        words = f"does not fit: state and teacher alone hold {report.gib(programs.held)} of {report.gib(chip.hbm)}"
        return row._replace(words=words)
    for name, planned in report.plan(programs, chip, [n for n in ("student", "critic") if n in programs.lower]):
        steps[name] = planned
        if not report.fits(planned, chip):
            words = planned.refusal or f"does not fit: {report.gib(planned.need.peak)} of {report.gib(chip.hbm)}"
            return row._replace(steps=steps, words=f"{name} {words}")
    time, iterations = report.cycle_seconds(programs, steps)
    peak = max(planned.need.peak for planned in steps.values())
    words = f"{time:.4g} s a cycle, {iterations * batch / time:.3g}/s, peak {report.gib(peak)}"
    bound = steps["student"].need.estimate.bound
    return row._replace(steps=steps, seconds=time, words=f"{words}, student by {bound}")


def table(rows: list[Row]) -> str:
    """Fastest first, those that do not fit last."""
    ranked = sorted(rows, key=lambda row: row.seconds)
    lines = ["data  fsdp   seq  remat           at least"]
    return "\n".join(lines + [f"{r.mesh[0]:4}  {r.mesh[1]:4}  {r.mesh[2]:4}  {r.remat:14}  {r.words}" for r in ranked])


def line(topology: str, row: Row) -> str:
    """A row under HEAD: memory, bytes received in a step (of one chip, as compiled) and seconds (at least)."""
    sizes, bytes_received = [], []
    for name in ("student", "critic"):
        need = row.steps[name].need if name in row.steps else None
        sizes.append(report.gib(need.peak) if need else "")
        bytes_received.append(report.gib(report.received(need.work)) if need else "")
    mesh = " × ".join(map(str, row.mesh))
    last = row.words if math.isinf(row.seconds) else f"{row.seconds:.4g} s"
    return "| " + " | ".join([topology, mesh, str(row.batch), *sizes, *bytes_received, last]) + " |"


def draw(rows: list[tuple[str, Row]], path) -> None:
    """The student step over the number of chips, a line for each kind: memory of a chip, and what it receives."""
    kinds = {}
    for topology, row in rows:
        if "student" in row.steps and (need := row.steps["student"].need):
            point = math.prod(row.mesh), need.peak / 2**30, report.received(need.work) / 2**30
            kinds.setdefault(topology.partition(":")[0], []).append(point)
    if not kinds:
        raise ValueError("there is nothing to draw: no student step of any topology could be compiled")
    page = figure(9, 3.2, dpi=120, layout="constrained")
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    counts = sorted({count for points in kinds.values() for count, _, _ in points})
    titles = {1: "memory of a chip, GiB", 2: "received by a chip, GiB"}
    for axes, (place, title) in zip(page.subplots(1, 2), titles.items(), strict=True):
        for color, (kind, points) in zip(itertools.cycle(SERIES), kinds.items(), strict=False):
            axes.plot([p[0] for p in points], [p[place] for p in points], color=color, marker="o", label=kind)
        axes.set(xscale="log", xlabel="chips", ylim=(0, 1.1 * max(p[place] for ps in kinds.values() for p in ps)))
        axes.set_title(f"student step: {title}", fontsize=10, color=INK, loc="left")
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(colors=GREY)
        axes.grid(axis="y", color=RULE)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left")
    save_figure(path, page)

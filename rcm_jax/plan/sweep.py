"""Which meshes and remat policies fit, ranked by the estimated time of a cycle."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rcm_jax.plan import report
from rcm_jax.plan.chips import Chip
from rcm_jax.plan.program import Programs, prepare

REMATS = ("full", "save_attention", "none")  # of rcm_jax.models.layers, by what they keep


class Row(NamedTuple):
    """One candidate: its mesh, remat, seconds of a cycle (inf: it does not fit) and what there is to say."""

    mesh: tuple[int, int, int]
    remat: str
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
    return [d for d in range(1, n + 1) if n % d == 0]


def tokens_of(programs: Programs) -> int:
    """Tokens of one sample, in patches of the network."""
    model = programs.run.model
    patch = getattr(model, "patch_size", None) or getattr(model, "patch", None)
    if patch is None:
        raise ValueError("a network without tokens is not worth a sweep")
    patch = patch if isinstance(patch, tuple) else (patch, patch)
    return math.prod(n // p for n, p in zip(programs.shape[-1 - len(patch) : -1], patch, strict=True))


def sweep(values: Mapping, chip: Chip, devices, remats=REMATS) -> Iterator[Row]:
    """Plans every candidate, student and critic. Not compiled: meshes whose state alone is too large, and remat
    policies that keep more than one that does not fit."""
    one = prepare({**values, "mesh": dict(data=1, fsdp=1, seq=1)}, chip, devices[:1])
    run = one.run
    for mesh in meshes(len(devices), run.train.batch_size, run.model.num_heads, tokens_of(one)):
        row = None
        for remat in sorted(remats, key=REMATS.index):
            row = _row(values, chip, devices, mesh, remat)
            yield row
            if math.isinf(row.seconds):
                break


def _row(values, chip, devices, mesh, remat) -> Row:
    values = {**values, "mesh": dict(zip(("data", "fsdp", "seq"), mesh, strict=True))}
    values["model"] = {**values["model"], "remat": remat}
    steps = {}
    try:
        programs = prepare(values, chip, devices)
    except ValueError as error:
        return Row(mesh, remat, math.inf, f"refused: {error}")
    if programs.held > chip.hbm:
        words = f"does not fit: state and teacher alone hold {report.gib(programs.held)} of {report.gib(chip.hbm)}"
        return Row(mesh, remat, math.inf, words)
    for name, planned in report.plan(programs, chip, [n for n in ("student", "critic") if n in programs.lower]):
        steps[name] = planned
        if not report.fits(planned, chip):
            words = planned.refusal or f"does not fit: {report.gib(planned.need.peak)} of {report.gib(chip.hbm)}"
            return Row(mesh, remat, math.inf, f"{name} {words}")
    time, iterations = report.cycle_seconds(programs, steps)
    rate = iterations * programs.run.train.batch_size / time
    peak = max(planned.need.peak for planned in steps.values())
    bound = steps["student"].need.estimate.bound
    return Row(mesh, remat, time, f"{time:.4g} s a cycle, {rate:.3g}/s, student by {bound}, peak {report.gib(peak)}")


def table(rows: list[Row]) -> str:
    """Fastest first, those that do not fit last."""
    ranked = sorted(rows, key=lambda row: row.seconds)
    lines = ["data  fsdp   seq  remat           at least"]
    return "\n".join(lines + [f"{r.mesh[0]:4}  {r.mesh[1]:4}  {r.mesh[2]:4}  {r.remat:14}  {r.words}" for r in ranked])

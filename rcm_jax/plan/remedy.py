"""What would make a run fit that does not: changes of its config, in an order of growing cost, until one does.

First each change alone: the attention kernels of the chip, the state split over all chips of data as well, the batch in
more parts, second moments in the memory of the hosts, blocks computed again. Then those together, in more parts, and
where a chip has no more than one sample at a time, with each sample over more chips. The hosts' memory comes last.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from rcm_jax.kernels.implementations import KERNELS  # pyright: ignore[reportMissingImports]
from rcm_jax.models import token_grid
from rcm_jax.parallel.chips import Chip
from rcm_jax.parallel.sharding import has_host_memory
from rcm_jax.plan import report
from rcm_jax.plan.program import Programs, prepare
from rcm_jax.plan.report import Planned, gib
from rcm_jax.run.experiment import Experiment
from rcm_jax.util.config import revise

Changes = dict[str, Any]  # {"train.accumulate": 4}
TRAINING = ("student", "critic")  # these take the batch in parts


class Attempt(NamedTuple):
    """A changed config (programs is None: it is refused), what was compiled of it, and what there is to say."""

    changes: Changes
    programs: Programs | None
    steps: dict[str, Planned]
    words: str
    fits: bool = False


def search(run: Experiment, programs: Programs, planned: dict[str, Planned], chip: Chip, devices) -> Iterator[Attempt]:
    """Tries changes of a run, whose plan does not fit, one after another; the first that fits is the last.

    Of each the programs that did not fit are compiled first, the others only if those do. Not compiled: what holds too
    much whatever runs, and what by those before it needs too much.
    """
    known, seen, usable = [(programs, planned)], [{}], {}
    heavy = [{}] if programs.held > chip.hbm else []  # too much is held whatever runs

    def tried(candidates):
        for changes in candidates:
            if changes in seen:
                continue
            seen.append(changes)
            attempt = _try(run, changes, known, chip, devices)
            yield attempt
            if attempt.programs:
                known.append((attempt.programs, attempt.steps))
                if attempt.programs.held > chip.hbm:
                    heavy.append(changes)
                    return  # in more parts it holds as much
            if attempt.fits:
                return

    for candidates in _alone(programs, chip):
        for attempt in tried(candidates):
            yield attempt
            if attempt.fits:
                return
            if attempt.programs and "train.accumulate" not in attempt.changes:
                usable |= attempt.changes
    late = {name: usable.pop(name) for name in ("train.offload",) if name in usable}
    for together in (usable, usable | late):
        for attempt in tried(_together(programs, together) if together not in heavy else ()):
            yield attempt
            if attempt.fits:
                return


def _alone(programs: Programs, chip: Chip) -> list[list[Changes]]:
    """Single changes that the run does not have yet; those of a list differ in size."""
    run, kernels, (data, fsdp, _) = programs.run, KERNELS.get(chip.platform), programs.mesh.shape.values()
    other = kernels and getattr(run.model, "attention", kernels) != kernels
    holding = [
        [] if data == 1 else [{"mesh.data": 1, "mesh.fsdp": data * fsdp}],  # parameters come from more chips
        [{"train.offload": True}] if has_host_memory(programs.mesh) and not run.train.offload else [],
    ]
    computing = [
        [{"model.attention": kernels}] if other else [],  # costs nothing
        [{"train.accumulate": parts} for parts in more_parts(run, data * fsdp)],  # parameters come for each part
        [{"model.remat": "full"}] if getattr(run.model, "remat", "full") != "full" else [],  # a third more work
    ]
    if programs.held > chip.hbm:
        return holding
    return [computing[0], holding[0], computing[1], holding[1], computing[2]]


def _together(programs: Programs, changes: Changes) -> Iterator[Changes]:
    """Those changes, then with the batch in more parts, then with each sample over more chips, one at a time."""
    run, (data, fsdp, seq) = programs.run, programs.mesh.shape.values()
    shards, tokens = data * fsdp, math.prod(token_grid(run.model, programs.shape) or [1])
    yield changes
    for parts in more_parts(run, shards):
        yield changes | {"train.accumulate": parts}
    for times in range(2, shards + 1):
        fits_network = tokens % (seq * times) == 0 and getattr(run.model, "num_heads", 1) % (seq * times) == 0
        if shards % times == 0 and fits_network and (parts := more_parts(run, shards // times)):
            mesh = {"mesh.data": 1, "mesh.fsdp": shards // times, "mesh.seq": seq * times}
            yield changes | mesh | {"train.accumulate": parts[-1]}


def more_parts(run: Experiment, shards: int) -> list[int]:
    """train.accumulate doubled as often as every shard has a sample in each part."""
    parts = []
    while run.train.batch_size % (shards * 2 * (parts or [run.train.accumulate])[-1]) == 0:
        parts.append(2 * (parts or [run.train.accumulate])[-1])
    return parts


def _try(run: Experiment, changes: Changes, known, chip: Chip, devices) -> Attempt:
    """One change, compiled as far as it fits; known: (programs, what was compiled of them), the run's own first."""
    try:
        programs = prepare(revise(run, changes), chip, devices)
    except ValueError as error:
        return Attempt(changes, None, {}, f"refused: {error}")
    if programs.held > chip.hbm:
        return Attempt(changes, programs, {}, f"not compiled: state and teacher alone hold {gib(programs.held)}")
    if (least := at_least(programs, known)) > chip.hbm:
        return Attempt(changes, programs, {}, f"not compiled: at least {gib(least)}, by what was compiled before")
    first = known[0][1]
    names = sorted(programs.lower, key=lambda name: name in first and report.fits(first[name], chip))
    steps = {}
    for name, planned in report.plan(programs, chip, names):
        steps[name] = planned
        if not report.fits(planned, chip):
            return Attempt(changes, programs, steps, f"{_sizes(steps)}: does not fit {gib(chip.hbm)}")
    return Attempt(changes, programs, steps, f"{_sizes(steps)}: fits {gib(chip.hbm)}", fits=True)


def at_least(programs: Programs, known) -> float:
    """Bytes of a chip: what is held, and the temporaries of the known programs that keep as much of every block, in
    proportion to the part of the batch that is computed at a time: smaller parts save no more than that."""
    least = float(programs.held)
    for others, steps in known:
        if _kept(others) == _kept(programs):
            ratio = min(1.0, others.run.train.accumulate / programs.run.train.accumulate)
            for name, planned in steps.items():
                if planned.need:
                    share = ratio if name in TRAINING else 1.0
                    least = max(least, programs.held + share * planned.need.temporaries)
    return least


def _kept(programs: Programs) -> tuple:
    return programs.attention, getattr(programs.run.model, "remat", "none"), programs.mesh.shape["data"]


def flags(run: Experiment, changes: Changes) -> str:
    """As the command line has them."""
    before = {f"mesh.{axis}": size for axis, size in vars(run.mesh).items()}
    return " ".join(f"--config.{key}={value}" for key, value in changes.items() if before.get(key) != value)


def line(run: Experiment, attempt: Attempt) -> str:
    """An attempt, for reading while the next is made."""
    return f"  {flags(run, attempt.changes)}: {attempt.words}"


def verdict(run: Experiment, programs: Programs, attempts: list[Attempt], chip: Chip) -> str:
    """What fits, in words; or how many chips there must be at least."""
    last = attempts[-1] if attempts else None
    if last and last.fits and last.programs:
        peak = max(planned.need.peak for planned in last.steps.values())
        note = report.beyond_default(peak, chip)
        words = f"\nwith {flags(run, last.changes)} it needs {gib(peak)} of {gib(chip.hbm)}{note and '; '}{note}"
        return words + report.summary(last.programs, last.steps, chip)
    plans = [programs, *(attempt.programs for attempt in attempts if attempt.programs)]
    whole = min(each.held * each.mesh.size for each in plans)
    return (
        f"\nno change that was tried makes it fit. State and teacher take {gib(whole)} at least: "
        f"{math.ceil(whole / chip.hbm)} chips of {gib(chip.hbm)}, and what a step computes comes on top"
    )


def _sizes(steps: dict[str, Planned]) -> str:
    return ", ".join(f"{name} {gib(p.need.peak) if p.need else p.refusal}" for name, p in steps.items())

"""What compiled programs say, in words: facts of the compiler, and estimates from the table of chips."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from rcm_jax.parallel import hlo
from rcm_jax.parallel.chips import Chip
from rcm_jax.plan import topologies
from rcm_jax.plan.program import Compiled, Programs, compile_program


class Estimate(NamedTuple):
    """Seconds that one run of a program takes at least, by each of the three that may bound it."""

    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return self._fields[self.index(self.step)]


class Need(NamedTuple):
    """What one chip needs for a program. Bytes as the compiler says; work as its program says."""

    arguments: int
    outputs: int  # that do not take the place of an argument
    temporaries: int
    code: int
    once: float  # FLOP by XLA's own analysis, which counts what is in a loop once; 0: it has none on this platform
    work: hlo.Work
    estimate: Estimate

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


class Planned(NamedTuple):
    """A program, compiled: its need, or why there is none."""

    need: Any  # Need, or None
    seconds: float
    refusal: str


def plan(programs: Programs, chip: Chip, names=None) -> Iterator[tuple[str, Planned]]:
    """Compiles the programs (of these names), one at a time."""
    for name in names or programs.lower:
        compiled = compile_program(programs.lower[name], chip)
        yield name, Planned(need(compiled, programs, chip), compiled.seconds, compiled.refusal)


def need(compiled: Compiled, programs: Programs, chip: Chip) -> Need | None:
    """Reads a compiled program."""
    if compiled.executable is None:
        return None
    memory: Any = compiled.executable.memory_analysis()
    work = hlo.read(compiled.executable.as_text() or "", programs.run.rcm.open_trips)
    traffic = memory.argument_size_in_bytes + 2 * work.written
    network = sum(c.times * topologies.seconds(chip, c) for c in work.collectives)
    estimate = Estimate(work.flops / chip.flops, traffic / chip.bandwidth, network)
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = memory.argument_size_in_bytes, outputs, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
    once = (compiled.executable.cost_analysis() or {}).get("flops", 0.0)
    return Need(*sizes, once, work, estimate)


def fits(planned: Planned, chip: Chip) -> bool:
    """Whether it compiled, and needs no more memory than a chip has."""
    return planned.need is not None and planned.need.peak <= chip.hbm


def cycle_seconds(programs: Programs, steps: dict[str, Planned]) -> tuple[float, int]:
    """(seconds, iterations) of one student step and the critic steps that go with it, at least."""
    dmd = programs.run.rcm.dmd
    critics = dmd.update_freq - 1 if dmd else 0
    times = {name: planned.need.estimate.step for name, planned in steps.items()}
    return times["student"] + critics * times.get("critic", 0), 1 + critics


def head(programs: Programs, chip: Chip, topology: str) -> str:
    """What is planned."""
    run, mesh = programs.run, programs.mesh
    shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], run.train.accumulate
    divided = f", in {parts} parts one after another" if parts > 1 else ""
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    parts = [
        f"{topology}: {mesh.size} chips of {gib(chip.hbm)}, mesh {axes}; state and teacher hold {gib(programs.held)}",
        f"batch {run.train.batch_size}: {run.train.batch_size // shards} for each of data × fsdp = {shards}, "
        f"which seq = {mesh.shape['seq']} chips share{divided}; remat {getattr(run.model, 'remat', 'none')!r}",
        programs.note,
        f"jax {jax.__version__}; every figure is of one chip and one run of the program",
    ]
    return "\n".join(parts)


def describe(name: str, planned: Planned, chip: Chip) -> str:
    """One program."""
    if planned.need is None:
        return f"\n{name}: {planned.refusal} (the compiler, after {planned.seconds:.0f} s)"
    n, e = planned.need, planned.need.estimate
    once = f" (by XLA's own count, what is in a loop once: {n.once / 1e12:.4g})" if n.once else ""
    verdict = "fits" if fits(planned, chip) else "does not fit"
    lines = [
        f"\n{name}: {verdict}: {gib(n.peak)} of {gib(chip.hbm)} (compiled in {planned.seconds:.0f} s)",
        f"  compiled  arguments {gib(n.arguments)}, new outputs {gib(n.outputs)}, temporaries {gib(n.temporaries)}, "
        f"program {gib(n.code)}",
        f"  compiled  products {n.work.flops / 1e12:.4g} TFLOP, loops multiplied{once}",
        *(f"  compiled  {line}" for line in _collectives(n.work)),
        *(f"  compiled  large: {gib(b.size)} {b.shape} {_short(b.source)}" for b in n.work.largest),
        f"  estimate  {e.step:.4g} s at least, by {e.bound}: compute {e.compute:.3g} s, memory {e.memory:.3g} s (every "
        f"buffer written and read once, {n.work.written / 1e9:.4g} GB), network {e.network:.3g} s",
    ]
    if n.work.open_loops:
        lines.append(f"  note      {n.work.open_loops} loops have no trip count in the program: a rollout, at its mean")
    for kernel, times in n.work.kernels.items():
        lines.append(f"  note      {kernel} runs {times:g} times and says nothing of its cost: FLOP and time lack it")
    if note := beyond_default(n.peak, chip):
        lines.append(f"  note      {note}")
    return "\n".join(lines)


def beyond_default(peak: float, chip: Chip) -> str:
    """Of more memory of a GPU than JAX takes by itself: what to do; else nothing."""
    if chip.platform != "gpu" or peak <= 0.75 * chip.hbm:
        return ""
    return f"that is {peak / chip.hbm:.0%}: JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says more"


def received(work: hlo.Work) -> float:
    """Bytes that a chip gets from others in one run."""
    return sum(c.times * topologies.moved(c) for c in work.collectives)


def _collectives(work: hlo.Work) -> Iterator[str]:
    """By kind."""
    for kind in hlo.COLLECTIVES:
        if those := [c for c in work.collectives if c.kind == kind]:
            total = sum(c.times * topologies.moved(c) for c in those)
            groups = "/".join(map(str, sorted({len(c.group) for c in those})))
            runs = sum(c.times for c in those)
            yield f"{kind}: {total / 1e9:.4g} GB received in {runs:g} runs, groups of {groups}"


def summary(programs: Programs, steps: dict[str, Planned], chip: Chip) -> str:
    """The whole: whether it fits, and how fast it may be."""
    if programs.held > chip.hbm:
        return f"\ndoes not fit: state and teacher alone hold {gib(programs.held)} of {gib(chip.hbm)}"
    if failing := [name for name, planned in steps.items() if not fits(planned, chip)]:
        return f"\ndoes not fit: {', '.join(failing)}"
    time, iterations = cycle_seconds(programs, steps)
    rate = iterations * programs.run.train.batch_size / time
    days = programs.run.train.steps / iterations * time / 86400
    what = "videos" if len(programs.shape) == 4 and programs.shape[0] > 1 else "images"
    return (
        f"\nfits. Estimate, at least: {time:.4g} s for a cycle of {iterations} iterations (1 student), at most "
        f"{rate:.3g} {what}/s of training; {programs.run.train.steps} iterations in {days:.3g} days"
    )


def gib(size: float) -> str:
    """Bytes for reading."""
    power = min(int(math.log(max(size, 1), 1024)), 3)
    return f"{size / 1024**power:.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _short(source: str) -> str:
    """The end of a JAX name stack, which says most."""
    return "/".join(source.split("/")[-3:])

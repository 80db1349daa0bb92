"""How fast a run goes: seconds of a step, products against the peak of the chip, what time was lost to, memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from absl import logging

from rcm_jax.parallel import hlo
from rcm_jax.parallel.chips import peak_flops
from rcm_jax.util.files import as_path
from rcm_jax.util.mirror import Mirror

LOSSES = ("compilation", "data", "checkpoints", "previews")  # what a run waits for besides its steps
ENOUGH = 50  # steps of a phase after which the rest can be foretold


class Pace:
    """The clock of a training loop and its compiled programs, of which it knows how much they compute.

    Devices work while the host goes ahead; so only that time counts as lost in which they have nothing to do.
    """

    def __init__(
        self, programs: Mapping[str, Callable], open_trips: float, step: int, begins: Callable = lambda what: None
    ):
        """programs: jitted, by name; open_trips: mean trips of their loops of unknown length; step: the first;
        begins(what): is told what begins."""
        self.programs, self.open_trips, self.begins = programs, open_trips, begins
        self.compiled: dict[tuple, jax.stages.Compiled] = {}  # by name, and shapes of the batch
        self.flops: dict[tuple, float] = {}  # of one run on one chip; nan if it cannot be read
        self.lost: dict[str, float] = dict.fromkeys(LOSSES, 0.0)  # seconds since the loop began
        self.first, self.began = step, time.perf_counter()
        self.phase_began = step, self.began
        self._open_window(step)

    def _open_window(self, step: int) -> None:
        self.window = step, time.perf_counter(), dict(self.lost)
        self.work = 0.0  # products in the window, of one chip

    def run(self, name: str, step: int, *args):
        """What a program makes of its arguments, of which the last is a batch; it is compiled when it, or that shape of
        a batch, is first needed, as `step` is about to run."""
        self.begins(f"iteration {step} ({name})")
        key = name, *map(np.shape, jax.tree.leaves(args[-1]))
        if key not in self.compiled:
            with self._losing("compilation"):
                self.compiled[key] = self.programs[name].lower(*args).compile()
                self.flops[key] = products(self.compiled[key], self.open_trips)
            self.phase_began = step, time.perf_counter()
        self.work += self.flops[key]
        return self.compiled[key](*args)

    @contextlib.contextmanager
    def waiting(self, state) -> Iterator[None]:
        """Inside, the next batch is fetched. That is lost if the step before has ended by then; then all of it counts,
        though the devices may have worked for some of it."""
        self.begins("reading a batch")
        started = time.perf_counter()
        yield
        if state.step.is_ready():
            self.lost["data"] += time.perf_counter() - started

    @contextlib.contextmanager
    def stopped(self, what: str, state) -> Iterator[None]:
        """Inside, one of LOSSES keeps training from going on, once the state is computed."""
        jax.block_until_ready(state)
        self.begins(what)
        with self._losing(what):
            yield

    @contextlib.contextmanager
    def _losing(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.lost[what] += time.perf_counter() - started

    def read(self, step: int) -> dict[str, float]:
        """The window that ends with `step`, all of which is computed; the next one begins.

        Seconds of a step, without what was lost; products of the compiled program, recomputed ones included, per second
        and chip; seconds lost to each of LOSSES; goodput, the share of the time since the loop began that was not lost.
        """
        first, started, before = self.window
        now = time.perf_counter()
        lost = {what: total - before[what] for what, total in self.lost.items()}
        busy = max(now - started - sum(lost.values()), 1e-9)
        values = {
            "pace/step_seconds": busy / max(step - first, 1),
            "pace/steps_per_second": (step - first) / busy,
            "pace/goodput": 1 - sum(self.lost.values()) / max(now - self.began, 1e-9),
        }
        if self.work == self.work:
            values["pace/tflops_per_chip"] = rate = self.work / busy / 1e12
            if peak := peak_flops(jax.local_devices()[0].device_kind):
                values["pace/share_of_peak"] = rate * 1e12 / peak
        self._open_window(step)
        return values | {f"pace/{what}_seconds": seconds for what, seconds in lost.items()} | memory()

    def left(self, step: int, steps: int) -> float:
        """Seconds until `steps`, if all go as those until now, but for what was compiled."""
        each = (time.perf_counter() - self.began - self.lost["compilation"]) / max(step - self.first, 1)
        return each * (steps - step)

    def forecast(self, step: int, steps: int, state) -> str:
        """How long the rest takes, ENOUGH steps after the first of a new phase; else ""."""
        first, started = self.phase_began
        if step - first != ENOUGH or step >= steps:
            return ""
        jax.block_until_ready(state)
        each = (time.perf_counter() - started) / ENOUGH
        return f"{steps - step:,} more steps take about {span(each * (steps - step))} at this rate ({each:.3g} s each)"


def products(compiled: jax.stages.Compiled, open_trips: float) -> float:
    """Floating point operations of the products of a program on one chip, as the plan counts them; nan, and a word, if
    the program is written in a way that is not known."""
    try:
        return hlo.read(compiled.as_text() or "", open_trips).flops
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:  # a spelling of XLA to come
        logging.warning("products are not counted: the compiled program cannot be read (%r)", error)
        return float("nan")


def memory() -> dict[str, float]:
    """GiB at the peak: of the fullest device of this process, where it says so, and of the process itself."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    host = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    return ({"memory/device_peak_gib": max(peaks) / 2**30} if peaks else {}) | host


def span(seconds: float) -> str:
    """A time in words: 12 s, 3 min, 4 h 05 min, 2 days 3 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


@contextlib.contextmanager
def traced(workdir, steps: tuple[int, int] | None) -> Iterator[Callable]:
    """(step, state) -> None, to be called when `step` steps are done: between the two given it writes a trace for
    xprof or TensorBoard, to workdir/profile. None: never."""
    running: list[Mirror] = []

    def stop(mirror: Mirror) -> None:
        jax.profiler.stop_trace()
        mirror.close()

    def at(step: int, state) -> None:
        if steps and step in steps:
            jax.block_until_ready(state)
            if step == steps[0]:
                running.append(Mirror(as_path(workdir) / "profile"))
                jax.profiler.start_trace(str(running[0].here))
            elif running:
                stop(running.pop())

    try:
        yield at
    finally:
        if running:
            stop(running.pop())


def check_trace(steps: tuple[int, int] | None, first: int, last: int) -> None:
    """ValueError unless the steps to trace are among those that a run still has before it, after `first` to `last`."""
    if steps and not first <= steps[0] < steps[1] <= last:
        raise ValueError(
            f"--profile={steps[0]}:{steps[1]} must be START:END with {first} <= START < END <= {last}: the steps that "
            "this run has before it"
        )

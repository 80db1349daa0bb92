"""What a run says on the console: a bar on a terminal, else a line now and then. The first process speaks for all."""

import math
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from rcm_jax.parallel import distributed
from rcm_jax.train.pace import span

OFTEN = 20  # seconds between two lines, at least, where there is no terminal


def say(text: str) -> None:
    """A line on stderr, above a bar if there is one."""
    if distributed.first():
        tqdm.write(text, file=sys.stderr)


class Console:
    """The progress of one training."""

    def __init__(self, label: str, step: int, steps: int):
        self.label, self.steps = label, steps
        self.terminal = sys.stderr.isatty()
        self.told = -math.inf
        silent = not (self.terminal and distributed.first())
        self.bar = tqdm(
            total=steps, initial=step, desc=label, unit="step", dynamic_ncols=True, mininterval=0.5, disable=silent
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def show(
        self, step: int, values: Mapping[str, float], pace: Mapping[str, float], left: float, last: bool = False
    ) -> None:
        """A window of the log that ended with `step`, `left` seconds before the end; the last one is always told."""
        told = ", ".join([*losses(values), *pace_words(pace)])
        if self.terminal:
            self.bar.set_postfix_str(told, refresh=False)
        elif last or time.monotonic() - self.told >= OFTEN:
            self.told = time.monotonic()
            say(f"{self.label} {step:,}/{self.steps:,}: {told}{'' if step == self.steps else f', {span(left)} left'}")


def losses(values: Mapping[str, float]) -> list[str]:
    """The losses, and what was not finite or skipped, if anything was."""
    shown = [(name.removesuffix("/loss"), value) for name, value in values.items() if name.endswith("/loss")]
    bad = [(name, value) for name, value in values.items() if name.endswith(("nonfinite", "skipped")) and value != 0]
    return [f"{name} {value:.3g}" for name, value in shown + bad]


def pace_words(pace: Mapping[str, float]) -> list[str]:
    """How fast it goes, in few words."""
    words = [f"{pace['pace/step_seconds']:.3g} s a step"]
    if "pace/tflops_per_chip" in pace:
        share = f" ({pace['pace/share_of_peak']:.0%})" if "pace/share_of_peak" in pace else ""
        rate = pace["pace/tflops_per_chip"]
        words.append((f"{rate:.3g} TFLOP/s" if rate >= 1 else f"{1000 * rate:.3g} GFLOP/s") + f" a chip{share}")
    if "memory/device_peak_gib" in pace:
        words.append(f"{pace['memory/device_peak_gib']:.1f} GiB")
    return [*words, f"goodput {pace['pace/goodput']:.0%}"]

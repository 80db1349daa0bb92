"""When training should stop by itself: updates of one network that are skipped, one after another, and why."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

SHOWN = 20  # examples that a message names
LAG = 2  # steps that the devices may be behind: what is older can be read without waiting


class Diverged(Exception):
    """Nothing is learned any more: so many updates of a network were skipped, one after another."""


class Row(NamedTuple):
    """What a step said: its metrics, and where the examples of its batch stand in the data."""

    step: int
    metrics: Mapping[str, Any]
    index: np.ndarray


class Guard:
    """Follows the updates of every network, step by step.

    A skipped update leaves its network as it was (Learner.update): a bad batch costs itself. When `limit` of them
    follow each other, or all that a run had were skipped, nothing is learned any more.
    """

    def __init__(self, limit: int, groups: Mapping[str, Sequence[str]] | None = None):
        """groups: the names of the parameters' groups of every network, in the order of `finite_groups`."""
        self.limit, self.groups = limit, groups or {}
        self.pending: list[Row] = []
        self.in_a_row: dict[str, int] = {}  # by network
        self.first: dict[str, Row] = {}  # the first of the updates that are skipped now
        self.applied: set[str] = set()  # networks that learned something
        self.examples: set[int] = set()  # that were not finite since the last update of all networks that was applied

    @property
    def healthy(self) -> bool:
        """Whether the last update of every network was applied, as far as was looked."""
        return not any(self.in_a_row.values())

    def add(self, step: int, metrics: Mapping[str, Any], index: np.ndarray) -> None:
        """Remembers a step, and looks at those before it every `limit` steps, but for those that may be running."""
        self.pending.append(Row(step, metrics, index))
        if step % self.limit == 0:
            self._look(self.pending[:-LAG])
            del self.pending[:-LAG]

    def check(self, last: bool = False) -> None:
        """Looks at all steps until now; Diverged that says what to do, of the last also where no update was applied."""
        rows, self.pending = self.pending, []
        self._look(rows)
        for name, count in self.in_a_row.items():
            if last and count and name not in self.applied:
                raise Diverged(self._diagnosis(name, rows[-1].step if rows else 0))

    def _look(self, rows: list[Row]) -> None:
        rows = jax.device_get(rows)
        bad = set()
        for row in rows:
            watched = row.metrics["watched"]
            flags = np.asarray(watched["examples"])
            # A network that fails for all samples tells of itself, not of them.
            blamed = np.asarray(watched["data"]) if flags.all() else flags
            bad |= set(np.asarray(row.index)[blamed > 0].tolist())
            self.examples |= bad
            for name, value in row.metrics.items():
                if name.endswith("/skipped"):
                    self._follow(name.removesuffix("/skipped"), bool(value), row)
            if self.healthy and not flags.any():
                self.examples.clear()
        if bad:
            logging.warning("step %d: %s", rows[-1].step, named(sorted(bad)))

    def _follow(self, network: str, skipped: bool, row: Row) -> None:
        if not skipped:
            self.applied.add(network)
            self.in_a_row[network] = 0
            return
        self.in_a_row[network] = self.in_a_row.get(network, 0) + 1
        if self.in_a_row[network] == 1:
            self.first[network] = row
        if self.in_a_row[network] >= self.limit:
            raise Diverged(self._diagnosis(network, row.step))

    def _diagnosis(self, network: str, step: int) -> str:
        """One line: how many, where it began, which losses, times, parameters and examples, and the way out."""
        first, count = self.first[network], self.in_a_row[network]
        cause = named(sorted(self.examples)) if self.examples else "no example of the data is to blame by itself"
        parts = [
            f"diverged: {count} updates of the {network} in a row were skipped up to step {step}, for their gradients "
            f"were not finite or of no sample; train.most_skips allows {self.limit - 1}",
            f"it began at step {first.step}: {losses(first)}; {self._parameters(network, first)}",
            cause,
            "--from_step=N goes on from a checkpoint before that, with another learning rate or schedule, "
            "train.leave_out or train.most_skips; metrics.jsonl shows what went before",
        ]
        return ". ".join(part[0].upper() + part[1:] if i else part for i, part in enumerate(parts))

    def _parameters(self, network: str, row: Row) -> str:
        finite = np.asarray(row.metrics["watched"]["gradients"].get(network, ()))
        names = self.groups.get(network, [str(i) for i in range(len(finite))])
        broken = [name for name, fine in zip(names, finite, strict=True) if not fine]
        if not broken:
            return "its gradients were finite"
        which = "all" if len(broken) == len(finite) else f"{len(broken)} of {len(finite)}"
        shown = ", ".join(broken[:5]) + (" …" if len(broken) > 5 else "")
        return f"the gradients of {which} groups of parameters were not finite ({shown})"


def losses(row: Row) -> str:
    """Which losses were not finite, for how many samples, and in which quarters of the times."""
    said = []
    for name, share in row.metrics.items():
        loss, _, metric = name.rpartition("/")
        if metric != "nonfinite" or not share > 0:
            continue
        quarters = [(k, row.metrics.get(f"{name}/t{k}", (0, 0))) for k in range(4)]
        where = [f"{k + 1}" for k, (bad, _) in quarters if bad > 0]
        times = f", at times in quarter{'s' * (len(where) > 1)} {', '.join(where)} of 4" if where else ""
        said.append(f"{loss} left out {round(float(share) * len(row.index))} of {len(row.index)} samples{times}")
    return "; ".join(said) or "every loss was finite"


def named(examples: list[int]) -> str:
    """Which examples were not finite, and how to leave them out."""
    shown, one = ", ".join(map(str, examples[:SHOWN])), len(examples) == 1
    more = f" and {len(examples) - SHOWN} more" if len(examples) > SHOWN else ""
    subject = f"example{'' if one else 's'} {shown}{more} of the data {'is' if one else 'are'}"
    flag = f'--config.train.leave_out="({shown},)"'
    return f"{subject} not finite, or make{'s' if one else ''} a loss so; {flag} leaves {'it' if one else 'them'} out"

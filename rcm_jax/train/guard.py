"""When training should stop by itself: updates of one network that are skipped, one after another."""

from absl import logging

from rcm_jax.train.metrics import Reading

SHOWN = 20  # examples that a message names


class Guard:
    """Follows the updates of every network over all windows of the log.

    A skipped update leaves its network as it was (Learner.update): a bad batch costs itself. When `limit` of them
    follow each other, nothing is learned any more.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_a_row: dict[str, int] = {}  # by network
        self.examples: set[int] = set()  # that were not finite since the last update of all networks that was applied

    def follow(self, step: int, reading: Reading) -> None:
        """Takes in a window that ends at a step; ValueError that says what to do when a network reaches the limit."""
        most = dict(self.in_a_row)
        for name, skips in reading.skips.items():
            for skipped in skips:
                self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if skipped else 0
                most[name] = max(most.get(name, 0), self.in_a_row[name])
        self.examples |= set(reading.examples)
        dead = [name for name, count in most.items() if count >= self.limit]
        if dead:
            raise ValueError(self._diagnosis(dead[0], most[dead[0]], step))
        if reading.examples:
            logging.warning("step %d: %s", step, named(reading.examples))
        if not any(self.in_a_row.values()):
            self.examples.clear()

    def _diagnosis(self, network: str, count: int, step: int) -> str:
        cause = named(sorted(self.examples)) if self.examples else "no example of the data is to blame by itself"
        return (
            f"{count} updates of the {network} in a row were skipped up to step {step}, for their gradients were not "
            f"finite; train.most_skips allows {self.limit - 1}. {cause[0].upper()}{cause[1:]}. The last checkpoint is "
            "whole, and the same command goes on from it with another learning rate or schedule, train.leave_out or "
            "train.most_skips; metrics.jsonl shows what went before"
        )


def named(examples: list[int]) -> str:
    """Which examples were not finite, and how to leave them out."""
    shown, one = ", ".join(map(str, examples[:SHOWN])), len(examples) == 1
    more = f" and {len(examples) - SHOWN} more" if len(examples) > SHOWN else ""
    subject = f"example{'' if one else 's'} {shown}{more} of the data {'is' if one else 'are'}"
    flag = f'--config.train.leave_out="({shown},)"'
    return f"{subject} not finite, or make{'s' if one else ''} a loss so; {flag} leaves {'it' if one else 'them'} out"

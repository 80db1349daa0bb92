"""Builds a small set again and again in processes that are killed at random times, until one comes to its end.

python -m tests.build.killed FOLDER SEED KILLS: prints how many were killed in the middle of their work.
"""

import os
import random
import signal
import sys
import threading
import time

import numpy as np

from rcm_jax.build import engine
from rcm_jax.build.source import Item, Source
from rcm_jax.data import records

SHAPES = ((1, 2, 3, 4), (2, 2, 2, 4))
COUNT = 60
NOTHING = np.zeros((1, 1), np.float32)


def items(count: int = COUNT) -> list[Item]:
    """Of two shapes, mixed."""
    return [Item(f"item {i}", f"prompt {i // 2}", SHAPES[i % 3 == 1], {"seed": i}) for i in range(count)]


def make(some, prepared, texts):
    """x0 of which the seed is the mean, and noise by it."""
    assert prepared == [item.key for item in some]
    assert len({item.shape for item in some}) == 1
    noise = [np.random.default_rng(item.origin["seed"]).normal(size=item.shape) for item in some]
    return [{"x0": (x + item.origin["seed"]).astype(np.float32)} for x, item in zip(noise, some, strict=True)]


def source(count: int = COUNT, batch: int = 3, pause: float = 0.0, **changes) -> Source:
    """Of items in a moment, or in a pause each."""

    def prepare(item):
        time.sleep(pause)
        return item.key

    return Source(items(count), {"kind": "test"}, make, prepare, batch)._replace(**changes)


def texts(plan: engine.Plan):
    """An embedding of one number for every prompt."""
    return lambda shard: np.array([[[float(item.prompt.split()[1])]] for item in plan.items(shard)], np.float32)


def build(folder, source: Source, worker=0, workers=1, shard=8, uncond=NOTHING, **work) -> int | None:
    """As the script does it; how many examples there are when it is whole."""
    plan = engine.make_plan(folder, source, shard, {"round_trip": False})
    engine.claim(plan)
    if not plan.finished:
        (plan.folder / "uncond.safetensors").write_bytes(records.encode({"text": uncond}))
        job = engine.Work((lambda shard: None) if source.brings_text else texts(plan), lambda example: example, **work)
        engine.build(plan, plan.pending(worker, workers), job)
    return engine.close(plan)


def main(folder: str, seed: int, kills: int) -> None:
    """Forks: what is imported is imported once."""
    rng, killed = random.Random(seed), 0
    while True:
        after = rng.uniform(0, 0.12) if killed < kills else None
        if not (child := os.fork()):
            if after is not None:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            build(folder, source(pause=0.03))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
        killed += 1
    print(killed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

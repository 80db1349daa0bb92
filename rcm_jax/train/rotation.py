"""The checkpoints of a run while it trains: which one it goes on from, which of them stay, which are set aside.

A new checkpoint is read back and compared with its digests before any older one goes. One that is damaged is moved to
workdir/damaged/STEP; `go_back` moves those later than a step to workdir/set_aside. Neither is ever deleted.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from rcm_jax.parallel import distributed
from rcm_jax.train import checkpoint
from rcm_jax.train.checkpoint import CHECKPOINTS, DATA, SNAPSHOTS, Damaged
from rcm_jax.train.state import TrainState
from rcm_jax.util.files import absolute, store_of, stored

DAMAGED, SET_ASIDE = "damaged", "set_aside"  # folders of a workdir
GOING = ".going"  # the end of the name of a folder that is being deleted
MARK = "commit_success.txt"  # without it a checkpoint of a store does not count


class Rotation(contextlib.AbstractContextManager):
    """The checkpoints of one workdir, to be closed. In several processes all make the same calls.

    abstract: shapes, dtypes and shardings of the state. keep: how many of the newest healthy ones stay, counting those
    that were verified; keep_every: those at its multiples stay too (0: none). Of unhealthy ones the newest stays.
    """

    def __init__(self, workdir, abstract: TrainState, keep: int, keep_every: int = 0, asynchronous: bool = False):
        self.workdir, self.abstract, self.keep, self.keep_every = workdir, abstract, keep, keep_every
        distributed.by_first(lambda: _finish_deleting(absolute(workdir) / CHECKPOINTS))
        self.manager = checkpoint.open_manager(workdir, writes=True, asynchronous=asynchronous)
        self.asynchronous = asynchronous
        self.verified: set[int] = set()  # whole, as this process has seen
        self.healthy: dict[int, bool] = {}
        self.unread: int | None = None  # saved, and not read back yet

    def __exit__(self, *_) -> None:
        self.manager.close()

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that are there, rising."""
        return sorted(self.manager.all_steps())

    def restore(self, data) -> TrainState:
        """The newest state that is whole, and `data` moved to its position; newer ones are moved to workdir/damaged.

        ValueError, and nothing is moved, if none is whole.
        """
        damages: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                state, position = self._read(step)
            except Damaged as damage:
                damages[step] = str(damage)
                continue
            for other, damage in damages.items():
                self._set_aside(other, damage)
            data.set_state(_decode(position))
            return state
        tried = "; ".join(f"step {step}: {damage}" for step, damage in damages.items())
        raise ValueError(f"no checkpoint in {self.workdir} is whole, and none was moved. {tried or 'there is none'}")

    def save(self, state: TrainState, data, healthy: bool = True) -> None:
        """Saves the state and the position of the data iterator at step state.step, if it is not there yet.

        The checkpoint before (asynchronous) or this one is read back; then older ones go.
        """
        self._settle()
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        for _ in range(2):
            self._write(step, state, data, healthy)
            if self.asynchronous or self._settle():
                return

    def finish(self, state: TrainState, data) -> None:
        """Waits until the last checkpoint, that of this state, is written and read back; it is written once more if it
        is damaged. OSError if that one is too."""
        step, healthy = int(state.step), self.healthy.get(int(state.step), True)
        if self._settle() and step in self.manager.all_steps():
            return
        self._write(step, state, data, healthy)
        if not self._settle():
            raise OSError(f"what is written to {self.workdir} is not what is read back: the end is not saved")

    def wait(self) -> None:
        """Until the last checkpoint is written."""
        self.manager.wait_until_finished()

    def _write(self, step: int, state: TrainState, data, healthy: bool) -> None:
        checkpoint.save(self.manager, step, _items(state), {DATA: _encode(data.get_state())}, healthy)
        self.unread, self.healthy[step] = step, healthy

    def _settle(self) -> bool:
        """Waits for the last checkpoint, reads it back, and lets older ones go; False if it was damaged."""
        self.wait()
        step, self.unread = self.unread, None
        if step is None:
            return True
        try:
            self._read(step, keep=False)
        except Damaged as damage:
            self._set_aside(step, str(damage))
            return False
        self._rotate()
        return True

    def _read(self, step: int, keep: bool = True):
        """(state, position of the data) of a step, which is verified then; Damaged. keep=False: to compare it."""
        folder = absolute(self.workdir) / CHECKPOINTS / str(step)
        several = distributed.several()
        record = checkpoint.read_record(folder, several)
        position = checkpoint.read_json(folder, DATA, record, several)
        items = _items(self.abstract)
        read = {n: checkpoint.read_item(folder, n, item, record, keep, partial=False) for n, item in items.items()}
        if record is not None:
            self.verified.add(step)
            self.healthy[step] = record["healthy"]
        count = jax.device_put(np.asarray(step, self.abstract.step.dtype), self.abstract.step.sharding)
        return self.abstract.replace(step=count, **read), position

    def _set_aside(self, step: int, damage: str) -> None:
        def work():
            place = _moved(self.workdir, CHECKPOINTS, step, absolute(self.workdir) / DAMAGED)
            logging.error("the checkpoint of step %d is damaged (%s) and was moved to %s", step, damage, place)

        distributed.by_first(work)
        self.manager.reload()

    def _rotate(self) -> None:
        def work():
            for step in self.steps:
                if step not in self.healthy:
                    with contextlib.suppress(Damaged):
                        record = checkpoint.read_record(folder / str(step))
                        self.healthy[step] = record is None or record["healthy"]
            healthy = {step: self.healthy.get(step, True) for step in self.steps}
            for step in superseded(healthy, self.verified, self.keep, self.keep_every):
                _delete(folder, step)

        folder = absolute(self.workdir) / CHECKPOINTS
        distributed.by_first(work)
        self.manager.reload()


def superseded(healthy: Mapping[int, bool], verified, keep: int, every: int = 0) -> list[int]:
    """Of checkpoints, {step: whether it is healthy}, those that may go.

    A healthy one may when `keep` newer ones are healthy and verified and its step is no multiple of `every`; one that
    is not, then too, and when a newer one that is not is verified.
    """

    def newer(step: int, like: bool) -> int:
        return sum(other > step and other in verified and healthy[other] == like for other in healthy)

    return [
        step
        for step, well in healthy.items()
        if (newer(step, True) >= keep and not (well and every and step % every == 0))
        or (not well and newer(step, False) > 0)
    ]


def go_back(workdir, step: int) -> list[str]:
    """Moves what is later than a checkpoint, checkpoints and snapshots, to workdir/set_aside; returns where to.

    ValueError that lists the steps if that checkpoint is not there. In several processes all must call it.
    """
    steps, _ = checkpoint.steps_of(workdir, step)
    folder, moved = absolute(workdir), []
    snapshots = checkpoint.steps_of(workdir, None, SNAPSHOTS)[0] if (folder / SNAPSHOTS).is_dir() else []

    def work():  # from the newest: whoever is interrupted here still has what goes before
        for kind, found in ((CHECKPOINTS, steps), (SNAPSHOTS, snapshots)):
            for later in sorted((one for one in found if one > step), reverse=True):
                moved.append(str(_moved(workdir, kind, later, folder / SET_ASIDE / kind)))

    distributed.by_first(work)
    return moved


# --- folders of checkpoints, by the first process alone


def _moved(workdir, kind: str, step: int, place):
    """Moves a checkpoint to a folder; returns its new path, which nothing had."""
    source, number, target = absolute(workdir) / kind / str(step), 0, place / str(step)
    while target.exists():
        number, target = number + 1, place / f"{step}_{number + 1}"
    if stored(source):
        store, name = store_of(source)
        names = store.find(name)
        store.copy(names, [store_of(target)[1] + one.removeprefix(name) for one in names])
        _delete(source.parent, step)
    else:
        place.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    return target


def _delete(folder, step: int) -> None:
    """Deletes a checkpoint: it is gone at once, its files one after another."""
    if stored(folder):
        store, name = store_of(folder / str(step))
        names = store.find(name)
        for part in ([n for n in names if n == f"{name}/{MARK}"], [n for n in names if n != f"{name}/{MARK}"]):
            if part:
                store.rm(part)
    else:
        going = folder / f"{step}{GOING}"
        os.replace(folder / str(step), going)
        shutil.rmtree(going)


def _finish_deleting(folder) -> None:
    """What a process left that was killed while it deleted; in a store the manager tidies up."""
    if not stored(folder):
        for going in folder.glob(f"*{GOING}"):
            shutil.rmtree(going)


# --- what is in a checkpoint


def _items(state: TrainState) -> dict:
    """The fields that are saved: the step is the checkpoint's own."""
    return {name: item for name, item in vars(state).items() if item is not None and name != "step"}


def _encode(position):
    """grain gives a dict or, from worker processes, bytes."""
    return {"bytes": position.hex()} if isinstance(position, bytes) else {"json": position}


def _decode(encoded):
    return bytes.fromhex(encoded["bytes"]) if "bytes" in encoded else encoded["json"]

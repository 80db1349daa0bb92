"""What a run survives: python tests/drill.py [word] [kills], or make drill [ONLY=word] [KILLS=30].

Each exercise does something bad to a small run of the mixture and lets it go on; what comes out is compared with a run
that nobody disturbed, to the last bit. It prints a line for each; exit status 1 if one was not survived.
"""

import contextlib
import functools
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rcm_jax.run import workdir  # noqa: E402
from rcm_jax.train import checkpoint  # noqa: E402
from rcm_jax.train.metrics import read_metrics  # noqa: E402

STEPS, HALF, LOGGED = 1200, 600, 60
CHANGES = (400, 410, 420)  # where a run goes on elsewhere, and ends: in time before other sums make it another one
SAME, CLOSE = "same bits", 1e-4  # with sums in another order
FLAGS = [
    "--config=mixture.py", "--config.data.examples=512", "--config.sampling.report_samples=50",
    "--config.pretrain.train.steps=20", "--config.pretrain.train.sample_every=20", "--config.rcm.warmup=100",
    "--config.train.batch_size=64", f"--config.train.log_every={LOGGED}", "--config.train.checkpoint_every=60",
    "--config.train.sample_every=600", "--config.train.keep=3", "--config.rcm.student.decay_steps=2000",
]  # fmt: skip
# Runs a script after something in it was changed.
PATCHED = """
import runpy, sys
sys.path[:0] = [{root!r}, {root!r} + "/scripts"]
{patch}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HANGS = """
import threading
from rcm_jax.train import trainer
following, count = trainer._next_batch, []
def late(*args):
    count.append(1)
    if len(count) == 50:
        threading.Event().wait()
    return following(*args)
trainer._next_batch = late
"""
POISONED = """
import numpy as np
from rcm_jax.run import door, program
load = program.load_data
def poisoned(run):
    dataset = load(run)
    dataset.train["x0"] = np.array(dataset.train["x0"])
    dataset.train["x0"][[3, 77, 200]] = np.nan
    return dataset
door.load_data = poisoned
"""


class Drill:
    """A folder in which the exercises are done, the teacher, and what comes of a run that nobody disturbs."""

    def __init__(self, folder: pathlib.Path, kills: int):
        self.folder, self.kills, self.random = folder, kills, random.Random(0)
        self.calm = folder / "calm"
        done = self.train(self.calm, teacher=False)
        assert done == 0, self.said
        self.teacher = self.calm / "teacher"
        started = time.monotonic()
        assert self.train(folder / "again") == 0, self.said
        self.seconds = time.monotonic() - started
        assert self.difference(folder / "again") == 0, "two runs alike differ"

    def start(self, run, *flags, steps=STEPS, patch="", teacher=True, devices=1) -> subprocess.Popen:
        """A training in a workdir, its output in a file beside it."""
        program = ["-c", PATCHED.format(root=str(ROOT), patch=patch)] if patch else []
        named = [f"--config.teacher={self.teacher}"] if teacher else []
        flags = [*FLAGS, *named, f"--workdir={run}", f"--config.train.steps={steps}", *flags]
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),  # compiled once for all
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        log = (self.folder / "output").open("w")
        command = [sys.executable, *program, "scripts/train.py", *flags]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def train(self, run, *flags, **options) -> int:
        """The exit status of a training."""
        return self.start(run, *flags, **options).wait(timeout=600)

    @property
    def said(self) -> str:
        """The output of the last training."""
        return (self.folder / "output").read_text()

    @functools.cached_property
    def short(self) -> pathlib.Path:
        """A calm run that ends where those end that go on elsewhere."""
        assert self.train(self.folder / "short", steps=CHANGES[-1]) == 0, self.said
        return self.folder / "short"

    def difference(self, run, calm=None) -> float:
        """The largest difference of a parameter to the calm run's; inf if other lines were logged."""
        calm = calm or self.calm
        # A run that is stopped logs once more there.
        logged = [[row["step"] for row in read_metrics(at) if row["step"] % LOGGED == 0] for at in (run, calm)]
        if logged[0] != logged[1]:
            return float("inf")
        most = 0.0
        for item in ("student", "ema", "fake_score"):
            trees = [checkpoint.restore_params(folder, item)[0] for folder in (run, calm)]
            gaps = jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))), *trees)
            most = max(most, *jax.tree.leaves(gaps))
        return most

    def reached(self, run) -> int:
        """The last step that a run has logged."""
        return max((row["step"] for row in read_metrics(run)), default=0)

    def same(self, run, calm=None) -> str:
        """What `difference` says, in words."""
        gap = self.difference(run, calm)
        return SAME if gap == 0 else f"parameters differ by at most {gap:.1e}"


Outcome = tuple[bool, str]  # whether it is as it should be, and what came of it


def killed(drill: Drill, run) -> Outcome:
    """SIGKILL at random times, some while checkpoints are written beside the training."""
    hits, done, results = 0, 0, set()
    while hits < drill.kills:
        place = run / str(done)
        beside = drill.random.choice((True, False))
        process = drill.start(place, f"--config.train.asynchronous={beside}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(drill.random.uniform(0.2, 0.9) * drill.seconds)
            results.add(drill.same(place))
            done += 1
            continue
        process.kill()
        process.wait()
        hits += 1
    assert drill.train(run / str(done)) == 0, drill.said
    results.add(drill.same(run / str(done)))
    return results == {SAME}, f"{hits} kills in {done + 1} runs: {', '.join(sorted(results))}"


def stopped(drill: Drill, run) -> Outcome:
    """SIGTERM, five times."""
    statuses = []
    for i in range(5):
        process = drill.start(run)
        while process.poll() is None and drill.reached(run) < (i + drill.random.uniform(0.2, 0.8)) * STEPS / 6:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        statuses.append(process.wait())
    last, same = drill.train(run), drill.same(run)
    return (set(statuses), last, same) == ({130}, 0, SAME), f"statuses {statuses}, then {last}: {same}"


def disk_full(drill: Drill, run) -> Outcome:
    """A disk that is full in the middle, and then has room."""
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(run)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return True, "not done: it takes root, who may mount a small disk"
    try:
        status = drill.train(run / "run")
        error = [line for line in drill.said.splitlines() if line.startswith("error:")]
        subprocess.run(["mount", "-o", "remount,size=200m", str(run)], check=True)
        again, same = drill.train(run / "run"), drill.same(run / "run")
        words = f"status {status}, {len(error)} line of error, then {again}: {same}"
        return (status, len(error), again, same) == (2, 1, 0, SAME), words
    finally:
        subprocess.run(["umount", str(run)], check=False)


def damaged(how: Callable[[pathlib.Path], object], pattern: str) -> Callable:
    """The largest file of the newest checkpoint that fits a pattern is damaged in the middle of a run."""

    def exercise(drill: Drill, run) -> Outcome:
        assert drill.train(run, steps=HALF) == 0, drill.said
        files = [path for path in (run / "checkpoints" / str(HALF)).rglob(pattern) if path.is_file()]
        how(max(files, key=lambda path: (path.stat().st_size, str(path))))
        status = drill.train(run)
        aside = sorted(path.name for path in (run / "damaged").iterdir()) if (run / "damaged").exists() else "nothing"
        same = drill.same(run)
        return (status, aside, same) == (0, [str(HALF)], SAME), f"status {status}, put aside: {aside}: {same}"

    return exercise


def invert(path) -> None:
    """Eight bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 2, min(len(data) // 2 + 8, len(data))):
        data[i] ^= 0xFF
    path.write_bytes(data)


def diverged(drill: Drill, run) -> Outcome:
    """A learning rate without sense in the middle; then back to before it."""
    assert drill.train(run, steps=HALF) == 0, drill.said
    status = drill.train(run, "--config.rcm.student.learning_rate=1e30")
    again = drill.train(run, f"--from_step={HALF}")
    same = drill.same(run)
    return (status, again, same) == (3, 0, SAME), f"status {status}, then {again} with --from_step: {same}"


def bad_data(drill: Drill, run) -> Outcome:
    """Three examples of 512 that are NaN."""
    status = drill.train(run, patch=POISONED)
    rows = read_metrics(run)
    skipped = sum(row.get("student/skipped", 0) + row.get("critic/skipped", 0) for row in rows)
    left_out = np.mean([row["data/nonfinite"] for row in rows])
    words = f"status {status}, {skipped:g} updates skipped, {left_out:.2%} of the samples left out"
    return (status, skipped) == (0, 0) and left_out > 0, words


def bad_teacher(drill: Drill, run) -> Outcome:
    """One parameter of the teacher that is NaN."""
    params, step = checkpoint.restore_params(drill.teacher, "ema")
    params = jax.tree.map(np.array, params)
    jax.tree.leaves(params)[0].flat[0] = np.nan
    workdir.write_converted(run / "teacher", workdir.read(drill.teacher), params, step)
    status = drill.train(run / "run", f"--config.teacher={run / 'teacher'}", teacher=False)
    made = (run / "run").exists()
    return (status, made) == (2, False), f"status {status}, {'a' if made else 'no'} workdir made"


def hung(drill: Drill, run) -> Outcome:
    """Data that do not come."""
    status = drill.train(run, "--config.train.hang_after=5", patch=HANGS)
    again, same = drill.train(run), drill.same(run)
    return (status, again, same) == (4, 0, SAME), f"status {status}, then {again}: {same}"


def two_at_once(drill: Drill, run) -> Outcome:
    """A second training in the same workdir."""
    first = drill.start(run)
    while not (run / "lock.json").exists() and first.poll() is None:
        time.sleep(0.05)
    second = drill.train(run)
    status, same = first.wait(), drill.same(run)
    return (second, status, same) == (2, 0, SAME), f"status {second} of the second, {status} of the first: {same}"


def devices(drill: Drill, run) -> Outcome:
    """One device, then four, then two."""
    statuses = [
        drill.train(run, f"--config.mesh.fsdp={count}", steps=steps, devices=count)
        for count, steps in zip((1, 4, 2), CHANGES, strict=True)
    ]
    words = f"statuses {statuses}: {drill.same(run, drill.short)}"
    return not any(statuses) and drill.difference(run, drill.short) < CLOSE, words


def processes(late: float) -> Callable:
    """One process, then two, of which the second comes late, then one."""

    def exercise(drill: Drill, run) -> Outcome:
        statuses = [drill.train(run, steps=CHANGES[0])]
        with contextlib.closing(socket.socket()) as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        cluster = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--config.mesh.fsdp=2"]
        first = drill.start(run, *cluster, "--process=0", steps=CHANGES[1])
        time.sleep(late)
        second = drill.start(run, *cluster, "--process=1", steps=CHANGES[1])
        statuses += [first.wait(), second.wait(), drill.train(run, steps=CHANGES[2])]
        words = f"statuses {statuses}: {drill.same(run, drill.short)}"
        return not any(statuses) and drill.difference(run, drill.short) < CLOSE, words

    return exercise


ARRAYS = "*d/*"  # files of arrays as orbax lays them: ocdbt's data
EXERCISES = {
    "SIGKILL at random times": killed,
    "SIGTERM, five times": stopped,
    "a full disk": disk_full,
    "eight inverted bytes in the newest checkpoint": damaged(invert, ARRAYS),
    "a truncated file in it": damaged(lambda path: os.truncate(path, path.stat().st_size // 2), ARRAYS),
    "a missing file in it": damaged(lambda path: path.unlink(), ARRAYS),
    "broken metadata in it": damaged(lambda path: path.write_text("{"), "_METADATA"),
    "a learning rate of 1e30": diverged,
    "NaN in the data": bad_data,
    "NaN in the teacher": bad_teacher,
    "data that do not come": hung,
    "two trainings in one workdir": two_at_once,
    "1, 4 and 2 devices": devices,
    "1, 2 and 1 processes": processes(0.0),
    "a process that comes 15 s late": processes(15.0),
}


def main(only: str = "", kills: str = "30") -> int:
    """Prints a table in Markdown; returns how many exercises were not survived."""
    folder, lost = pathlib.Path(tempfile.mkdtemp()), 0
    try:
        drill = Drill(folder, int(kills))
        print("| what is done to the run | survived | what comes of it | seconds |\n|---|---|---|---|")
        for i, (name, exercise) in enumerate(EXERCISES.items()):
            if only in name:
                started = time.monotonic()
                survived, words = exercise(drill, folder / str(i))
                lost += not survived
                seconds = f"{time.monotonic() - started:.0f}"
                print(f"| {name} | {'yes' if survived else 'NO'} | {words} | {seconds} |", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return lost


if __name__ == "__main__":
    raise SystemExit(min(main(*sys.argv[1:]), 1))

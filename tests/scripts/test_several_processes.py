"""Several processes on 127.0.0.1 train as one does, and end when one of them is gone."""

import contextlib
import json
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import wan_1_3b
from rcm_jax.run import workdir as workdirs
from rcm_jax.run.experiment import Predictor
from rcm_jax.train import checkpoint
from rcm_jax.train.metrics import read_metrics
from tests import latents, tiny, wan
from tests.scripts.conftest import ROOT, TINY, assert_refused, finish


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_all(start_script, processes, workdir, *flags, devices=1, run=TINY):
    """The processes of one run, a tiny distillation of the digits by default, with checkpoints as the real runs write
    them."""
    cluster = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}", "--heartbeat=20"]
    arguments = [f"--workdir={workdir}", *run, "--config.train.asynchronous=True", *flags, *cluster]
    options = dict(devices=devices, small=True)
    return [start_script("train", *arguments, f"--process={i}", **options) for i in range(processes)]


def assert_same_run(workdir, one):
    """Parameters and metrics of two workdirs agree, up to the order of sums."""
    for item in ("ema", "student", "fake_score"):
        ours, theirs = (checkpoint.restore_params(folder, item)[0] for folder in (workdir, one))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)
    ours, theirs = read_metrics(workdir), read_metrics(one)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        for name in (name for name in row if name.endswith("/loss")):
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_of_two_devices_train_as_one(trained, start_script, tmp_path):
    one, _ = trained
    flags = [f"--config.teacher={one / 'teacher'}", "--config.mesh.data=2", "--config.mesh.fsdp=2"]
    first, second = map(finish, start_all(start_script, 2, tmp_path / "run", *flags, devices=2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert_same_run(tmp_path / "run", one)


@pytest.mark.slow
def test_the_others_end_when_one_is_killed_and_all_go_on_exactly(trained, start_script, tmp_path):
    one, _ = trained
    flags = [f"--config.teacher={one / 'teacher'}", "--config.mesh.data=1", "--config.mesh.fsdp=2"]
    running = start_all(start_script, 2, tmp_path / "run", *flags)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run/checkpoints/2").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running[1].kill()
    killed = time.monotonic()
    left = finish(running[0], 60)
    finish(running[1])
    assert left.returncode not in (0, None) and time.monotonic() - killed < 60
    assert "start all again" in left.stderr or "another task died" in left.stderr
    assert "trained" not in left.stdout
    first, second = map(finish, start_all(start_script, 2, tmp_path / "run", *flags))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert_same_run(tmp_path / "run", one)
    assert "trained in" in first.stdout and "student 4" in first.stdout
    assert "trained" not in second.stdout and "rCM:" not in second.stderr
    assert (tmp_path / "run/report/report.png").exists()
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == ["00000003.png", "00000006.png"]


def finite(path) -> dict:
    """The rows of a report.json; every number must be there."""
    rows = json.loads(path.read_text())["rows"]
    assert all(value is not None for row in rows.values() for value in row.values())
    return rows


@pytest.mark.slow
def test_two_processes_preview_and_report_latents_together(start_script, run_script, tmp_path):
    """A tiny Wan, split over four devices of two processes: neither has all of its parameters."""
    rng, run = np.random.default_rng(0), wan_1_3b.tiny(wan_1_3b.EXPERIMENT)
    x0, text = rng.normal(size=(12, 2, 4, 6, 4)), rng.normal(size=(12, 6, 8))
    teacher = jax.tree.map(np.asarray, wan.random_params(run.model))
    workdirs.write_converted(tmp_path / "teacher", Predictor(run.model), teacher)
    latents.write_vae(tmp_path / "vae.safetensors", run.media.vae)
    flags = [
        "--config=configs/wan_1_3b.py:tiny,dcm",
        f"--config.data.path={tiny.write_latents(tmp_path / 'latents', x0, text)}",
        f"--config.teacher={tmp_path / 'teacher'}",
        f"--config.media.vae_path={tmp_path / 'vae.safetensors'}",
        "--config.train.steps=2",
        "--config.train.sample_every=1",
        "--config.mesh.fsdp=2",
        "--config.mesh.seq=2",
        "--config.sampling.teacher_steps=3",
    ]
    one = run_script("train", f"--workdir={tmp_path / 'one'}", *flags, devices=4)
    assert one.returncode == 0, one.stderr
    first, second = map(finish, start_all(start_script, 2, tmp_path / "run", devices=2, run=flags))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.count("student, 4 steps") == 1 and "student" not in second.stdout
    for folder in ("samples", "report/videos"):
        ours, theirs = ({path.name for path in (tmp_path / run / folder).iterdir()} for run in ("run", "one"))
        assert ours == theirs and len(ours) == (2 if folder == "samples" else 4 * 5)
    ours, theirs = (finite(tmp_path / run / "report/report.json") for run in ("run", "one"))
    for row, values in theirs.items():
        assert ours[row] == pytest.approx(values, rel=0.05, abs=0.02), row  # bfloat16, in another order
    ours, theirs = ([row for row in read_metrics(tmp_path / run) if "preview/std" in row] for run in ("run", "one"))
    assert [row["step"] for row in ours] == [1, 2]
    assert ours[1] == pytest.approx(theirs[1], rel=0.05, abs=0.02)


@pytest.mark.slow
def test_four_processes_train_as_one(trained, start_script, tmp_path):
    one, _ = trained
    flags = [f"--config.teacher={one / 'teacher'}", "--config.mesh.data=2", "--config.mesh.fsdp=2"]
    ends = list(map(finish, start_all(start_script, 4, tmp_path / "run", *flags)))
    assert [end.returncode for end in ends] == [0] * 4, ends[0].stderr
    assert_same_run(tmp_path / "run", one)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--processes=2"], ["--coordinator and --process is missing"]),
        (["--coordinator=127.0.0.1:1", "--processes=2", "--process=2"], ["--process=2 must be from 0 to 1"]),
        (["--distributed"], ["no cluster is known by the environment"]),
    ],
)
def test_processes_that_cannot_meet_are_refused_in_one_line(run_script, tmp_path, flags, words):
    assert_refused(run_script("train", f"--workdir={tmp_path / 'new'}", *TINY, *flags), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_all_save_and_stop_when_one_is_asked_to(trained, start_script, tmp_path):
    flags = [f"--config.teacher={trained[0] / 'teacher'}", "--config.mesh.data=1", "--config.mesh.fsdp=2"]
    flags += ["--config.train.steps=3000", "--config.train.checkpoint_every=3000"]
    running = start_all(start_script, 2, tmp_path / "run", *flags)
    deadline = time.monotonic() + 200
    while len(read_metrics(tmp_path / "run")) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    running[1].terminate()
    ends = list(map(finish, running))
    assert [end.returncode for end in ends] == [130, 130], ends[0].stderr
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped at step {last}" in ends[0].stdout and (tmp_path / f"run/checkpoints/{last}").exists()


# Many first starts of processes that have met already: what races is the claim of a new workdir.
CLAIM = """
import sys
from rcm_jax.parallel import distributed
distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from configs import digits
from rcm_jax.run import workdir
from rcm_jax.util.config import revise
refused = 0
for i in range(int(sys.argv[5])):
    try:
        workdir.claim(f"{sys.argv[4]}/{i}", digits.EXPERIMENT)
    except ValueError as error:
        refused += 1
try:  # of another config: all hear it
    workdir.claim(f"{sys.argv[4]}/0", revise(digits.EXPERIMENT, {"seed": 1}))
except ValueError as error:
    print(refused, "seed is 0 there, 1 here" in str(error))
"""


def claim_together(folder, processes: int, starts: int) -> list[str]:
    """What each process prints: how often it was refused, and whether it heard of the refusal at the end."""
    command = [sys.executable, "-c", CLAIM, f"127.0.0.1:{free_port()}", str(processes)]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [subprocess.Popen([*command, str(i), str(folder), str(starts)], **options) for i in range(processes)]
    ends = [process.communicate(timeout=500) for process in running]
    assert all(process.returncode == 0 for process in running), ends
    return [out.splitlines()[-1] for out, _ in ends]  # what speaks before it is the library


@pytest.mark.slow
def test_a_thousand_first_starts_of_four_processes_without_a_refusal(tmp_path):
    assert claim_together(tmp_path, 4, 1000) == ["0 True"] * 4

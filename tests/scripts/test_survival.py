"""What ends a run by itself: each with a status and a line of its own, and nothing lost."""

import time

import jax
import numpy as np
import pytest

from rcm_jax.run import lock, workdir
from rcm_jax.run.experiment import Pretraining
from rcm_jax.train import checkpoint
from tests.scripts.conftest import TINY, assert_refused, finish
from tests.scripts.test_several_processes import free_port


def error_of(process) -> str:
    """Its one line that begins with error:."""
    [line] = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in process.stderr and "trained" not in process.stdout
    return line


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_status_3_and_a_diagnosis(trained, run_script, tmp_path):
    teacher = f"--config.teacher={trained[0] / 'teacher'}"
    flags = ["--config.rcm.student.learning_rate=1e30", "--config.train.most_skips=3", "--config.train.steps=30"]
    process = run_script("train", *TINY, teacher, *flags, f"--workdir={tmp_path / 'run'}", small=True)
    assert process.returncode == 3, process.stderr
    line = error_of(process)
    for words in ("3 updates of the ", "in a row were skipped up to step", "It began at step", "--from_step=N"):
        assert words in line


def test_a_teacher_that_is_not_finite_is_refused_by_name_and_leaves_no_folder(trained, run_script, tmp_path):
    there = workdir.read(trained[0] / "teacher")
    assert isinstance(there, Pretraining)
    params, step = checkpoint.restore_params(trained[0] / "teacher", "ema")
    params = jax.tree.map(np.array, params)
    jax.tree.leaves(params)[0][0] = np.nan
    workdir.write_converted(tmp_path / "broken", there, params, step)
    process = run_script("train", *TINY, f"--config.teacher={tmp_path / 'broken'}", f"--workdir={tmp_path / 'run'}")
    assert_refused(process, "broken has parameters that are not finite: [")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_stands_still_ends_with_status_4_and_says_where(run_script, tmp_path):
    flags = ["--config.pretrain.train.hang_after=1", "--config.model.num_layers=12"]  # it compiles for longer
    process = run_script("train", *TINY, *flags, f"--workdir={tmp_path / 'run'}")
    assert process.returncode == 4, process.stderr
    assert "stands still: iteration 0 (diffusion) takes more than 1 s (train.hang_after)" in process.stderr
    assert "in fit" in process.stderr  # the stacks


@pytest.mark.slow
def test_a_second_training_in_a_workdir_is_refused_while_the_first_goes_on(trained, start_script, run_script, tmp_path):
    teacher = f"--config.teacher={trained[0] / 'teacher'}"
    flags = [*TINY, teacher, f"--workdir={tmp_path / 'run'}"]
    first = start_script("train", *flags, small=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / lock.NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert_refused(run_script("train", *flags, small=True), "run is being trained in by process", "another --workdir")
    assert finish(first).returncode == 0
    assert not (tmp_path / "run" / lock.NAME).exists()


def test_processes_of_one_run_that_were_started_otherwise_are_refused(start_script, tmp_path):
    cluster = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--heartbeat=20"]
    flags = [*TINY, *cluster, "--config.mesh.fsdp=2", f"--workdir={tmp_path / 'run'}"]
    rates = ("--config.rcm.student.learning_rate=1e-4", "--config.rcm.student.learning_rate=1e-5")
    first, second = map(finish, [start_script("train", *flags, rate, f"--process={i}") for i, rate in enumerate(rates)])
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert "other processes (1) were started otherwise than process 0" in error_of(first)
    words = (
        "process 1 was started otherwise than process 0: config.rcm.student.learning_rate is 0.0001 there, 1e-05 here"
    )
    assert words in error_of(second)
    assert not (tmp_path / "run").exists()


def test_results_that_are_there_are_not_written_over_unless_asked(trained, run_script, tmp_path):
    (tmp_path / "x.png").write_text("mine")
    for name, flags in {
        "sample": [f"--checkpoint={trained[0]}", "--steps=1", "--each=1"],
        "curves": [f"--run=a={trained[0]}"],
    }.items():
        flags = [*flags, f"--out={tmp_path / 'x.png'}"]
        (tmp_path / "x.png").write_text("mine")
        assert_refused(run_script(name, *flags), "x.png is there: choose another name, or say --overwrite")
        assert (tmp_path / "x.png").read_text() == "mine"
        assert run_script(name, *flags, "--overwrite").returncode == 0
        assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def test_numbers_without_sense_are_refused_before_sampling(trained, run_script, tmp_path):
    sample = [f"--checkpoint={trained[0] / 'teacher'}", f"--out={tmp_path / 'x.png'}"]
    for flag, words in {
        "--guidance=nan": "guidance nan must be a finite number",
        "--each=1000000000000": "each",
        "--seeds=1,1": "none of them twice",
    }.items():
        assert_refused(run_script("sample", *sample, flag), words)

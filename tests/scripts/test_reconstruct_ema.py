"""Power EMAs of other widths, made from the snapshots of a run as a user makes them."""

import json

import jax
import numpy as np

from rcm_jax.run import workdir
from rcm_jax.train import checkpoint
from tests.scripts.conftest import assert_refused, snapshot
from tests.tiny import assert_trees_close, assert_trees_equal


def test_a_tracked_width_comes_back_and_samples_as_a_student(run_script, trained, tmp_path):
    folder, _ = trained
    before = snapshot(folder)
    flags = [f"--workdir={folder}", "--std=0.1", f"--dst={tmp_path / 'new'}"]
    process = run_script("reconstruct_ema", *flags, "--dry_run")
    assert process.returncode == 0 and "nothing was written" in process.stdout and not list(tmp_path.iterdir())
    process = run_script("reconstruct_ema", *flags)
    assert process.returncode == 0, process.stderr
    assert "+1.000000 × width 0.1 at step 6 (4 updates)" in process.stdout and "met to 0.00%" in process.stdout
    assert snapshot(folder) == before
    params, step = checkpoint.restore_params(tmp_path / "new", "ema")
    assert step == 6
    assert_trees_equal(params, checkpoint.restore_params(folder, "0.1", 6, kind=checkpoint.SNAPSHOTS)[0])
    config = workdir.read(tmp_path / "new")
    assert (config.rcm.ema_std, config.rcm.ema_tracks, config.train.steps) == (0.1, (), 6)
    picture = [f"--out={tmp_path / 'a.png'}", "--each=1", "--steps=1"]
    process = run_script("sample", f"--checkpoint={tmp_path / 'new'}", *picture)
    assert process.returncode == 0, process.stderr


def test_another_width_is_a_sum_of_snapshots(run_script, trained, tmp_path):
    folder, _ = trained
    process = run_script("reconstruct_ema", f"--workdir={folder}", "--std=0.07", f"--dst={tmp_path / 'new'}")
    assert process.returncode == 0, process.stderr
    lines = [line.split() for line in process.stdout.splitlines() if " × width " in line]
    assert len(lines) > 2 and abs(sum(float(line[0]) for line in lines) - 1) < 1e-5
    parts = [(float(w), checkpoint.restore_params(folder, std, int(step), kind=checkpoint.SNAPSHOTS)[0])
             for w, _, _, std, _, _, step, *_ in lines]  # fmt: skip
    expected = jax.tree.map(lambda *leaves: sum(w * np.asarray(x) for (w, _), x in zip(parts, leaves, strict=True)),
                            *[tree for _, tree in parts])  # fmt: skip
    assert_trees_close(checkpoint.restore_params(tmp_path / "new", "ema")[0], expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_averaged_anew_is_a_teacher_of_the_step_asked_for(run_script, trained, tmp_path):
    folder, _ = trained
    flags = [f"--workdir={folder / 'teacher'}", "--std=0.05", "--step=2", f"--dst={tmp_path / 'new'}"]
    assert run_script("reconstruct_ema", *flags).returncode == 0
    run = workdir.read(folder)
    assert workdir.check_start(tmp_path / "new", run) == 2  # the step at which config.teacher=NEW is read
    ours, _ = checkpoint.restore_params(tmp_path / "new", "ema", 2)
    assert_trees_equal(ours, checkpoint.restore_params(folder / "teacher", "ema", 2)[0])


def test_what_cannot_be_averaged_is_refused(run_script, trained, tmp_path):
    folder, _ = trained

    def refused(*flags, says, workdir=folder):
        process = run_script("reconstruct_ema", f"--workdir={workdir}", f"--dst={tmp_path / 'new'}", *flags)
        assert_refused(process, *says)
        assert not (tmp_path / "new").exists()

    refused("--std=0.5", says=["EMA width 0.5", "below 0.28"])
    refused("--std=0.1", "--step=5", says=["no snapshot of step 5", "steps there: 2, 4, 6"])
    refused("--std=0.1", "--step=4", says=["train.steps 4 is too short"])  # it knew no DMD yet
    refused("--std=0.1", says=["is no training workdir"], workdir=tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(values))
    refused("--std=0.1", says=["no snapshot in", "train.snapshot_every"], workdir=tmp_path / "other")
    values["rcm"] |= {"ema_half_life": 500, "ema_tracks": []}
    values["train"]["snapshot_every"] = 0
    (tmp_path / "other/config.json").write_text(json.dumps(values))
    refused("--std=0.1", says=["half-life alone", "ema_tracks"], workdir=tmp_path / "other")

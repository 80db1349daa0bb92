"""The whole path as a user walks it, tiny: train, go on, sample."""

import json
import re
import shutil

import imageio.v3 as iio
import numpy as np
import pytest

from rcm_jax.train.metrics import read_pace
from tests.page import content_of
from tests.scripts.conftest import TINY, assert_refused, snapshot

# Cells of 8×8 digits drawn eightfold with separators: the picture's size follows from rows and columns.
SCALE, PIXELS = 8, 8


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps_of(workdir):
    return [row["step"] for row in rows_of(workdir)]


def test_training_writes_teacher_student_metrics_samples_and_report(trained):
    workdir, process = trained
    assert steps_of(workdir) == [1, 2, 3, 4, 5, 6]
    names = set().union(*rows_of(workdir))
    assert {"scm/loss", "dmd/loss", "critic/loss", "student/grad_norm", "student/skipped"} <= names
    assert steps_of(workdir / "teacher") == [4]
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "6"]
    assert sorted(p.name for p in (workdir / "samples").iterdir()) == ["00000003.png", "00000006.png"]
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert list((workdir / "teacher/tensorboard").glob("events.out.tfevents.*"))
    assert not list(workdir.rglob("*.partial"))
    assert "report" in process.stdout
    assert "Traceback" not in process.stderr
    assert [row["step"] for row in read_pace(workdir)] == steps_of(workdir)
    assert {"pace/step_seconds", "pace/tflops_per_chip", "pace/goodput"} <= read_pace(workdir)[-1].keys()
    begins = re.search(r"rCM: DiT of ([\d,]+) parameters on 1 × cpu", process.stderr)
    assert begins and int(begins[1].replace(",", "")) > 1000
    assert "4 of pretraining, then 6 steps of 8 samples [8, 8, 1]; 1,437 examples" in process.stderr
    assert 'attention: "blockwise"\n' in process.stderr


def test_report_holds_a_picture_and_a_row_for_every_sampler(trained):
    workdir, process = trained
    picture = iio.imread(workdir / "report/report.png")
    assert picture.ndim == 3
    assert min(picture.shape[:2]) > 400
    assert picture.std() > 10  # not blank
    record = json.loads((workdir / "report/report.json").read_text(), parse_constant=pytest.fail)
    kinds = [name.split()[0] for name in record["rows"]]
    assert kinds[0] == "real"
    assert {"teacher", "student"} <= set(kinds)
    for name in record["rows"]:
        assert name in process.stdout
    page = content_of(workdir / "report/index.html")
    assert [preview["step"] for preview in page["previews"]] == [3, 6] and ["train.steps", "6"] in page["config"]
    assert [row["title"] for row in page["table"]["rows"]] == list(record["rows"])
    assert [picture["title"] for picture in page["pictures"]] == list(record["panels"])
    assert {"residuals", "student losses"} <= record["curves"].keys() == {plot["title"] for plot in page["plots"]}


def test_a_finished_run_started_again_trains_no_more(trained, run_script, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(trained[0], workdir)
    before = snapshot(workdir)
    process = run_script("train", f"--workdir={workdir}", *TINY, small=True)
    assert process.returncode == 0, process.stderr
    after = snapshot(workdir)
    kept = [name for name in before if name.startswith(("checkpoints", "teacher/checkpoints", "samples"))]
    kept += [name for name in before if name.endswith(("metrics.jsonl", "config.json"))]
    assert len(kept) > 10
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    assert json.loads(after["report/report.json"])["rows"] == json.loads(before["report/report.json"])["rows"]


def test_more_steps_go_on_from_the_checkpoint_with_the_same_teacher(trained, run_script, tmp_path):
    workdir = tmp_path / "longer"
    shutil.copytree(trained[0], workdir)
    before = snapshot(workdir / "teacher" / "checkpoints")
    process = run_script("train", f"--workdir={workdir}", *TINY, "--config.train.steps=8", small=True)
    assert process.returncode == 0, process.stderr
    assert steps_of(workdir) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows_of(workdir)[:6] == rows_of(trained[0])
    assert snapshot(workdir / "teacher" / "checkpoints") == before


def picture_of(process, out):
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    return iio.imread(out)


def assert_grid(picture, rows, columns):
    """A separator around every cell, of the same width everywhere, or only between cells."""
    for pixels, cells in zip(picture.shape[:2], (rows, columns), strict=True):
        separators = pixels - cells * PIXELS * SCALE
        assert 0 <= separators <= 4 * (cells + 1), picture.shape


@pytest.mark.parametrize("steps", [1, 4])
def test_student_samples_a_picture_with_a_row_for_every_class(trained, run_script, tmp_path, steps):
    out = tmp_path / "student.png"
    process = run_script("sample", f"--checkpoint={trained[0]}", f"--steps={steps}", "--each=3", f"--out={out}")
    picture = picture_of(process, out)
    assert_grid(picture, rows=10, columns=3)
    assert picture.std() > 0


def test_teacher_samples_chosen_classes_and_the_seed_decides(trained, run_script, tmp_path):
    def sample(name, *flags):
        out = tmp_path / f"{name}.png"
        teacher = f"--checkpoint={trained[0] / 'teacher'}"
        process = run_script("sample", teacher, "--steps=3", "--each=2", f"--out={out}", *flags)
        return picture_of(process, out)

    picture = sample("a", "--classes=3,5,8", "--guidance=1.5")
    assert_grid(picture, rows=3, columns=2)
    np.testing.assert_array_equal(sample("b", "--classes=3,5,8", "--guidance=1.5"), picture)
    other = sample("c", "--classes=3,5,8", "--guidance=1.5", "--seeds=1")
    assert other.shape == picture.shape
    assert np.any(other != picture)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps=9"], ["9 steps", "1 to 4"]),
        (["--guidance=2.0"], ["--guidance", "1.0"]),
        (["--checkpoint_step=5"], ["step 5", "4, 6"]),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else None,
)
def test_sampling_that_cannot_be_done_is_refused_in_one_line(trained, run_script, tmp_path, flags, words):
    out = tmp_path / "new.png"
    assert_refused(run_script("sample", f"--checkpoint={trained[0]}", f"--out={out}", *flags), *words)
    assert not out.exists()


def test_a_student_is_refused_as_teacher_and_its_teacher_is_named(trained, run_script, tmp_path):
    process = run_script("train", f"--workdir={tmp_path / 'new'}", *TINY, f"--config.teacher={trained[0]}")
    assert_refused(process, "distilled student", str(trained[0] / "teacher"))
    assert not (tmp_path / "new").exists()


def test_a_run_that_would_end_before_dmd_joins_is_refused_and_leaves_no_folder(run_script, tmp_path):
    process = run_script("train", *TINY, "--config.train.steps=4", f"--workdir={tmp_path / 'new'}")
    assert_refused(process, "train.steps 4 is too short", "DMD first updates the student in iteration 4")
    assert not (tmp_path / "new").exists()


def test_a_given_teacher_is_used_not_copied(trained, run_script, tmp_path):
    teacher = trained[0] / "teacher"
    before = snapshot(teacher)
    flags = [f"--workdir={tmp_path / 'new'}", f"--config.teacher={teacher}", "--config.train.steps=5"]
    process = run_script("train", *TINY, *flags, small=True)
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / "new/teacher").exists()
    assert snapshot(teacher) == before
    assert steps_of(tmp_path / "new") == [1, 2, 3, 4, 5]
    first, expected = rows_of(tmp_path / "new")[0], rows_of(trained[0])[0]
    assert first == expected  # the same teacher, seed and data: the same first step
    assert (tmp_path / "new/report/report.png").exists()

"""The report on latents, with videos and without."""

import json
import sys

import av
import numpy as np
import pytest

from rcm_jax.evaluate import video_report
from rcm_jax.evaluate.reports import REPORTS, no_report
from rcm_jax.evaluate.video_report import NO_VIDEOS
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.run import latents as fixed_latents
from rcm_jax.run import pipeline
from rcm_jax.util.config import revise
from tests import latents, tiny
from tests.page import content_of

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
given = pytest.fixture(scope="module")(latents.given)

TEACHER, STUDENTS = "teacher, 5 steps", ("student, 1 step", "student, 2 steps", "student, 4 steps")


@pytest.fixture(scope="module")
def trained(given, tmp_path_factory):
    """A run on eight devices that has an autoencoder."""
    changes = {"mesh": MeshConfig(2, 4, 1), "train.steps": 2}
    return pipeline.train(latents.experiment(given, **changes), tmp_path_factory.mktemp("trained") / "run")


def read(folder):
    """(report.json, what the page shows)"""
    report = json.loads((folder / "report/report.json").read_text(), parse_constant=pytest.fail)
    return report, content_of(folder / "report/index.html")


def test_teacher_and_student_are_shown_and_compared_on_examples_of_the_data(trained):
    assert no_report(trained.dataset) == ""
    table = REPORTS["video"](trained)
    record, page = read(trained.folder)
    assert list(record["rows"]) == ["data", TEACHER, *STUDENTS] and all(row in table for row in record["rows"])
    examples = fixed_latents.fixed(trained.dataset)["x0"]
    assert record["rows"]["data"]["std"] == pytest.approx(examples.std(), rel=1e-4)
    far = [record["rows"][row].get("rms_to_teacher") for row in ("data", TEACHER, *STUDENTS)]
    assert far[:2] == [None, None] and all(distance > 0 for distance in far[2:])
    assert "dcm" in record["curves"]["student losses"] and record["metadata"]["samples"] == 4
    assert list(record["videos"]) == [f"example {i}" for i in range(4)] and NO_VIDEOS not in record["footer"]
    for files in record["videos"].values():
        assert list(files) == ["data", TEACHER, *STUDENTS]
    path = trained.folder / "report" / record["videos"]["example 2"][TEACHER]
    assert path.name == "teacher-5-steps-2.mp4"
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert np.shape(frames) == (5, 32, 48, 3) and np.std(frames) > 10
    assert [len(row["cells"]) for row in page["videos"]["rows"]] == [5] * 4
    assert [preview["step"] for preview in page["previews"]] == [2]
    assert ["train.steps", "2"] in page["config"]


def test_distances_are_to_the_teacher_place_by_place():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    rows = video_report._rows(x, {TEACHER: x, "student, 1 step": x + 2, "student, 2 steps": x})
    assert rows["student, 1 step"]["rms_to_teacher"] == pytest.approx(2)
    assert rows["student, 2 steps"]["rms_to_teacher"] == 0 and "rms_to_teacher" not in rows[TEACHER]


def test_without_an_autoencoder_there_are_numbers_and_the_way_to_videos_and_without_a_teacher_students(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # which draws no page
    run = revise(trained.run, {"media.vae_path": ""})
    alone = trained._replace(
        program=trained.program._replace(run=run),
        teacher=trained.teacher.replace(params=None),
        teacher_folder=None,
        folder=tmp_path,
    )
    table = REPORTS["video"](alone)
    record, page = read(tmp_path)
    assert list(record["rows"]) == ["data", *STUDENTS] and "rms" not in table and table.endswith(NO_VIDEOS)
    assert record["videos"] == {} and NO_VIDEOS in record["footer"] and NO_VIDEOS in page["note"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["index.html", "report.json"]

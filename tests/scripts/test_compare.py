"""The comparison of methods, with two of them, hardly trained."""

import json

import imageio.v3 as iio
import pytest

from tests.page import content_of
from tests.scripts.conftest import assert_refused

STAGES = ("1_dcm", "2_scm", "3_rcm")
RUNS = "dcm,staged,rcm_0.001"
TINY = [
    "--config.train.steps=16",
    "--config.train.batch_size=8",
    "--config.train.sample_every=100",
    "--config.pretrain.train.steps=2",
    "--config.pretrain.train.batch_size=8",
    "--config.rcm.warmup=1",
    "--config.data.examples=64",
    "--config.model.dim=8",
]


@pytest.mark.parametrize("config", ["digits.py", "mixture.py:scm"])
def test_a_config_that_is_not_of_rcm_on_a_mixture_is_refused_at_once(config, run_script, tmp_path):
    process = run_script("compare", f"--config={config}", f"--workdir={tmp_path / 'new'}")
    assert_refused(process, "--config must be of rCM on a mixture")
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_none_is_named(run_script, tmp_path):
    assert_refused(run_script("compare", "--runs=scm,rcm", f"--workdir={tmp_path / 'new'}"), "--runs=rcm is none of")


def test_methods_are_compared_from_one_start(run_script, tmp_path):
    process = run_script(
        "compare", f"--workdir={tmp_path / 'run'}", "--seeds=3", f"--runs={RUNS}", *TINY, small=True
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "run"
    assert json.loads((folder / "seed3/rcm_0.001/config.json").read_text())["teacher"] == str(
        folder / "seed3/dcm/teacher"
    )
    assert not (folder / "seed3/rcm_0.001/teacher").exists()
    stages = [json.loads((folder / "seed3/staged" / name / "config.json").read_text()) for name in STAGES]
    assert [one["start"] for one in stages] == ["", *(str(folder / "seed3/staged" / name) for name in STAGES[:2])]
    record = json.loads((folder / "comparison/report.json").read_text())
    assert [name for name in record["rows"] if "1 step" in name] == [
        f"{name}, 1 step" for name in ("dCM", "dCM, sCM, rCM", "rCM, λ = 0.001")
    ]
    assert len(record["metadata"]["seeds"]["dCM, 4 steps"]) == 1
    assert record["curves"]["map error of one step"]["dCM, sCM, rCM"][-1][0] == 6  # of all stages
    points = record["curves"]["map error of one step, rCM"]["rCM, λ = 0.001"]
    assert len(points) > 2
    assert points[-1][0] == 4  # updates of the student in 16 iterations: one of warm-up, then every fifth
    assert "rCM, λ = 0.001, 4 steps" in process.stdout
    assert iio.imread(folder / "comparison/report.png").std() > 10
    page = content_of(folder / "comparison/index.html")
    assert [row["title"] for row in page["table"]["rows"]] == list(record["rows"])

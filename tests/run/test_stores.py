"""Runs whose workdir, teacher and weights lie in an object store: the same numbers as on a disk."""

import json

import jax
import numpy as np
import pytest

from rcm_jax.convert.files import open_tensors, write_tensors
from rcm_jax.evaluate import mixture_report
from rcm_jax.run import pipeline, workdir
from rcm_jax.run.experiment import Predictor
from rcm_jax.train import checkpoint
from rcm_jax.train.metrics import read_metrics, read_pace
from rcm_jax.util.config import revise
from rcm_jax.util.files import as_path, write_text
from tests import tiny
from tests.run.test_pipeline import run
from tests.stores import contents

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)


@pytest.fixture(scope="module")
def bucket(s3):
    return s3("runs")


@pytest.fixture(scope="module")
def trained(bucket, tmp_path_factory):
    """(a run on this disk, the same in the store: stopped, and gone on with where its last two checkpoints are not whole)."""
    here = pipeline.train(run(), tmp_path_factory.mktemp("here") / "run")
    there = f"{bucket}/run"
    pipeline.train(run(steps=5, keep=3), there)
    for step in ("4", "5"):  # as if their upload had been interrupted
        (as_path(there) / "checkpoints" / step / "commit_success.txt").unlink()
    assert checkpoint.params_of(there, "ema")[1] == 2
    return here, pipeline.train(run(asynchronous=True), there)


def test_a_run_that_goes_on_in_a_store_ends_in_the_bits_of_one_on_a_disk(trained):
    here, there = trained
    tiny.assert_trees_equal(there.state.ema, here.state.ema)
    tiny.assert_trees_equal(there.state.student, here.state.student)
    assert str(there.folder) == "s3://runs/run"
    assert there.teacher_folder == there.folder / "teacher"
    for name in ("ema", "student"):
        stored, step = checkpoint.restore_params(there.folder, name)
        assert step == 6
        tiny.assert_trees_equal(stored, checkpoint.restore_params(here.folder, name)[0])
    for folder in ("", "teacher"):
        assert read_metrics(there.folder / folder) == read_metrics(here.folder / folder)
    assert [row["step"] for row in read_pace(there.folder)] == [1, 2, 3, 4, 5, 6]


def test_in_a_store_lies_what_lies_on_a_disk_and_old_checkpoints_go(trained):
    here, there = trained

    def shape(names):
        return {name for name in names if not name.startswith(("checkpoints", "teacher/checkpoints"))}

    in_store = contents("s3://runs/run")
    on_disk = [path.relative_to(here.folder).as_posix() for path in here.folder.rglob("*") if path.is_file()]
    events = [name for name in in_store if "tfevents" in name]
    assert len([name for name in events if not name.startswith("teacher")]) == 2  # one for each start
    assert shape(in_store) - set(events) == {name for name in shape(on_disk) if "tfevents" not in name}
    steps = {name.split("/")[1] for name in in_store if name.startswith("checkpoints/")}
    assert steps == {"4", "6"}
    assert json.loads(in_store["config.json"]) == json.loads(contents("s3://runs/run")["config.json"])


def test_another_config_is_refused_by_the_claim_of_a_store(trained):
    with pytest.raises(ValueError, match=r"workdir s3://runs/run belongs to another config: config.seed is 0 there"):
        pipeline.train(revise(run(), {"seed": 7}), "s3://runs/run")


def test_a_teacher_in_a_store_teaches_a_run_on_a_disk(trained, tmp_path):
    here, there = trained
    done = pipeline.train(run("", str(there.teacher_folder)), tmp_path / "run")
    tiny.assert_trees_equal(done.teacher.params, here.teacher.params)


def test_the_report_of_a_run_in_a_store_lies_beside_it(trained):
    here, there = trained
    assert mixture_report.write_scatter_report(there) == mixture_report.write_scatter_report(here)
    report = contents("s3://runs/run/report")
    assert sorted(report) == ["index.html", "report.json", "report.png"]
    assert json.loads(report["report.json"])["rows"] == json.loads((here.folder / "report/report.json").read_text())["rows"]


# --- weights that were not trained here


def test_converted_weights_are_written_to_a_store_with_their_claim_last(bucket, monkeypatch):
    params = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    config = Predictor(tiny.MODEL)

    def gone(path, text):
        raise OSError("the network is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="network is gone"):
        patch.setattr(workdir, "write_text", gone)
        workdir.write_converted(f"{bucket}/converted", config, params)
    assert contents(f"{bucket}/converted") == {}
    workdir.write_converted(f"{bucket}/converted", config, params)
    assert workdir.read(f"{bucket}/converted") == config
    tiny.assert_trees_equal(checkpoint.restore_params(f"{bucket}/converted", "ema")[0], params)
    with pytest.raises(ValueError, match="is there and not an empty folder"):
        workdir.write_converted(f"{bucket}/converted", config, params)


@pytest.mark.parametrize("shard_bytes", [float("inf"), 100])
def test_published_weights_are_written_to_a_store_and_read_from_it(bucket, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setenv("RCM_CACHE", str(tmp_path / "cache"))
    tensors = {name: np.random.default_rng(i).normal(size=(4, 5)).astype(np.float32) for i, name in enumerate("abc")}
    folder = f"{bucket}/published-{shard_bytes}"
    names = write_tensors(folder, tensors, shard_bytes=shard_bytes, extra_files={"config.json": "{}"})
    assert sorted(contents(folder)) == sorted(names)
    jax.tree.map(np.testing.assert_array_equal, {n: np.asarray(t) for n, t in open_tensors(folder).items()}, tensors)


def test_a_folder_that_the_console_of_a_store_has_made_is_empty(bucket):
    import boto3

    boto3.client("s3").put_object(Bucket="runs", Key="console/")
    workdir.claim(f"{bucket}/console", Predictor(tiny.MODEL))
    write_text(f"{bucket}/thesis/thesis.txt", "mine")
    with pytest.raises(ValueError, match=r"not empty and has no config\.json"):
        workdir.claim(f"{bucket}/thesis", Predictor(tiny.MODEL))

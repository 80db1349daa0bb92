"""Runs whose workdir, teacher and weights lie in an object store: the same numbers as on a disk."""

import pathlib

import jax
import numpy as np
import pytest

from rcm_jax.convert.files import open_tensors, write_tensors
from rcm_jax.evaluate import curves
from rcm_jax.evaluate.page import previews_of
from rcm_jax.evaluate.report import write_report
from rcm_jax.run import pipeline, workdir
from rcm_jax.run.experiment import Predictor
from rcm_jax.train import checkpoint
from rcm_jax.train.metrics import read_metrics, read_pace
from rcm_jax.train.pace import traced
from rcm_jax.util.config import revise
from rcm_jax.util.files import as_path, write_text
from tests import tiny
from tests.run.test_pipeline import run
from tests.stores import contents

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)


def scm(**train):
    """The shortest run: sCM of the exact teacher, from random parameters."""
    return revise(run("scm", keep=2, **train), {"pretrain": None})


@pytest.fixture(scope="module")
def bucket(s3):
    return s3("runs")


@pytest.fixture(scope="module")
def trained(bucket, tmp_path_factory):
    """(a run on this disk, the same in the store: stopped, and gone on with from half a checkpoint)."""
    programs, there = tmp_path_factory.mktemp("programs"), f"{bucket}/run"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    here = pipeline.train(scm(), tmp_path_factory.mktemp("here") / "run", cache=programs)
    pipeline.train(scm(steps=4), there)
    (as_path(there) / "checkpoints" / "4" / "commit_success.txt").unlink()  # as if its upload had been interrupted
    assert checkpoint.params_of(there, "ema")[1] == 2
    yield here, pipeline.train(scm(asynchronous=True), there)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    jax.config.update("jax_compilation_cache_dir", None)


def test_a_run_that_goes_on_in_a_store_ends_in_the_bits_of_one_on_a_disk(trained):
    here, there = trained
    tiny.assert_trees_equal(there.state.ema, here.state.ema)
    tiny.assert_trees_equal(there.state.student, here.state.student)
    assert str(there.folder) == "s3://runs/run"
    for name in ("ema", "student"):
        stored, step = checkpoint.restore_params(there.folder, name)
        assert step == 6
        tiny.assert_trees_equal(stored, checkpoint.restore_params(here.folder, name)[0])
    assert len(read_metrics(there.folder)) == 6 and read_metrics(there.folder) == read_metrics(here.folder)
    assert [row["step"] for row in read_pace(there.folder)] == [1, 2, 3, 4, 5, 6]


def test_in_a_store_lies_what_lies_on_a_disk_and_old_checkpoints_go(trained):
    here = trained[0]

    def shape(names):
        return {name for name in names if not name.startswith(("checkpoints", "tensorboard"))}

    in_store = contents("s3://runs/run")
    on_disk = [path.relative_to(here.folder).as_posix() for path in here.folder.rglob("*") if path.is_file()]
    assert len([name for name in in_store if "tfevents" in name]) == 2  # one for each start
    assert shape(in_store) == shape(on_disk)
    steps = {name.split("/")[1] for name in in_store if name.startswith("checkpoints/")}
    assert steps == {"4", "6"}


def test_another_config_is_refused_by_the_claim_of_a_store(trained):
    with pytest.raises(ValueError, match=r"workdir s3://runs/run belongs to another config: config.seed is 0 there"):
        pipeline.train(revise(scm(), {"seed": 7}), "s3://runs/run")


def test_a_run_in_a_store_can_be_what_another_starts_from(trained):
    here, there = trained
    starts = pipeline.read_starts(there.program._replace(run=revise(scm(), {"start": str(there.folder)})))
    tiny.assert_trees_equal(starts["student"], here.state.ema)


def test_a_report_lies_in_a_store_with_the_previews_that_lie_there(trained):
    there = trained[1]
    previews = previews_of(there.folder)
    assert [(step, str(path)) for step, path in previews][-1] == (6, "s3://runs/run/samples/00000006.png")
    write_report(
        there.folder / "report", panels={}, curves=curves.of_training(there.folder), rows={},
        title="A run", previews=previews,
    )  # fmt: skip
    assert sorted(contents("s3://runs/run/report")) == ["index.html", "report.json", "report.png"]


def test_a_trace_is_uploaded_when_it_ends(bucket, monkeypatch):
    started = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: started.append(pathlib.Path(folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (started[0] / "a.pb").write_bytes(b"trace"))
    with traced(f"{bucket}/traced", (1, 2)) as trace:
        trace(1, ())
        trace(2, ())
        assert contents(f"{bucket}/traced") == {"profile/a.pb": b"trace"}


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
    (as_path(bucket) / "converted/checkpoints/0/commit_success.txt").unlink()
    with pytest.raises(ValueError, match="no checkpoint of any step in s3://runs/converted"):
        checkpoint.params_of(f"{bucket}/converted", "ema")


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

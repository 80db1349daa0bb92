"""Whole runs of methods that need no picture and no hour: the mixture, tiny."""

import sys

import jax
import numpy as np
import pytest

from configs import digits, methods, mixture, wan_1_3b
from rcm_jax.evaluate import mixture_report
from rcm_jax.run import pipeline
from rcm_jax.run.program import assemble
from rcm_jax.train import checkpoint
from rcm_jax.train.metrics import read_metrics
from rcm_jax.util.config import revise
from tests import tiny

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)


def run(variant="", teacher="", **train):
    """configs/mixture.py:variant, with hardly any width or length."""
    loop = dict(steps=6, batch_size=16, log_every=1, checkpoint_every=2, sample_every=2)
    changed = methods.choose(mixture.EXPERIMENT, variant, {})
    changes = {"model": revise(changed.model, dict(dim=8, num_layers=1, freq_dim=4)), "data.examples": 256}
    changes |= {"train": revise(changed.train, loop | train), "teacher": teacher}
    if changed.pretrain:
        changes["pretrain.train"] = revise(changed.pretrain.train, loop)
    if changed.rcm.dmd:
        changes["rcm.dmd.update_freq"] = 2
    return revise(changed, changes | {"rcm.warmup": min(changed.rcm.warmup, 1)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of rCM with its pretrained start."""
    return pipeline.train(run(), tmp_path_factory.mktemp("rcm") / "run")


def test_the_exact_teacher_teaches_and_the_pretrained_network_is_only_the_start(trained):
    x, t = np.ones((3, 2), np.float32), np.full(3, 0.5, np.float32)
    label = {"label": np.arange(3)}
    given = trained.program.teacher_F(trained.teacher.params, x, t, label)
    np.testing.assert_array_equal(given, trained.dataset.velocity(None, x, t, label))
    assert trained.teacher_folder == trained.folder / "teacher"
    start = checkpoint.restore_params(trained.teacher_folder, "ema")[0]
    tiny.assert_trees_equal(trained.teacher.params, start)
    assert int(trained.state.step) == 6


def test_the_teacher_lies_in_memory_in_its_own_dtype_and_what_is_trained_in_float32(trained, tmp_path):
    narrow = revise(run("", str(trained.teacher_folder)), {"teacher_dtype": "bfloat16"})
    done = pipeline.train(narrow, tmp_path / "run")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(done.teacher.params)} == {"bfloat16"}
    networks = done.state.student.params, done.state.ema, done.state.fake_score.params
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(networks)} == {"float32"}
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), trained.teacher.params)
    tiny.assert_trees_equal(done.teacher.params, rounded)


def test_metrics_by_time_and_the_probe_are_written(trained):
    rows = {row["step"]: row for row in read_metrics(trained.folder)}
    names = set().union(*rows.values())
    assert {f"scm/residual/t{k}" for k in range(4)} <= names
    assert "probe/jvp_error/t=0.6" in rows[2] and "probe/jvp_error/t=0.6" not in rows[1]
    assert all(row[name] is not None for row in rows.values() for name in row)


def test_the_report_has_a_picture_and_the_exact_teachers_own_distance(trained, monkeypatch):
    monkeypatch.setattr(mixture_report, "SAMPLES", 300)
    table = mixture_report.write_scatter_report(trained)
    assert "student, 4 steps" in table and mixture_report.FLOOR in table
    assert (trained.folder / "report/report.png").stat().st_size > 10_000
    judge = mixture_report.make_judge(trained.run, trained.program.network)
    floor = mixture_report.floor(judge.reference)
    assert "map_error" not in floor
    assert floor["mmd"] < 0.02  # the same distribution
    assert abs(floor["variance"] - 1) < 0.3
    picture = mixture_report.picture(judge.reference, judge.reference.target)
    assert picture.shape == (mixture_report.SIZE, mixture_report.SIZE, 3)
    assert 0 <= picture.min() < picture.max() == 1


@pytest.mark.parametrize("variant", ["sct", "scm_adaptive", "dcm_dmd"])
def test_a_stopped_run_of_any_method_goes_on_to_the_same_bits(variant, trained, tmp_path):
    teacher = "" if variant == "sct" else str(trained.teacher_folder)
    whole = pipeline.train(run(variant, teacher), tmp_path / "whole")
    for steps in (4, 6):
        halves = pipeline.train(run(variant, teacher, steps=steps), tmp_path / "halves")
    tiny.assert_trees_equal(halves.state, whole.state)
    if variant == "sct":
        assert whole.teacher.params is None and whole.teacher_folder is None
    if variant == "scm_adaptive":
        assert int(whole.state.weighting.updates) == 6
        assert np.any(jax.tree.leaves(whole.state.weighting.params)[1] != 0)


def test_data_without_a_known_velocity_have_no_exact_teacher(tmp_path):
    with pytest.raises(ValueError, match=r"config\.exact_teacher is set, but the velocity of these data is not known"):
        pipeline.train(revise(digits.EXPERIMENT, {"exact_teacher": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_and_data_are_asked_for_when_they_are_opened(tmp_path):
    latents = wan_1_3b.tiny(wan_1_3b.EXPERIMENT)
    with pytest.raises(ValueError, match=r"teacher is empty, .*convert_checkpoint"):
        pipeline.train(latents, tmp_path / "run")
    with pytest.raises(ValueError, match=r"config.data.path is empty"):
        pipeline.train(revise(latents, {"teacher": str(tmp_path)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_and_a_fake_score_start_from_other_runs_and_a_resumed_run_asks_no_more(trained, tmp_path):
    teacher = str(trained.teacher_folder)
    staged = revise(run("", teacher), {"start": str(trained.folder), "fake_start": str(trained.folder)})
    program = assemble(staged, trained.program.mesh, trained.dataset)
    starts = pipeline.read_starts(program)
    tiny.assert_trees_equal(starts["student"], trained.state.ema)
    tiny.assert_trees_equal(starts["fake_score"], trained.state.fake_score.params)
    state = pipeline.trainer.place(program.distillation, starts["student"], fake_score=starts["fake_score"])
    for params, expected in ((state.student.params, trained.state.ema), (state.ema, trained.state.ema)):
        tiny.assert_trees_equal(params, expected)
    tiny.assert_trees_equal(state.fake_score.params, trained.state.fake_score.params)

    short = revise(staged, {"fake_start": "", "train.steps": 4})
    first = pipeline.train(short, tmp_path / "run")
    assert int(first.state.step) == 4
    (trained.folder / "config.json").rename(tmp_path / "kept")
    try:
        on = pipeline.train(revise(short, {"train.steps": 6}), tmp_path / "run")
    finally:
        (tmp_path / "kept").rename(trained.folder / "config.json")
    assert int(on.state.step) == 6


def test_a_start_that_is_not_finished_or_of_another_network_is_refused_and_leaves_no_folder(trained, tmp_path):
    teacher = str(trained.teacher_folder)
    other = revise(run("", teacher), {"start": str(trained.folder), "model.dim": 16, "teacher": "", "pretrain": None})
    with pytest.raises(ValueError, match=r"does not fit this config: config\.model\.dim is 8 there, 16 here"):
        pipeline.train(revise(other, {"exact_teacher": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wandb_that_is_not_installed_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"config\.train\.wandb"):
        pipeline.train(run(wandb=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()

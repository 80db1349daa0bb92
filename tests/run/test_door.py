"""What cannot be is refused while nothing is written and nothing trained."""

import math

import pytest

from configs import digits, methods, mixture
from rcm_jax.run import door, pipeline
from rcm_jax.run.experiment import Experiment
from rcm_jax.util.config import revise

TINY = {"model.dim": 8, "model.num_layers": 1, "model.freq_dim": 4, "data.examples": 16, "train.batch_size": 8}
TINY |= {"pretrain.train.batch_size": 8}
RUN = revise(mixture.EXPERIMENT, TINY)
SMALL = {"model.dim": 16, "model.num_layers": 1, "model.num_heads": 2, "model.patch": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.leave_out": (16,)}, "leave_out names example 16, but the data have 16"),
        ({"pretrain.train.leave_out": tuple(range(16))}, "leave_out names all 16 examples"),
        ({"pretrain.train.wandb": True}, r"config\.train\.wandb: "),
        ({"train.wandb": True}, r"config\.train\.wandb: "),
        ({"sampling.teacher_solver": "heun", "sampling.teacher_sigma_max": math.inf}, "Heun must fall from below pi/2"),
        ({"train.batch_size": 24, "train.accumulate": 2}, "batch size 24, in 2 parts"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_fails_later_is_refused_before_a_workdir_is_claimed(tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(door.__dict__, "wandb_library", missing)
    with pytest.raises(ValueError, match=message):
        pipeline.train(revise(RUN, changes), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def missing():
    raise ValueError("config.train.wandb: wandb is not installed")


def test_a_teacher_alone_comes_by_the_same_door(tmp_path):
    run = revise(RUN.pretraining, {"pretrain.train.leave_out": (99,)})
    with pytest.raises(ValueError, match="leave_out names example 99"):
        pipeline.train_teacher(run, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_steps_that_cannot_be_traced_are_refused(tmp_path, monkeypatch):
    run = revise(digits.EXPERIMENT, SMALL)
    objective = type(run.rcm.dmd)

    def term(self, given):
        raise ValueError("this objective is of no use")

    monkeypatch.setattr(objective, "term", term)
    with pytest.raises(ValueError, match="this objective is of no use"):
        pipeline.train(run, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_the_teacher_is_looked_into_before_anything_is_written(tmp_path):
    (tmp_path / "run/teacher").mkdir(parents=True)
    (tmp_path / "run/teacher/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        pipeline.train(RUN, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run", "teacher", "thesis.txt"]


@pytest.mark.parametrize("teacher", ["", "random", "/there/teacher"])
def test_a_recipe_is_a_chain_of_workdirs_from_one_teacher(tmp_path, teacher):
    stages = methods.chain(revise(digits.EXPERIMENT, {"teacher": teacher}), "staged", tmp_path)
    assert [folder.name for folder in stages] == ["1_dcm", "2_scm", "3_rcm"]
    assert all(isinstance(stage, Experiment) for stage in stages.values())
    assert [stage.start for stage in stages.values()] == ["", str(tmp_path / "1_dcm"), str(tmp_path / "2_scm")]
    later = teacher or str(tmp_path / "1_dcm/teacher")
    assert [stage.teacher for stage in stages.values()] == [teacher, later, later]

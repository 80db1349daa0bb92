"""What a user can get wrong ends in one line on stderr and leaves every file as it was."""

import ast
import functools

import pytest

from configs import digits
from rcm_jax.run.experiment import from_mapping
from rcm_jax.util.config import revise, to_mapping
from tests.scripts.conftest import TINY, assert_refused, snapshot, write_config

# The config that TINY stands for.
VALUES = to_mapping(digits.EXPERIMENT)
for override in TINY[1:]:
    key, number = override.removeprefix("--config.").split("=")
    *groups, name = key.split(".")
    functools.reduce(dict.__getitem__, groups, VALUES)[name] = ast.literal_eval(number)
RUN = from_mapping(VALUES)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bogus=1"], ["bogus"]),
        (["extra"], ["extra", "--name=value"]),
        (["--config.model.width=3"], ["width"]),
        (["--config.train.steps=many"], ["config.train.steps", "many"]),
        (["--config.model=3"], ["config.model"]),
        (["--config.rcm.consistency.kind=scn"], ["config.rcm.consistency.kind is 'scn'", "scm, dcm"]),
        (["--config.rcm.consistency.kind=dcm", "--config.rcm.consistency.limit=clip"], ["unknown key limit", "skip"]),
        (["--config.model.patch=3"], ["patch 1×3×3", "1×8×8"]),
        (["--config.model.dtype=float33"], ["config.model", "float33"]),
        (["--config.model.num_classes=5"], ["num_classes", "5", "10"]),
        (["--config.seed=-1"], ["config.seed is -1: it must be from 0 to 2,147,483,646"]),
        (["--config.sampling.sigma_max=nan"], ["config.sampling.sigma_max is nan: it must be from 1e-9"]),
        (["--config.mesh.fsdp=3"], ["fsdp=3", "1 devices"]),
        (["--config.teacher=/nowhere/at/all"], ["/nowhere/at/all", "config.json"]),
        (["--config=configs/digits.py:scn"], ["variant 'scn' is none of rcm,", "scm_adaptive"]),
        (["--config=digits:scm"], ["dmd and fake_score belong together"]),  # TINY sets a key of DMD
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith(("-", "e")) else None,
)
def test_a_bad_flag_is_refused_in_one_line_and_nothing_is_created(run_script, tmp_path, flags, words):
    arguments = [*flags, *TINY[1:]] if flags[0].startswith("--config=") else [*TINY, *flags]
    process = run_script("train", f"--workdir={tmp_path / 'new'}", *arguments)
    assert_refused(process, *words)
    assert snapshot(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(TINY, "workdir"), (["--config=none.py", "--workdir=/nowhere"], "none.py")],
    ids=["flag", "file"],
)
def test_a_missing_flag_or_config_file_is_named(run_script, arguments, word):
    assert_refused(run_script("train", *arguments), word)


def test_batch_that_does_not_divide_by_the_mesh_is_refused_with_the_numbers(run_script, tmp_path):
    flags = ["--config.train.batch_size=12", "--config.pretrain.train.batch_size=16"]
    process = run_script("train", f"--workdir={tmp_path / 'new'}", *TINY, *flags, devices=8)
    assert_refused(process, "12", "8 devices", "8 or 16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--profile=4", ["--profile=4 must be START:END"]),
        ("--profile=4:9", ["0 <= START < END <= 6"]),
        ("--profile=3:3", ["START < END"]),
    ],
)
def test_steps_that_cannot_be_traced_are_refused(run_script, tmp_path, flag, words):
    assert_refused(run_script("train", f"--workdir={tmp_path / 'new'}", *TINY, flag), *words)
    assert list(tmp_path.iterdir()) == []


def test_workdir_of_another_config_is_refused_with_the_difference(run_script, tmp_path):
    write_config(tmp_path / "there", revise(RUN, {"model.dim": 32}))
    before = snapshot(tmp_path)
    assert_refused(
        run_script("train", f"--workdir={tmp_path / 'there'}", *TINY), "config.model.dim", "32", "16", "--workdir"
    )
    assert snapshot(tmp_path) == before


def test_folder_with_other_files_is_refused(run_script, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert_refused(run_script("train", f"--workdir={tmp_path}", *TINY), "not empty", str(tmp_path))
    assert snapshot(tmp_path) == {"thesis.txt": b"mine"}


def test_teacher_of_another_network_is_refused_with_the_difference(run_script, tmp_path):
    write_config(tmp_path / "teacher", revise(RUN, {"model.num_layers": 7}).pretraining)
    before = snapshot(tmp_path)
    teacher = f"--config.teacher={tmp_path / 'teacher'}"
    process = run_script("train", f"--workdir={tmp_path / 'new'}", *TINY, teacher)
    assert_refused(process, "config.model.num_layers", "7 there", "1 here")
    assert snapshot(tmp_path) == before


def test_teacher_without_a_checkpoint_is_refused_before_the_workdir_is_claimed(run_script, tmp_path):
    write_config(tmp_path / "teacher", RUN.pretraining)
    before = snapshot(tmp_path)
    teacher = f"--config.teacher={tmp_path / 'teacher'}"
    process = run_script("train", f"--workdir={tmp_path / 'new'}", *TINY, teacher)
    assert_refused(process, "no checkpoint", str(tmp_path / "teacher"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint={there}"], ["out"]),
        (["--checkpoint={there}", "--out={there}/a.jpg"], [".png"]),
        (["--checkpoint={there}", "--out={there}/a.png"], ["no checkpoint", "there"]),
        (["--checkpoint={there}/nowhere", "--out={there}/a.png"], ["nowhere", "config.json"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value[-1].startswith("--") else None,
)
def test_sampling_from_nothing_is_refused_in_one_line(run_script, tmp_path, flags, words):
    write_config(tmp_path / "there", RUN.pretraining)
    before = snapshot(tmp_path)
    assert_refused(run_script("sample", *(flag.format(there=tmp_path / "there") for flag in flags)), *words)
    assert snapshot(tmp_path) == before


def test_the_last_stage_of_a_recipe_is_refused_before_the_first_begins(run_script, tmp_path):
    (tmp_path / "3_rcm").mkdir()
    (tmp_path / "3_rcm/thesis.txt").write_text("mine")
    process = run_script("train", f"--workdir={tmp_path}", "--recipe=staged", *TINY)
    assert_refused(process, "3_rcm", "not empty")
    assert snapshot(tmp_path) == {"3_rcm/thesis.txt": b"mine"}

"""Workdirs: whose they are, what may change, and which teachers fit."""

import json
import os

import numpy as np
import pytest
from absl import logging

from configs import cifar10, digits, methods, mixture, wan_1_3b
from rcm_jax.parallel import distributed
from rcm_jax.run import workdir
from rcm_jax.run.experiment import Predictor
from rcm_jax.util.config import flatten, revise, to_mapping

RUN = digits.EXPERIMENT
ADAPTIVE = methods.rcm_adaptive(RUN)
WAN = wan_1_3b.tiny(wan_1_3b.EXPERIMENT)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.smoke
@pytest.mark.parametrize("config", [RUN, RUN.pretraining, Predictor(RUN.model), mixture.EXPERIMENT, WAN], ids=type)
def test_a_new_workdir_is_claimed_by_its_config_and_belongs_to_it(tmp_path, config):
    folder = tmp_path / "a" / "b"
    workdir.claim(folder, config)
    assert workdir.read(folder) == config
    assert set(contents(folder)) == {"config.json"}
    workdir.claim(folder, config)
    assert workdir.read(folder) == config


def test_of_several_processes_the_first_decides_and_the_others_hear_it(tmp_path, monkeypatch):
    """The others may see the folder while the first is making it."""
    (tmp_path / ".config.json.123").touch()
    monkeypatch.setattr(distributed, "first", lambda: False)
    monkeypatch.setattr(distributed, "told_by_first", lambda word: "")
    workdir.claim(tmp_path, RUN)
    monkeypatch.setattr(distributed, "told_by_first", lambda word: "workdir x belongs to another config")
    with pytest.raises(ValueError, match="workdir x belongs to another config"):
        workdir.claim(tmp_path, RUN)
    assert not (tmp_path / "config.json").exists()


def test_an_empty_folder_can_be_claimed(tmp_path):
    workdir.claim(tmp_path, RUN)
    assert workdir.read(tmp_path) == RUN


@pytest.mark.smoke
@pytest.mark.parametrize(("path", "value"), [("seed", 1), ("model.dim", 32), ("pretrain.train.steps", 6)])
def test_a_workdir_of_another_config_is_refused_with_the_difference_and_left_untouched(tmp_path, path, value):
    workdir.claim(tmp_path, RUN)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"{path} is \d+ there, {value} here.* another --workdir"):
        workdir.claim(tmp_path, revise(RUN, {path: value}))
    assert contents(tmp_path) == before


def test_keys_that_one_config_lacks_are_a_difference_and_many_are_counted_not_listed(tmp_path):
    workdir.claim(tmp_path, RUN)
    with pytest.raises(ValueError, match=r"config\.data\.examples is None there, 65536 here.*\(and \d+ more\)"):
        workdir.claim(tmp_path, mixture.EXPERIMENT)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.steps", 4399),
        ("train.log_every", 77),
        ("train.most_skips", 77),
        ("train.leave_out", (3, 17)),
        ("rcm.student.learning_rate", 1e-7),
        ("rcm.fake_score.warmup_steps", 77),
        ("pretrain.method.optimizer.learning_rate", 1e-7),
        ("train.asynchronous", True),
        ("mesh.fsdp", 4),
        ("model.remat", "none"),
        ("sampling.sigma_max", 20.0),
        ("pretrain.train.keep", 7),
    ],
)
def test_what_decides_only_when_to_stop_and_show_may_change(tmp_path, path, value):
    workdir.claim(tmp_path, RUN)
    workdir.claim(tmp_path, revise(RUN, {path: value}))
    assert workdir.read(tmp_path) == revise(RUN, {path: value})
    with pytest.raises(ValueError, match=r"model\.dim"):  # the claim is still of the same config
        workdir.claim(tmp_path, revise(RUN, {"model.dim": 32}))


def test_media_may_come_later(tmp_path):
    workdir.claim(tmp_path, revise(WAN, {"media": None}))
    workdir.claim(tmp_path, WAN)
    assert workdir.read(tmp_path) == WAN


def test_every_key_that_may_change_is_one_that_there_is():
    known = {
        key.removeprefix("config.")
        for run in (RUN, ADAPTIVE, WAN, cifar10.EXPERIMENT)
        for key in flatten(to_mapping(run))
    }
    for listed in (*workdir.MAY_CHANGE, *workdir.SHARED_WITH_TEACHER, *workdir.NOT_SHARED):
        assert any(key == listed or (listed[-1] == "." and key.startswith(listed)) for key in known), listed


def test_a_folder_with_other_files_is_refused_and_left_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty and has no config\.json"):
        workdir.claim(tmp_path, RUN)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, OSError)):
        workdir.claim(tmp_path / "file", RUN)
    assert (tmp_path / "file").read_text() == "mine"


def test_config_of_a_folder_that_is_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no training workdir: it has no config\.json"):
        workdir.read(tmp_path / "nowhere")


def test_a_workdir_in_no_store_that_is_known_is_refused_and_no_folder_of_its_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"ftp:// is no object store that is known here"):
        workdir.claim("ftp://host/run", RUN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSONDecodeError"),
        ('{"seed": 0', "JSONDecodeError"),
        ("[1, 2]", "it holds no keys"),
        ('{"model": {"kind": "dit"}}', "config.model: missing key"),
        ("[" * 100_000, "RecursionError"),
        ('{"a":' * 900 + "1" + "}" * 900, "config: "),
        ('{"seed": %s}' % ("9" * 5000), "Exceeds the limit"),
        ('{"model": {"kind": []}}', "TypeError"),
        ('{"%s": 1}' % ("x" * 100_000), r"… \(100,... characters\)"),
        ('{"rcm": []}', "missing key data, model"),
        ('{"rcm": {"consistency": {"weighting": 1}, "weighting": 2}}', "missing key"),
        ('{"rcm": {"dmd": {"fake_score": 1}}}', "missing key"),
        ('{"pretrain": {"method": {"time": 1, "objective": 3}}}', "pretrain.method.objective is no group of keys"),
        ('{"seed": 0, "seed": 1}', "named twice: seed"),
        ("\xff", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
    ],
)  # fmt: skip
def test_a_broken_config_is_named_with_its_file_in_one_line(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json is no config: [^\n]*{message}") as caught:
        workdir.read(tmp_path)
    assert len(str(caught.value)) < 1500


def test_a_config_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json is a FIFO, not a file$"):
        workdir.read(tmp_path)


def test_a_config_written_before_keys_moved_is_read_as_what_it_meant(tmp_path):
    values = to_mapping(RUN)
    rcm, method = values["rcm"], values["pretrain"]["method"]
    rcm["dmd"] = {key: value for key, value in rcm["dmd"].items() if key != "kind"}
    rcm["dmd"]["fake_score"], rcm["consistency"]["weighting"] = rcm.pop("fake_score"), rcm.pop("weighting")
    rcm["consistency"]["velocity"] = rcm["consistency"].pop("follows")
    method |= method.pop("objective")
    for late in ("teacher_steps", "teacher_sigma_max"):
        del values["sampling"][late]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert workdir.read(tmp_path) == RUN
    values["rcm"]["dmd"], values["train"]["steps"] = None, 1800
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert workdir.read(tmp_path).rcm.name == "sCM"


# --- teachers


def teacher_of(tmp_path, run=RUN, **changes):
    """An experiment whose teacher is in a folder that `run` made."""
    workdir.claim(tmp_path, run)
    return revise(RUN, {"teacher": str(tmp_path)} | changes)


def test_a_teacher_of_the_same_data_and_network_fits_whatever_else_differs(tmp_path):
    theirs = revise(RUN, {"seed": 3, "pretrain.train.steps": 9, "pretrain.method.optimizer.decay_steps": 0})
    assert workdir.check_teacher(teacher_of(tmp_path, theirs.pretraining)) == 9  # where it was finished
    assert set(contents(tmp_path)) == {"config.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.dim": 32}, "config.model.dim is 32 there, 64 here"),
        ({"parametrization": "edm"}, "config.parametrization is edm there, trigflow here"),
        ({"time_scale": 2.0}, "config.time_scale is 2.0 there, 1.0 here"),
    ],
)
def test_a_teacher_of_another_network_is_refused_with_the_difference(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        workdir.check_teacher(teacher_of(tmp_path, revise(RUN.pretraining, change)))


def test_a_student_is_no_teacher(tmp_path):
    with pytest.raises(ValueError, match="holds a distilled student"):
        workdir.check_teacher(teacher_of(tmp_path))


@pytest.mark.parametrize(("key", "value"), [("remat", "none"), ("dtype", "bfloat16"), ("attention", "reference")])
def test_how_a_network_is_computed_does_not_make_it_another_network(tmp_path, key, value):
    workdir.check_teacher(teacher_of(tmp_path, revise(RUN.pretraining, {f"model.{key}": value})))


def test_converted_weights_fit_whatever_the_data(tmp_path):
    workdir.write_converted(tmp_path / "t", Predictor(RUN.model), {"a": np.zeros(3, np.float32)})
    assert workdir.check_teacher(revise(RUN, {"teacher": str(tmp_path / "t")})) == 0
    with pytest.raises(ValueError, match=r"config.time_scale is 1.0 there, 1000.0 here"):
        workdir.check_teacher(revise(RUN, {"teacher": str(tmp_path / "t"), "time_scale": 1000.0}))
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_full_disk_is_told_once_and_nothing_is_left(tmp_path, monkeypatch, caplog):
    def full(folder, *_):
        logging.error("Traceback (most recent call last)")
        where = f'"{folder}/checkpoints/0/ema/a/0.0"'
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing {where}: Failed writing {where}: No space left on device")

    monkeypatch.setattr(workdir.checkpoint, "write_params", full)
    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{tmp_path}/new'$"):
        workdir.write_converted(tmp_path / "new", Predictor(RUN.model), {"a": np.zeros(3, np.float32)})
    assert not list(tmp_path.iterdir()) and not caplog.records


def test_converted_weights_are_not_written_over_anything(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder: choose another"):
        workdir.write_converted(tmp_path, Predictor(RUN.model), {"a": np.zeros(3, np.float32)})
    assert set(contents(tmp_path)) == {"thesis.txt"}


def test_data_may_have_moved_but_not_changed_their_shape(tmp_path):
    theirs = revise(WAN, {"pretrain": RUN.pretrain, "data.path": "old"}).pretraining
    workdir.claim(tmp_path, theirs)
    ours = revise(WAN, {"teacher": str(tmp_path), "data.path": "new"})
    assert workdir.check_teacher(ours) == 5000
    with pytest.raises(ValueError, match=r"config.data.shape is \[2, 4, 6, 4\] there, \[2, 4, 6, 8\] here"):
        workdir.check_teacher(revise(ours, {"data.shape": (2, 4, 6, 8)}))

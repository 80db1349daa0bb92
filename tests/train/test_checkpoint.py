"""Workdirs and what is in them."""

import copy
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.run.experiment import check_teacher
from rcm_jax.train import checkpoint
from tests.tiny import assert_trees_equal

VALUES = {"seed": 0, "model": {"dim": 16}, "pretrain": {"train": {"steps": 5}}, "train": {"steps": 10, "log_every": 5}}
VALUES["mesh"] = {"fsdp": 1}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def changed(path, value):
    values = copy.deepcopy(VALUES)
    group, *rest = path.split(".")
    target = values
    for name in (group, *rest)[:-1]:
        target = target[name]
    target[path.split(".")[-1]] = value
    return values


@pytest.mark.smoke
def test_a_new_workdir_is_claimed_by_its_config_and_belongs_to_it(tmp_path):
    workdir = tmp_path / "a" / "b"
    checkpoint.claim_workdir(workdir, VALUES)
    assert checkpoint.read_config(workdir) == VALUES
    assert set(contents(workdir)) == {"config.json"}
    checkpoint.claim_workdir(workdir, VALUES)
    assert checkpoint.read_config(workdir) == VALUES


def test_an_empty_folder_can_be_claimed(tmp_path):
    checkpoint.claim_workdir(tmp_path, VALUES)
    assert checkpoint.read_config(tmp_path) == VALUES


def test_tuples_and_lists_are_the_same_config(tmp_path):
    checkpoint.claim_workdir(tmp_path, VALUES | {"times": ((), (1.0,))})
    checkpoint.claim_workdir(tmp_path, VALUES | {"times": [[], [1.0]]})
    assert checkpoint.read_config(tmp_path)["times"] == [[], [1.0]]


@pytest.mark.smoke
@pytest.mark.parametrize(("path", "value"), [("seed", 1), ("model.dim", 32), ("pretrain.train.steps", 6)])
def test_a_workdir_of_another_config_is_refused_with_the_difference_and_left_untouched(tmp_path, path, value):
    checkpoint.claim_workdir(tmp_path, VALUES)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"{path} is \d+ there, {value} here.* another --workdir"):
        checkpoint.claim_workdir(tmp_path, changed(path, value))
    assert contents(tmp_path) == before


def test_keys_that_one_config_lacks_are_a_difference(tmp_path):
    checkpoint.claim_workdir(tmp_path, VALUES)
    with pytest.raises(ValueError, match=r"config\.extra is None there, 1 here"):
        checkpoint.claim_workdir(tmp_path, VALUES | {"extra": 1})


def test_many_differences_are_counted_not_listed(tmp_path):
    checkpoint.claim_workdir(tmp_path, {f"k{i}": i for i in range(9)})
    with pytest.raises(ValueError, match=r"\(and 4 more\)"):
        checkpoint.claim_workdir(tmp_path, {f"k{i}": -1 - i for i in range(9)})


@pytest.mark.parametrize("path", ["train.steps", "train.log_every", "train.asynchronous", "mesh.fsdp", "model.remat"])
def test_what_decides_only_when_to_stop_and_show_may_change(tmp_path, path):
    checkpoint.claim_workdir(tmp_path, VALUES)
    checkpoint.claim_workdir(tmp_path, changed(path, 77))
    with pytest.raises(ValueError, match=r"model\.dim"):  # the claim is still of the same config
        checkpoint.claim_workdir(tmp_path, changed("model.dim", 77))


def test_a_folder_with_other_files_is_refused_and_left_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty and has no config\.json"):
        checkpoint.claim_workdir(tmp_path, VALUES)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, OSError)):
        checkpoint.claim_workdir(tmp_path / "file", VALUES)
    assert (tmp_path / "file").read_text() == "mine"


def test_config_of_a_folder_that_is_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no training workdir: it has no config\.json"):
        checkpoint.read_config(tmp_path / "nowhere")


def test_a_workdir_in_an_object_store_is_refused_and_no_folder_of_its_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"gs:.*only folders of this machine"):
        checkpoint.claim_workdir("gs://bucket/run", {"seed": 0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[1, 2]"])
def test_a_broken_config_is_named_with_its_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        checkpoint.read_config(tmp_path)


def abstract():
    return {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}


def test_item_of_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint in .*"):
        checkpoint.restore_item(tmp_path, "ema", abstract())
    assert list(tmp_path.iterdir()) == []


def test_item_of_a_step_that_was_not_kept_names_those_that_were(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"any step .*: none"):
        checkpoint.restore_item(tmp_path, "ema", abstract())
    with pytest.raises(ValueError, match=r"step 7 .*: none"):
        checkpoint.restore_item(tmp_path, "ema", abstract(), step=7)


# --- teachers


NETWORK = {
    "data": {"kind": "digits"},
    "parametrization": "trigflow",
    "time_scale": 1.0,
    "model": {"kind": "dit", "dim": 16},
}


def test_a_teacher_of_the_same_data_and_network_fits_whatever_else_differs(tmp_path):
    checkpoint.claim_workdir(tmp_path, NETWORK | {"seed": 3, "pretrain": {"train": {"steps": 9}}})
    assert check_teacher(NETWORK | {"seed": 0, "teacher": str(tmp_path), "rcm": {}}) == 9  # where it was finished
    assert set(contents(tmp_path)) == {"config.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"kind": "dit", "dim": 32}}, "config.model.dim is 32 there, 16 here"),
        ({"parametrization": "edm"}, "config.parametrization is edm there, trigflow here"),
        ({"time_scale": 2.0}, "config.time_scale is 2.0 there, 1.0 here"),
    ],
)
def test_a_teacher_of_another_network_is_refused_with_the_difference(tmp_path, change, message):
    checkpoint.claim_workdir(tmp_path, NETWORK | change)
    with pytest.raises(ValueError, match=message):
        check_teacher(NETWORK | {"teacher": str(tmp_path), "rcm": {}})


def test_a_teacher_from_before_a_key_was_added_has_its_default(tmp_path):
    there = {"kind": "wan", "dim": 24, "num_heads": 2}
    checkpoint.claim_workdir(tmp_path, NETWORK | {"model": there, "pretrain": {"train": {"steps": 9}}})
    ours = NETWORK | {"teacher": str(tmp_path), "rcm": {}}
    assert check_teacher(ours | {"model": there | {"clip_dim": 0, "patch_size": (1, 2, 2)}}) == 9
    with pytest.raises(ValueError, match=r"config\.model\.clip_dim is 0 there, 40 here"):
        check_teacher(ours | {"model": there | {"clip_dim": 40}})


def test_a_student_is_no_teacher(tmp_path):
    checkpoint.claim_workdir(tmp_path, NETWORK | {"rcm": {}})
    with pytest.raises(ValueError, match="holds a distilled student"):
        check_teacher(NETWORK | {"teacher": str(tmp_path), "rcm": {}})


@pytest.mark.parametrize("key", ["remat", "dtype", "attention"])
def test_how_a_network_is_computed_does_not_make_it_another_network(tmp_path, key):
    theirs = NETWORK | {"model": NETWORK["model"] | {key: 1}, "pretrain": {"train": {"steps": 9}}}
    checkpoint.claim_workdir(tmp_path, theirs)
    check_teacher(NETWORK | {"model": NETWORK["model"] | {key: 2}, "teacher": str(tmp_path), "rcm": {}})


def test_converted_weights_fit_whatever_the_data(tmp_path):
    params = {"a": np.zeros(3, np.float32)}
    values = {key: NETWORK[key] for key in ("model", "parametrization", "time_scale")}
    checkpoint.write_params(tmp_path / "t", values, params)
    assert check_teacher(NETWORK | {"teacher": str(tmp_path / "t"), "rcm": {}}) == 0
    with pytest.raises(ValueError, match=r"config.time_scale is 1.0 there, 1000.0 here"):
        check_teacher(NETWORK | {"teacher": str(tmp_path / "t"), "rcm": {}, "time_scale": 1000.0})


def test_data_may_have_moved_but_not_changed_their_kind_or_shape(tmp_path):
    there = {"kind": "latents", "path": "old", "shape": [2, 4, 4, 3]}
    checkpoint.claim_workdir(tmp_path, NETWORK | {"data": there, "pretrain": {"train": {"steps": 9}}})
    ours = NETWORK | {"teacher": str(tmp_path), "rcm": {}}
    assert check_teacher(ours | {"data": there | {"path": "new"}}) == 9
    with pytest.raises(ValueError, match=r"config.data.shape is \[2, 4, 4, 3\] there, \[2, 4, 4, 4\] here"):
        check_teacher(ours | {"data": there | {"shape": [2, 4, 4, 4]}})


# --- parameters that were not trained here


def some_params():
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(size=(3, 8, 16)).astype(np.float32), rng.normal(size=5).astype(ml_dtypes.bfloat16)
    return {"blocks": {"kernel": wide}, "bias": narrow}


@pytest.mark.smoke
def test_parameters_are_written_and_read_to_the_bit_in_the_dtypes_they_have(tmp_path):
    checkpoint.write_params(tmp_path / "new", {"model": 1}, some_params())
    assert checkpoint.read_config(tmp_path / "new") == {"model": 1}
    params, step = checkpoint.restore_params(tmp_path / "new", "ema")
    assert step == 0
    assert jax.tree.map(lambda p: p.dtype, params) == jax.tree.map(lambda p: p.dtype, some_params())
    assert_trees_equal(params, some_params())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_parameters_are_restored_onto_a_mesh_in_the_dtype_asked_for(tmp_path):
    checkpoint.write_params(tmp_path / "new", {"model": 1}, some_params())
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    spec = {"blocks": {"kernel": PartitionSpec(None, "fsdp")}, "bias": PartitionSpec()}
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)
    as_float32 = jax.tree.map(lambda p: p.astype(np.float32), some_params())
    restored = checkpoint.restore_item(tmp_path / "new", "ema", checkpoint.abstract_like(as_float32, shardings))
    assert jax.tree.map(lambda p: p.sharding, restored) == shardings
    assert_trees_equal(restored, as_float32)


def test_large_arrays_are_written_in_pieces(tmp_path, monkeypatch):
    """So that a host which needs a part of an array does not read all of it."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 256)
    checkpoint.write_params(tmp_path / "new", {"model": 1}, some_params())
    folder = tmp_path / "new" / "checkpoints" / "0" / "ema" / "blocks.kernel"
    chunks = json.loads((folder / ".zarray").read_text())["chunks"]
    assert np.prod(chunks) * 4 <= 256
    assert len([path for path in folder.iterdir() if not path.name.startswith(".")]) == 3 * 8 * 16 // np.prod(chunks)
    assert_trees_equal(checkpoint.restore_params(tmp_path / "new", "ema")[0], some_params())


def test_parameters_are_not_written_over_anything_nor_by_half(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder: choose another"):
        checkpoint.write_params(tmp_path / "taken", {}, some_params())
    with pytest.raises(TypeError):  # JSON knows no sets
        checkpoint.write_params(tmp_path / "new", {"model": {1, 2}}, some_params())
    assert set(contents(tmp_path)) == {"taken/thesis.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_network_that_a_checkpoint_lacks_is_named_with_those_it_has(tmp_path):
    checkpoint.write_params(tmp_path / "new", {"model": 1}, some_params())
    with pytest.raises(ValueError, match=r"step 0 in .*new has no student; it has ema"):
        checkpoint.restore_params(tmp_path / "new", "student")
    with pytest.raises(ValueError, match=r"no checkpoint of step 3 in .*; steps there: \[0\]"):
        checkpoint.restore_params(tmp_path / "new", "ema", 3)

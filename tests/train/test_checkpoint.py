"""Checkpoints: what is restored, and how parameters that were not trained here are written."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.train import checkpoint
from tests.tiny import assert_trees_equal


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


# --- parameters that were not trained here


def some_params():
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(size=(3, 8, 16)).astype(np.float32), rng.normal(size=5).astype(ml_dtypes.bfloat16)
    return {"blocks": {"kernel": wide}, "bias": narrow}


@pytest.mark.smoke
def test_parameters_are_written_and_read_to_the_bit_in_the_dtypes_they_have(tmp_path):
    checkpoint.write_params(tmp_path / "new", some_params())
    params, step = checkpoint.restore_params(tmp_path / "new", "ema")
    assert step == 0
    assert jax.tree.map(lambda p: p.dtype, params) == jax.tree.map(lambda p: p.dtype, some_params())
    assert_trees_equal(params, some_params())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_parameters_are_restored_onto_a_mesh_in_the_dtype_asked_for(tmp_path):
    checkpoint.write_params(tmp_path / "new", some_params())
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
    checkpoint.write_params(tmp_path / "new", some_params())
    folder = tmp_path / "new" / "checkpoints" / "0" / "ema" / "blocks.kernel"
    chunks = json.loads((folder / ".zarray").read_text())["chunks"]
    assert np.prod(chunks) * 4 <= 256
    assert len([path for path in folder.iterdir() if not path.name.startswith(".")]) == 3 * 8 * 16 // np.prod(chunks)
    assert_trees_equal(checkpoint.restore_params(tmp_path / "new", "ema")[0], some_params())


def test_a_network_that_a_checkpoint_lacks_is_named_with_those_it_has(tmp_path):
    checkpoint.write_params(tmp_path / "new", some_params())
    with pytest.raises(ValueError, match=r"step 0 in .*new has no student; it has ema"):
        checkpoint.restore_params(tmp_path / "new", "student")
    with pytest.raises(ValueError, match=r"no checkpoint of step 3 in .*; steps there: \[0\]"):
        checkpoint.restore_params(tmp_path / "new", "ema", 3)

"""scripts/merge_checkpoints.py as a user runs it: the known recipe on tiny networks, and what is refused."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert.files import open_tensors, write_tensors
from rcm_jax.run import workdir
from rcm_jax.run.experiment import Predictor
from tests import wan
from tests.scripts.conftest import assert_refused, snapshot

PATCH = "patch_embedding.weight"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tensors_of(config, key, layout="official", dtype=np.float32):
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), wan.random_params(config, key))
    return convert.to_reference("wan", params, config, layout)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Image to video in bfloat16, text to video as it is published, and what rCM made of it under NVlabs' names."""
    folder = tmp_path_factory.mktemp("published")
    write_tensors(folder / "i2v", tensors_of(wan.I2V, 0, dtype=BFLOAT16), shard_bytes=20_000)
    write_tensors(folder / "t2v", tensors_of(wan.TINY, 1))
    rcm = {f"net.{name}": tensor for name, tensor in tensors_of(wan.TINY, 2, "rcm").items()}
    write_tensors(folder / "rcm", rcm)
    for name, config in (("i2v", wan.I2V), ("t2v", wan.TINY)):
        (folder / f"{name}.json").write_text(json.dumps(dataclasses.asdict(config) | {"kind": "wan"}))
    return folder


def flags_of(published, *rest, model="i2v", base="i2v"):
    return [f"--model={published / model}.json", f"--base={published / base}", *rest]


def test_what_rcm_made_of_text_to_video_is_added_to_image_to_video(run_script, tmp_path, published):
    term = f"--term=0.75,{published / 'rcm'},{published / 't2v'}"
    flags = flags_of(published, term, f"--skip={PATCH}", f"--dst={tmp_path / 'out'}", "--shard_gb=1e-5")
    process = run_script("merge_checkpoints", *flags)
    assert process.returncode == 0, process.stderr
    assert f"as in {published / 'i2v'}: {PATCH}\n" in process.stdout and "+0.75 × (" in process.stdout
    written = open_tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / "out/config.json").read_text())["in_dim"] == 9
    base, a, b = tensors_of(wan.I2V, 0, dtype=BFLOAT16), tensors_of(wan.TINY, 2), tensors_of(wan.TINY, 1)
    assert written.keys() == base.keys()
    for name, tensor in base.items():
        exact = tensor.astype(np.float64)
        exact = exact if name == PATCH else exact + 0.75 * (a[name].astype(np.float64) - b[name])
        np.testing.assert_array_equal(np.asarray(written[name]), exact.astype(BFLOAT16), err_msg=name, strict=True)


def test_the_difference_to_the_base_itself_gives_the_other_to_the_bit_also_of_a_workdir(
    run_script, tmp_path, published
):
    params = jax.tree.map(np.asarray, wan.random_params(wan.TINY, 2))
    workdir.write_converted(tmp_path / "own", Predictor(wan.TINY), params)
    flags = flags_of(published, f"--dst={tmp_path / 'out'}", model="t2v", base="t2v")
    process = run_script("merge_checkpoints", *flags, f"--term=1,{tmp_path / 'own'},{published / 't2v'}")
    assert process.returncode == 0, process.stderr
    assert "as in" in process.stdout and "no tensor" in process.stdout
    written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    for name, tensor in tensors_of(wan.TINY, 2).items():
        assert written[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name


def test_what_is_there_is_kept_unless_it_may_be_written_over(run_script, tmp_path, published):
    term = f"--term=1,{published / 'rcm'},{published / 't2v'}"
    out = tmp_path / "out"
    flags = flags_of(published, term, f"--dst={out}", model="t2v", base="t2v")
    process = run_script("merge_checkpoints", *flags, "--dry_run")
    assert process.returncode == 0 and "nothing was written" in process.stdout and not out.exists()
    write_tensors(out, {"x": np.zeros(3, np.float32)})
    before = snapshot(tmp_path)
    assert_refused(run_script("merge_checkpoints", *flags), "out is there", "--overwrite")
    assert snapshot(tmp_path) == before
    process = run_script("merge_checkpoints", *flags, "--overwrite")
    assert process.returncode == 0, process.stderr
    assert open_tensors(out).keys() == tensors_of(wan.TINY, 0).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    assert_refused(run_script("merge_checkpoints", *flags, "--overwrite"), "holds notes.txt")
    assert (out / "notes.txt").exists()


def test_what_does_not_fit_is_refused_in_one_line(run_script, tmp_path, published):
    a, b = published / "rcm", published / "t2v"
    new, term = f"--dst={tmp_path / 'new'}", f"--term=1,{a},{b}"
    i2v = flags_of(published, new)
    for flags, words in (
        ([*i2v, term], [str(a), PATCH, "--skip=NAME leaves a tensor as it is in base"]),
        ([*i2v, term, "--skip=nothing.*"], ["--skip=nothing.* is the name of no tensor"]),
        ([*i2v, f"--term=1,{a}"], ["must be WEIGHT,A,B"]),
        ([*i2v, f"--term=much,{a},{b}"], ["--term=much", "must be WEIGHT,A,B"]),
        ([*i2v, f"--term=1,{tmp_path / 'none'},{b}"], ["none", "no such file"]),
        (flags_of(published, new, term, model="t2v"), ["i2v", PATCH, "must be [24, 4, 1, 2, 2]"]),
    ):
        assert_refused(run_script("merge_checkpoints", *flags), *words)
    assert list(tmp_path.iterdir()) == []

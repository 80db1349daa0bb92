"""Sets of latents for readers of TFDS: what is read there is what the set holds, to the bit, and without TensorFlow."""

import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.data import latents, records, tfds_builder
from rcm_jax.data.tfds_builder import to_tfds
from tests.data.test_latents import SHAPE, SMALL, UNCOND, example, two_shapes, wide, written  # noqa: F401 (a fixture)
from tests.data.test_tfds import WITHOUT
from tests.scripts.conftest import snapshot
from tests.stores import contents

READ = (
    WITHOUT
    + """
import ml_dtypes
import numpy as np
import safetensors.numpy
import tensorflow_datasets as tfds
data_dir, name, out = sys.argv[1:]
for split in ("train", "uncond"):
    source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    for i in range(len(source)):
        tensors = {name: np.asarray(array) for name, array in source[i].items()}
        safetensors.numpy.save_file(tensors, f"{out}/{split}-{i}.safetensors")
print(tfds.builder(name, data_dir=data_dir).info.metadata["uncond"])
assert not {"tensorflow", "jax"} & set(sys.modules)
"""
)


def run(*arguments):
    process = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def read(data_dir, name, out):
    """{file: tensors} of what a process that knows TFDS alone reads, and what the metadata say of uncond."""
    out.mkdir()
    told = run("-c", READ, data_dir, name, out)
    return {path.stem: records.decode(path.read_bytes(), path) for path in out.iterdir()}, told.strip()


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        array = np.asarray(array)
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.smoke
def test_a_set_is_read_to_the_bit_by_tfds(tmp_path):
    others = {"y": np.arange(6, dtype=np.float16).reshape(2, 3), "label": np.int32(7)}
    examples = [example(i, jnp.bfloat16, **others) for i in range(5)]
    latents.write(tmp_path / "my_set", examples, UNCOND, shard_bytes=1500)
    command = ["-m", "rcm_jax.data.tfds_builder", f"--set={tmp_path / 'my_set'}", f"--data_dir={tmp_path / 'tfds'}"]
    code = (
        f"{WITHOUT}\nimport runpy; sys.argv = ['it', *sys.argv[1:]]; runpy.run_module({command[1]!r}, None, '__main__')"
    )
    told = run("-c", code, *command[2:])
    name = "my_set/2x3x4x5"
    assert told.splitlines()[-1] == f'tfds.data_source("{name}", split="train", data_dir="{tmp_path / "tfds"}")'
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["my_set"]
    found, names = read(tmp_path / "tfds", name, tmp_path / "out")
    uncond = found.pop("uncond-0")
    assert names == "['text']" and found.keys() == {f"train-{i}" for i in range(5)}
    for i, wanted in enumerate(examples):
        same(found[f"train-{i}"], wanted)
    zeros = {key: np.zeros_like(array) for key, array in examples[0].items()}
    same(uncond, zeros | UNCOND)


def test_shapes_are_configs(two_shapes, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tfds_builder, "SHARD", 1000)  # bytes: two or three examples
    names = to_tfds(two_shapes, tmp_path / "tfds", "other")
    assert names == ["other/2x3x4x5", "other/2x2x2x5"]
    assert len(list((tmp_path / "tfds/other/2x3x4x5/1.0.0").glob("other-train.array_record-*"))) > 1
    for name, shape, members in zip(names, (SHAPE, SMALL), (range(5), range(5, 8)), strict=True):
        found, _ = read(tmp_path / "tfds", name, tmp_path / name[-7:])
        assert found.keys() == {"uncond-0"} | {f"train-{i}" for i in range(len(members))}
        for i, member in enumerate(members):
            same(found[f"train-{i}"], example(member) | wide(member, shape))


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"the name 'a-set' must be of letters, digits and _, .*: --name"):
        to_tfds(written(tmp_path / "a-set", 2), tmp_path / "tfds")
    with pytest.raises(FileNotFoundError, match=r"none/set\.json"):
        to_tfds(tmp_path / "none", tmp_path / "tfds")
    assert not (tmp_path / "tfds").exists()
    assert to_tfds(tmp_path / "a-set", tmp_path / "tfds", "two") == ["two/2x3x4x5"]
    with pytest.raises(ValueError, match=r"tfds/two/2x3x4x5/1\.0\.0 is there and not an empty folder: choose another"):
        to_tfds(tmp_path / "a-set", tmp_path / "tfds", "two")


def test_a_set_is_written_to_an_object_store(tmp_path, s3, monkeypatch):
    monkeypatch.setenv("RCM_CACHE", str(tmp_path / "cache"))
    bucket = s3("tfds-of-latents")
    for data_dir in (tmp_path / "tfds", f"{bucket}/tfds"):
        assert to_tfds(written(tmp_path / "a-set", 2), data_dir, "two") == ["two/2x3x4x5"]
        shutil.rmtree(tmp_path / "a-set")
    assert contents(f"{bucket}/tfds") == snapshot(tmp_path / "tfds")
    with pytest.raises(ValueError, match=r"tfds/two/2x3x4x5/1\.0\.0 is there and not an empty folder"):
        to_tfds(written(tmp_path / "a-set", 2), f"{bucket}/tfds", "two")

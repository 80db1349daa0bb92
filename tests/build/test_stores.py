"""Sets that are built in an object store and read from it."""

import numpy as np
import pytest

from rcm_jax import data
from rcm_jax.build.verify import verify
from rcm_jax.data import LatentsConfig
from rcm_jax.data.latents import write
from tests.build.killed import COUNT, SHAPES, build, source
from tests.stores import contents


@pytest.fixture(scope="module")
def bucket(s3):
    return s3("sets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RCM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_set_is_built_in_a_store_as_on_a_disk_and_read_when_it_is_asked_for(bucket, tmp_path, cache):
    assert [build(f"{bucket}/set", source(), worker, 2) for worker in (1, 0)] == [None, COUNT]
    assert build(f"{bucket}/set", source()) == COUNT
    build(tmp_path / "set", source())
    there = contents(f"{bucket}/set")
    assert there.keys() == {path.name for path in (tmp_path / "set").iterdir()}
    assert there["examples.jsonl"] == (tmp_path / "set/examples.jsonl").read_bytes()
    ours, theirs = (data.load(LatentsConfig(str(place), SHAPES[1])) for place in (tmp_path / "set", f"{bucket}/set"))
    assert len([path for path in cache.rglob("*") if path.name.endswith(".array_record")]) == 2  # one of each shape
    for rows in ours.train.buckets:
        np.testing.assert_array_equal(theirs.train[rows]["x0"], ours.train[rows]["x0"])
    assert verify(f"{bucket}/set") == COUNT
    with pytest.raises(ValueError, match="is being built from something else: count: 60 there, 59 here"):
        build(f"{bucket}/set", source(59))


def test_examples_are_written_to_a_store(bucket):
    x0, text = np.ones((1, 2, 3, 4), np.float32), np.zeros((2, 3), np.float32)
    write(f"{bucket}/written", [{"x0": x0, "text": text}], {"text": text})
    assert len(data.load(LatentsConfig(f"{bucket}/written", x0.shape)).train) == 1

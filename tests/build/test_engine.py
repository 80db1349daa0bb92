"""Sets are the same however they were built; what is bad is told, and skipped only if asked for."""

import json
import pathlib
import re
import subprocess
import sys
import threading
from concurrent import futures

import numpy as np
import pytest

from rcm_jax import data
from rcm_jax.build import engine
from rcm_jax.build.verify import verify
from rcm_jax.data import LatentsConfig, records
from rcm_jax.data.latents import shard_paths
from tests.build.killed import COUNT, SHAPES, build, items, make, source

ROOT = pathlib.Path(__file__).resolve().parents[2]


def content(folder) -> list[bytes]:
    """All records in their order, and what is told of them."""
    found = [record for path in shard_paths(folder) for record in records.open_shard(path)]
    return [*found, (folder / "examples.jsonl").read_bytes()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "whole"
    assert build(folder, source()) == COUNT
    return folder


@pytest.mark.smoke
def test_a_set_is_read_as_it_was_made(whole):
    names = {path.name for path in whole.iterdir()}
    assert {name for name in names if "latents" not in name} == {
        "plan.json", "set.json", "examples.jsonl", "uncond.safetensors"
    }  # fmt: skip
    dataset = data.load(LatentsConfig(str(whole), SHAPES[1]))
    assert len(dataset.train) == COUNT and dataset.shapes == list(SHAPES[::-1])
    lines = [json.loads(line) for line in (whole / "examples.jsonl").read_text().splitlines()]
    assert sorted(line["seed"] for line in lines) == list(range(COUNT))
    for row in (0, 25, COUNT - 1):
        batch, line = dataset.train[np.array([row])], lines[row]
        (item,) = (item for item in items() if item.key == line["key"])
        np.testing.assert_array_equal(batch["x0"][0], make([item], [item.key], None)[0]["x0"])
        assert (line["example"], line["prompt"]) == (row, item.prompt)
        assert batch["cond"]["text"].item() == item.origin["seed"] // 2
    told = json.loads((whole / "set.json").read_text())
    assert told["made_from"]["kind"] == "test" and "jax" in told["versions"]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_points_a_set_is_the_undisturbed_one(whole, tmp_path, seed):
    command = [sys.executable, "-m", "tests.build.killed", str(tmp_path / "set"), str(seed), "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10, "hardly anything was killed in its work"
    assert content(tmp_path / "set") == content(whole)
    assert {path.name for path in (tmp_path / "set").iterdir()} == {path.name for path in whole.iterdir()}


def test_workers_share_the_work_and_the_last_one_closes_the_set(whole, tmp_path):
    folder = tmp_path / "set"
    assert [build(folder, source(), worker, 3) for worker in (2, 0, 1)] == [None, None, COUNT]
    assert content(folder) == content(whole)
    assert build(folder, source()) == COUNT  # there is nothing left to do
    assert content(folder) == content(whole)


def test_a_folder_belongs_to_what_it_was_begun_with(tmp_path):
    folder = tmp_path / "set"
    build(folder, source(), worker=1, workers=2)
    with pytest.raises(ValueError, match="is being built from something else: count: 60 there, 59 here; items: "):
        build(folder, source(59))
    with pytest.raises(ValueError, match="kind: test there, other here"):
        build(folder, source(settings={"kind": "other"}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there and not an empty folder"):
        build(tmp_path / "other", source())
    twice = [*items(2), items(2)[0]]
    with pytest.raises(ValueError, match=r"^item 0 is there twice"):
        build(tmp_path / "twice", source(items=twice))
    with pytest.raises(ValueError, match=r"^0 items"):
        build(tmp_path / "none", source(items=[]))


def spoiled(where: str, batch: int = 1):
    """The source, of whose items 4 and 9 are bad."""

    def bad(key):
        return key in ("item 4", "item 9")

    def prepare(item):
        if where == "prepare" and bad(item.key):
            raise OSError(f"{item.key}.mp4 does not decode")
        return item.key

    def spoil(some, prepared, texts):
        if where == "make" and any(bad(item.key) for item in some):
            raise ValueError("its shape is wrong")
        made = make(some, prepared, texts)
        for item, example in zip(some, made, strict=True):
            if where == "nan" and bad(item.key):
                example["x0"][0, 0, 0, 0] = np.nan
            if where == "shape" and bad(item.key):
                example["x0"] = example["x0"][:, :1]
        return made

    return source(batch=batch, prepare=prepare, make=spoil)


@pytest.mark.parametrize(
    ("where", "batch", "message"),
    [
        ("prepare", 1, "item 9: item 9.mp4 does not decode. (--most_skipped=0"),
        ("prepare", 3, "item 9: item 9.mp4 does not decode. (--most_skipped=0"),
        ("make", 1, "item 9: its shape is wrong. (--most_skipped=0"),
        ("nan", 3, "item 9: its tensors: 1 of 24 elements of x0 are not finite"),
        ("shape", 3, "item 9: x0 is [1, 1, 3, 4], not [1, 2, 3, 4]"),
    ],
)
def test_what_is_bad_ends_it_or_is_skipped_and_counted(tmp_path, where, batch, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build(tmp_path / "set", spoiled(where, batch))
    with pytest.raises(ValueError, match=r"^item 4: "):
        build(tmp_path / "set", spoiled(where, batch), most_skipped=1)
    assert build(tmp_path / "set", spoiled(where, batch), most_skipped=2) == COUNT - 2
    assert [skip["key"] for skip in json.loads((tmp_path / "set/set.json").read_text())["skipped"]] == [
        "item 9", "item 4"
    ]  # fmt: skip
    dataset = data.load(LatentsConfig(str(tmp_path / "set"), SHAPES[0]))
    assert len(dataset.train) == COUNT - 2
    assert verify(tmp_path / "set") == COUNT - 2


def test_what_was_skipped_counts_also_after_a_restart(tmp_path):
    def stop(shard, some, examples):
        if shard.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "set", spoiled("prepare"), most_skipped=2, made=stop)
    with pytest.raises(ValueError, match=r"^item 4"):
        build(tmp_path / "set", spoiled("prepare"), most_skipped=1)


def test_examples_of_several_kinds_do_not_make_a_set(tmp_path):
    def other(some, prepared, texts):
        made = make(some, prepared, texts)
        return [example | {"y": np.zeros(2, np.float32)} if "7" in item.key else example
                for item, example in zip(some, made, strict=True)]  # fmt: skip

    with pytest.raises(ValueError, match=r"the examples are not alike: item \d+: .*; item \d*7: .* y float32"):
        build(tmp_path / "set", source(make=other))
    assert not (tmp_path / "set/set.json").exists()


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "line", "set", "nan"])
def test_verify_names_what_is_not_as_it_was_written(tmp_path, damage):
    folder = tmp_path / "set"
    build(folder, source())
    assert verify(folder) == COUNT
    path = shard_paths(folder)[2]
    if damage == "byte":
        content = bytearray(path.read_bytes())
        content[content.index(b'"x0"') + 120] ^= 1
        path.write_bytes(content)
        message = rf"^{path}: record \d+ \(example \d+, item \d+\) (cannot be read|is not what was written)"
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
        message = rf"^{path} is damaged or no array_record file"
    elif damage == "gone":
        path.unlink()
        message = f"^{folder} has 7 of 8 files of latents; missing: 2"
    elif damage == "line":
        lines = (folder / "examples.jsonl").read_text().splitlines(keepends=True)
        (folder / "examples.jsonl").write_text("".join(lines[:-1]))
        message = "tells of 59 examples, the files hold 60"
    elif damage == "set":
        told = json.loads((folder / "set.json").read_text())
        told["shards"][0]["shape"][0] = 7
        (folder / "set.json").write_text(json.dumps(told))
        message = r"item 0\): x0 is \[1, 2, 3, 4\], set.json says \[7, 2, 3, 4\]"
    else:
        tensors = {"x0": np.full(SHAPES[0], np.nan, np.float32), "text": np.zeros((1, 1), np.float32)}
        records.write_shard(path, [records.encode(tensors)] * 8)
        (folder / "examples.jsonl").unlink()
        message = rf"^{path}: record 0 \(example 16\): 24 of 24 elements of x0 are not finite"
    with pytest.raises(ValueError, match=message):
        verify(folder)


def test_a_folder_that_is_not_whole_is_not_trained_on(tmp_path):
    build(tmp_path / "set", source(), worker=0, workers=2)
    with pytest.raises(ValueError, match="files of latents; missing: 1, 3"):
        data.load(LatentsConfig(str(tmp_path / "set"), SHAPES[0]))
    assert engine.versions()["device"]


def test_what_was_bad_from_the_beginning_counts_as_skipped(tmp_path):
    known = {"b.mp4": "b.mp4 does not decode", "a.tar": "a.tar is truncated"}
    with pytest.raises(ValueError, match=r"^a\.tar: a\.tar is truncated\. \(--most_skipped=1"):
        build(tmp_path / "set", source(bad=known), most_skipped=1)
    assert build(tmp_path / "set", source(bad=known), most_skipped=2) == COUNT
    told = json.loads((tmp_path / "set/set.json").read_text())["skipped"]
    assert {skip["key"]: skip["error"] for skip in told} == known
    with pytest.raises(ValueError, match=r"^0 items in shards of 8: .*; b\.mp4: b\.mp4 does not decode"):
        build(tmp_path / "none", source(bad=known, items=[]))


def test_what_guidance_replaces_must_be_like_the_examples(tmp_path):
    with pytest.raises(ValueError, match=r"uncond\.safetensors holds text float32 \[2, 1\], but the cond"):
        build(tmp_path / "set", source(), uncond=np.zeros((2, 1), np.float32))


def test_many_workers_may_start_at_once(tmp_path):
    for i in range(20):
        plan, gate = engine.make_plan(tmp_path / str(i), source(), 8, {}), threading.Barrier(8)

        def start(plan=plan, gate=gate):
            gate.wait()
            engine.claim(plan)
            (plan.folder / "uncond.safetensors").write_bytes(b"")

        with futures.ThreadPoolExecutor(8) as pool:
            for started in [pool.submit(start) for _ in range(8)]:
                started.result()

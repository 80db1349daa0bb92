"""Latents on disk: what is written is read, to the bit; bad folders and bad examples are told."""

import itertools
import json
import os
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from rcm_jax import data
from rcm_jax.data import LatentsConfig
from rcm_jax.data.dataset import batches
from rcm_jax.data.latents import write
from rcm_jax.data.records import write_shard

SHAPE = (2, 3, 4, 5)
FOUR = 1500  # bytes: a record has some 400
UNCOND = {"text": np.full((3, 4), -1, jnp.bfloat16)}


def example(i, x0_dtype=jnp.bfloat16, **others):
    """Numbers of which i is in every one, so that a row is known by its content."""
    x0 = np.random.default_rng(i).normal(size=SHAPE).astype(x0_dtype)
    return {"x0": x0, "text": np.full((3, 4), i, jnp.bfloat16), **others}


def examples(n):
    return [example(i) for i in range(n)]


def written(folder, n=10, shard_bytes=FOUR):
    """A folder of n examples, four in a shard."""
    write(folder, examples(n), UNCOND, shard_bytes=shard_bytes)
    return folder


def load(folder, shape=SHAPE):
    return data.load(LatentsConfig(str(folder), shape))


def rows(iterator, n):
    """Which examples are in the next n batches."""
    return [batch["cond"]["text"][:, 0, 0].astype(int).tolist() for batch in itertools.islice(iterator, n)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(message, call, *args, error=ValueError, **kwargs):
    """The call raises this very message."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(*args, **kwargs)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_what_is_written_is_read_to_the_bit(tmp_path, dtype):
    others = {"y": np.arange(6, dtype=np.float16).reshape(2, 3), "label": np.int32(7)}
    data = [example(i, dtype, **others) for i in range(5)]
    uncond = UNCOND | {"y": np.zeros((2, 3), np.float16), "label": np.int32(0)}
    assert write(tmp_path / "set", iter(data), uncond) == 5
    dataset = load(tmp_path / "set")
    assert len(dataset.train) == 5
    batch = dataset.train[np.array([3, 0, 3])]
    assert batch["x0"].dtype == np.float32 and batch["x0"].shape == (3, *SHAPE)
    for got, i in zip(batch["x0"], (3, 0, 3), strict=True):
        np.testing.assert_array_equal(got, data[i]["x0"].astype(np.float32))
    assert {k: (v.dtype, v.shape) for k, v in batch["cond"].items()} == {
        "text": (jnp.bfloat16, (3, 3, 4)), "y": (np.float16, (3, 2, 3)), "label": (np.int32, (3,))
    }  # fmt: skip
    assert batch["cond"]["text"][0].tobytes() == data[3]["text"].tobytes()
    assert batch["cond"]["label"].tolist() == [7, 7, 7]
    assert dataset.uncond["text"].dtype == jnp.bfloat16
    assert dataset.uncond["text"].tobytes() == uncond["text"].tobytes()
    assert (dataset.test, dataset.num_classes, dataset.to_image) == (None, None, None)
    assert dataset.sample_shape == SHAPE


def test_records_are_plain_safetensors_one_in_a_group(tmp_path):
    data = [{"x0": np.arange(4.0, dtype=np.float32) + i, "text": np.full(2, i, np.float16)} for i in range(3)]
    write(tmp_path / "set", data, {"text": np.zeros(2, np.float16)})
    reader = ArrayRecordReader(str(tmp_path / "set" / "latents-00000-of-00001.array_record"))
    assert "group_size:1," in reader.writer_options_string()
    stored = safetensors.numpy.load(reader.read([2])[0])
    assert {name: (v.dtype, v.tolist()) for name, v in stored.items()} == {
        "x0": (np.float32, [2, 3, 4, 5]), "text": (np.float16, [2, 2])
    }  # fmt: skip


def test_shards_are_numbered_and_the_order_is_that_of_writing(tmp_path):
    folder = written(tmp_path / "set")
    shards = [f"latents-0000{i}-of-00003.array_record" for i in range(3)]
    assert names(folder) == [*shards, "set.json", "uncond.safetensors"]
    assert names(tmp_path) == ["set"]
    assert load(folder).train[np.arange(10)]["cond"]["text"][:, 0, 0].astype(int).tolist() == list(range(10))


def test_an_empty_folder_is_filled_and_arrays_of_any_layout_are_stored_right(tmp_path):
    turned = {"x0": jnp.arange(120.0).reshape(SHAPE), "text": np.arange(12.0, dtype=np.float32).reshape(4, 3).T}
    write(tmp_path, [turned], {"text": np.zeros((3, 4), np.float32)})
    batch = load(tmp_path).train[np.array([0])]
    np.testing.assert_array_equal(batch["x0"][0].ravel(), np.arange(120))
    np.testing.assert_array_equal(batch["cond"]["text"][0], turned["text"])


def test_more_frames_than_the_config_has_are_cut_off_and_so_are_those_of_conditions_on_frames(tmp_path):
    rng = np.random.default_rng(0)
    shape, text = (5, 4, 6, 3), np.ones((4, 3), np.float32)
    long = [{"x0": rng.normal(size=shape).astype(np.float32), "text": text} for _ in range(3)]
    long = [example | {"y": np.repeat(example["x0"], 2, -1)} for example in long]
    write(tmp_path / "set", long, {"text": 0 * text, "y": 0 * long[0]["y"]})
    short = LatentsConfig(str(tmp_path / "set"), (2, *shape[1:]))
    dataset = data.load(short)
    batch = dataset.train[np.arange(3)]
    np.testing.assert_array_equal(batch["x0"], [example["x0"][:2] for example in long])
    np.testing.assert_array_equal(batch["cond"]["y"], [example["y"][:2] for example in long])
    assert batch["cond"]["text"].shape == (3, 4, 3) and dataset.uncond["y"].shape == (2, 4, 6, 6)
    assert dataset.sample_shape == (2, 4, 6, 3)
    for wrong in ((6, 4, 6, 3), (2, 3, 6, 3)):
        with pytest.raises(ValueError, match=r"only frames, the first number, may be more there"):
            data.load(LatentsConfig(str(tmp_path / "set"), wrong))


def test_every_epoch_is_a_new_permutation_over_all_shards(tmp_path):
    stream = batches(load(written(tmp_path / "set")).train, 4, seed=0)
    seen = list(itertools.chain(*rows(stream, 10)))  # four epochs of ten
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.smoke
def test_the_stream_is_that_of_the_same_examples_in_memory_and_resumes_exactly(tmp_path):
    folder, data = written(tmp_path / "set"), examples(10)
    x0 = np.stack([e["x0"] for e in data]).astype(np.float32)
    memory = {"x0": x0, "cond": {"text": np.stack([e["text"] for e in data])}}
    whole = list(itertools.islice(batches(memory, 4, seed=3), 12))
    for consumed in (0, 1, 3, 7):
        first = batches(load(folder).train, 4, seed=3)
        head = list(itertools.islice(first, consumed))
        again = batches(load(folder).train, 4, seed=3)
        next(again)  # its own position is replaced
        again.set_state(first.get_state())
        got = [*head, *itertools.islice(again, 12 - consumed)]
        assert jax.tree.structure(got) == jax.tree.structure(whole)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_a_source_survives_pickling(tmp_path):
    source = load(written(tmp_path / "set")).train
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[np.array([9])]["x0"], source[np.array([9])]["x0"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(text=np.zeros((3, 5), jnp.bfloat16)), "text bfloat16 [3, 5], x0 bfloat16 [2, 3, 4, 5]"),
        (dict(x0=np.zeros((2, 3), jnp.bfloat16)), "text bfloat16 [3, 4], x0 bfloat16 [2, 3]"),
        (dict(text=np.zeros((3, 4), np.float16)), "text float16 [3, 4], x0 bfloat16 [2, 3, 4, 5]"),
        (dict(y=np.zeros(1, np.float32)), "text bfloat16 [3, 4], x0 bfloat16 [2, 3, 4, 5], y float32 [1]"),
    ],
)
def test_an_example_unlike_the_first_is_refused_and_nothing_is_left(tmp_path, changes, message):
    data = examples(10)
    data[6] |= changes
    expected = f"example 6 holds {message}; example 0 holds text bfloat16 [3, 4], x0 bfloat16 [2, 3, 4, 5]"
    refused(expected, write, tmp_path / "set", data, UNCOND, shard_bytes=FOUR)
    assert names(tmp_path) == []


def test_tensors_that_cannot_be_stored_are_refused(tmp_path):
    bad = example(0) | {"x0": np.zeros(SHAPE)}
    allowed = "tensors must be float32, float16, bfloat16, int32"
    refused(f"example 0: x0 is float64; {allowed}", write, tmp_path / "set", [bad], UNCOND)
    refused(
        f"uncond.safetensors: text is int64; {allowed}", write, tmp_path / "set", examples(1), {"text": np.arange(3)}
    )
    bad = example(1)
    bad["text"][2, :2] = [np.inf, np.nan]
    message = "example 1: 2 of 12 elements of text are not finite"
    refused(message, write, tmp_path / "set", [example(0), bad], UNCOND)
    assert names(tmp_path) == []


def test_examples_without_float_latents_are_refused(tmp_path):
    message = "example 0 holds text bfloat16 [3, 4]; x0 must be among them, in a float dtype"
    refused(message, write, tmp_path / "set", [UNCOND], UNCOND)
    whole = {"x0": np.arange(3, dtype=np.int32)}
    message = "example 0 holds x0 int32 [3]; x0 must be among them, in a float dtype"
    refused(message, write, tmp_path / "set", [whole], {})
    refused("there is no example to write", write, tmp_path / "set", iter([]), UNCOND)
    assert names(tmp_path) == []


def test_the_condition_of_guidance_must_be_like_the_conditions(tmp_path):
    message = (
        "uncond.safetensors holds text bfloat16 [2, 4], but the conditions of the examples are text bfloat16 [3, 4]"
    )
    refused(message, write, tmp_path / "set", examples(1), {"text": np.zeros((2, 4), jnp.bfloat16)})
    message = (
        "uncond.safetensors holds text bfloat16 [3, 4], y bfloat16 [1], but the conditions of the examples are "
        "text bfloat16 [3, 4]"
    )
    refused(message, write, tmp_path / "set", examples(1), UNCOND | {"y": np.zeros(1, jnp.bfloat16)})
    message = "uncond.safetensors holds nothing, but the conditions of the examples are text bfloat16 [3, 4]"
    refused(message, write, tmp_path / "set", examples(1), {})
    assert names(tmp_path) == []


def test_guidance_may_replace_some_of_the_conditions(tmp_path):
    """Image to video: the negative prompt goes with the very image of the sample."""
    data = [example | {"y": np.full((2, 3), i, np.float16)} for i, example in enumerate(examples(3))]
    write(tmp_path / "set", data, UNCOND)
    dataset = load(tmp_path / "set")
    assert dataset.uncond.keys() == {"text"}
    assert dataset.first["cond"].keys() == {"text", "y"}
    assert dataset.first["cond"]["y"].shape == (1, 2, 3)


def test_a_folder_with_anything_in_it_is_not_written_to(tmp_path):
    (tmp_path / "note").write_text("mine")
    message = f"{tmp_path} is there and not an empty folder: choose another"
    refused(message, write, tmp_path, examples(1), UNCOND)
    message = f"{tmp_path / 'note'} is there and not an empty folder: choose another"
    refused(message, write, tmp_path / "note", examples(1), UNCOND)
    refused("shard_bytes 0 must be at least 1", write, tmp_path / "set", [], UNCOND, shard_bytes=0)
    refused("/ is a mount point, which cannot be renamed to: choose a folder in it", write, "/", [], UNCOND)
    assert names(tmp_path) == ["note"]


def test_an_error_of_the_stream_of_examples_comes_through_and_nothing_is_left(tmp_path):
    def stream():
        yield from examples(5)
        raise RuntimeError("the encoder is out of memory")

    refused("the encoder is out of memory", write, tmp_path / "set", stream(), UNCOND, error=RuntimeError)
    assert names(tmp_path) == []


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            self.write = self.close = lambda *_: (_ for _ in ()).throw(RuntimeError("No space left on device"))

    monkeypatch.setattr("rcm_jax.data.records.ArrayRecordWriter", Full)
    message = f"[Errno 28] No space left on device: '{tmp_path}/set/0'"
    refused(message, write, tmp_path / "set", examples(1), UNCOND, error=OSError)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "RecursionError"),
        ("[]", "TypeError"),
        ('{"shards": 3}', "TypeError"),
        ('{"shards": [{}]}', "KeyError: 'examples'"),
        ('{"shards": [{"examples": 3, "shape": []}]}', "are not a number of examples and a shape"),
        ('{"shards": [{"examples": 3, "shape": ""}]}', "are not a number of examples and a shape"),
        ('{"shards": [{"examples": 3, "shape": [true]}]}', "are not a number of examples and a shape"),
        ('{"shards": [{"examples": -1, "shape": [1]}]}', "are not a number of examples and a shape"),
        ('{"shards": [{"examples": 1e400, "shape": [1]}]}', "are not a number of examples and a shape"),
        ('{"shards": [{"examples": 10000000000, "shape": [1]}]}', "are not a number of examples and a shape"),
        (json.dumps({"shards": [{"examples": 1, "shape": [1] * 100_000}]}), "are not a number of examples and a shape"),
        ('{"shards": [], "shards": []}', "named twice: shards"),
        (b"\xff", "UnicodeDecodeError"),
    ],
)
def test_a_set_that_does_not_say_what_it_holds_is_refused_in_one_line(tmp_path, text, message):
    path = written(tmp_path / "set") / "set.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"^{path} does not say what the set holds: [^\n]*{message}") as caught:
        load(tmp_path / "set")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["set.json", "uncond.safetensors", "latents-00001-of-00003.array_record"])
def test_what_is_no_file_is_refused_at_once(tmp_path, name):
    path = written(tmp_path / "set") / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"^{path} is .*a FIFO, not a file$|^{path} is a FIFO, not a file$"):
        load(tmp_path / "set")


@pytest.mark.parametrize(
    ("label", "message"), [(np.zeros(2, np.int32), r"label is \[0 0\], int32"), (np.int32(-2), "label is -2, int32")]
)
def test_a_label_that_counts_no_classes_is_refused(tmp_path, label, message):
    data = [{"x0": np.zeros((2, 2, 3), np.float32), "label": np.zeros_like(label)}]
    write(tmp_path / "set", data, {"label": label})
    with pytest.raises(ValueError, match=rf"uncond\.safetensors: {message}; it must be a number of classes"):
        load(tmp_path / "set", (2, 2, 3))


def test_a_record_of_too_many_axes_is_refused(tmp_path):
    path = written(tmp_path / "set") / "uncond.safetensors"
    for axes in (33, 65):
        entry = {"dtype": "F32", "shape": [1] * axes, "data_offsets": [0, 4]}
        text = json.dumps({"text": entry}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        refused(f"{path}: tensors have at most 32 axes, text has {axes}", load, tmp_path / "set")


def test_folders_that_are_not_whole_are_refused(tmp_path):
    message = f"{tmp_path}/set is no folder: latents are read from one that rcm_jax.data.latents.write made"
    refused(message, load, tmp_path / "set")
    refused(f"{tmp_path} has no files latents-00000-of-0000N.array_record", load, tmp_path)
    folder = written(tmp_path / "set", n=30)
    (folder / "uncond.safetensors").rename(tmp_path / "uncond.safetensors")
    message = f"{folder} has no uncond.safetensors: the condition of guidance, with the names of the conditions"
    refused(message, load, folder)
    for i in (1, 3):
        (folder / f"latents-0000{i}-of-00008.array_record").unlink()
    refused(f"{folder} has 6 of 8 files of latents; missing: 1, 3", load, folder)
    (folder / "latents-00000-of-00002.array_record").touch()
    refused(f"{folder} mixes latents of 2 and of 8 files: keep one set", load, folder)


def test_a_set_without_examples_is_refused(tmp_path):
    ArrayRecordWriter(str(tmp_path / "latents-00000-of-00001.array_record"), "group_size:1").close()
    refused(f"{tmp_path} holds no example: its 1 files are empty", load, tmp_path)


def test_data_of_another_shape_than_the_config_are_refused(tmp_path):
    folder = written(tmp_path / "set")
    message = f"{folder}: x0 is [2, 3, 4, 5] there, but the config's shape is [2, 3, 4, 6]; only frames, the first "
    message += "number, may be more there"
    refused(message, load, folder, (2, 3, 4, 6))


def test_an_uncond_that_was_exchanged_is_checked_on_loading(tmp_path):
    path = written(tmp_path / "set") / "uncond.safetensors"
    safetensors.numpy.save_file({"prompt": np.zeros(2, np.float32)}, path)
    message = f"{path} holds prompt float32 [2], but the conditions of the examples are text bfloat16 [3, 4]"
    refused(message, load, tmp_path / "set")
    safetensors.numpy.save_file({"text": np.zeros(2)}, path)
    refused(f"{path}: text is F64; tensors must be F32, F16, BF16, I32", load, tmp_path / "set")
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"^{path} is not in safetensors: .*header"):
        load(tmp_path / "set")


def test_a_record_unlike_the_first_is_told_when_it_is_read(tmp_path):
    folder = written(tmp_path / "set")
    path = folder / "latents-00001-of-00003.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    records = [example(4), example(5) | {"x0": np.zeros(3, np.float32)}]
    for record in records:
        writer.write(safetensors.numpy.save(record))
    writer.write(b"no tensors at all")
    writer.close()
    refused(f"{folder} is not what its set.json says: {path.name} has 3, not 4", load, folder)
    (folder / "set.json").unlink()  # as older sets are
    source = load(folder).train
    assert source[np.array([4])]["cond"]["text"][0, 0, 0] == 4
    message = f"{path}: record 1 (example 5): x0 is [3]; it should be [2, 3, 4, 5], as in its file"
    refused(message, source.__getitem__, np.array([0, 5]))
    with pytest.raises(ValueError, match=rf"^{path}: record 2 \(example 6\) is not in safetensors: "):
        source[np.array([6])]
    with pytest.raises(ValueError, match=rf"^{path}: record . \(example .\)"):
        rows(batches(source, 4, seed=0), 3)  # from a reading thread as well


@pytest.mark.parametrize("damage", ["cut short", "empty", "other bytes"])
def test_a_file_that_is_no_array_record_is_named(tmp_path, damage):
    path = written(tmp_path / "set") / "latents-00002-of-00003.array_record"
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "other bytes": b"?" * len(whole)}[damage])
    with pytest.raises(ValueError, match=f"^{path} is damaged or no array_record file: "):
        load(tmp_path / "set")


def test_a_record_with_flipped_bits_is_named_when_it_is_read(tmp_path):
    path = written(tmp_path / "set") / "latents-00001-of-00003.array_record"
    damaged = bytearray(path.read_bytes())
    at = damaged.index(example(6)["x0"].tobytes())
    damaged[at + 5] ^= 0x10
    path.write_bytes(damaged)
    source = load(tmp_path / "set").train
    assert source[np.array([5])]["cond"]["text"][0, 0, 0] == 5
    with pytest.raises(ValueError, match=rf"^{path}: record 2 \(example 6\) cannot be read: .*hash mismatch"):
        source[np.array([6])]


def test_configs_that_name_nothing_are_refused():
    refused("config.data.path is empty: it must name a folder of latents", data.load, LatentsConfig("", SHAPE))
    refused("shape is (): it must be one value or more", LatentsConfig, "set", ())
    refused("shape[1] is 0: it must be from 1 to 1,000,000", LatentsConfig, "set", (2, 0))


SMALL = (2, 2, 2, 5)


def wide(k, shape):
    """Tensors in a shape, k in every number."""
    return {"x0": np.full(shape, k, np.float32), "y": np.full((*shape[:3], 2), k, np.float32)}


@pytest.fixture
def two_shapes(tmp_path):
    """Five examples, 0 to 4, of one shape and three, 5 to 7, of another, with a condition on their places."""
    folder, kinds = tmp_path / "two", {SHAPE: range(5), SMALL: range(5, 8)}
    folder.mkdir()
    for i, (shape, members) in enumerate(kinds.items()):
        records = (safetensors.numpy.save(example(k) | wide(k, shape)) for k in members)
        write_shard(folder / f"latents-0000{i}-of-00002.array_record", records)
    shards = [{"examples": len(members), "shape": shape} for shape, members in kinds.items()]
    (folder / "set.json").write_text(json.dumps({"shards": shards}))
    (folder / "uncond.safetensors").write_bytes(safetensors.numpy.save(UNCOND))
    return folder


def test_a_set_of_several_shapes_is_read_one_shape_at_a_time(two_shapes):
    dataset = load(two_shapes, SMALL)
    assert (dataset.sample_shape, dataset.shapes) == (SMALL, [SMALL, SHAPE])
    assert [rows.tolist() for rows in dataset.train.buckets] == [[5, 6, 7], [0, 1, 2, 3, 4]]
    assert dataset.train[np.array([6, 5])]["cond"]["y"].shape == (2, *SMALL[:3], 2)
    short = load(two_shapes, (1, *SMALL[1:]))
    assert short.shapes == [(1, *SMALL[1:]), (1, *SHAPE[1:])]
    assert short.train[np.array([0])]["cond"]["y"].shape == (1, 1, *SHAPE[1:3], 2)
    with pytest.raises(ValueError, match=r"x0 is \[2, 2, 2, 5\] and \[2, 3, 4, 5\] there, but the config's shape is"):
        load(two_shapes, (2, 9, 9, 5))


def test_every_batch_has_one_shape_and_every_example_its_turn(two_shapes):
    source = load(two_shapes).train
    stream = list(itertools.islice(batches(source, 2, seed=3), 40))  # ten epochs
    seen = [batch["index"].tolist() for batch in stream]
    assert all(len({int(row) // 5 for row in batch}) == 1 for batch in seen)
    assert [batch["x0"][:, 0, 0, 0, 0].astype(int).tolist() for batch in stream] == seen
    for bucket in ([0, 1, 2, 3, 4], [5, 6, 7]):
        own = [row for batch in seen for row in batch if row in bucket]
        for start in range(0, len(own) - len(bucket) + 1, len(bucket)):
            assert sorted(own[start : start + len(bucket)]) == bucket  # none twice before all came once
        assert len(own) == 10 * len(bucket)
    turns = ["".join("ab"[batch[0] // 5] for batch in seen[i : i + 4]) for i in range(0, 40, 4)]
    assert len(set(turns)) > 2  # of no period


@pytest.mark.parametrize("parts", [1, 2])
def test_the_order_of_several_shapes_goes_on_exactly_whatever_the_number_of_processes(two_shapes, parts):
    source = load(two_shapes).train

    def indices(iterator, n):
        return [batch["index"].tolist() for batch in itertools.islice(iterator, n)]

    whole = indices(batches(source, 4, seed=3), 12)
    first = batches(source, 4, seed=3, rows=slice(0, 4 // parts))
    assert indices(first, 5) == whole[:5]
    other = batches(source, 4, seed=3, rows=slice(4 - 2 * parts, 4))
    other.set_state(first.get_state())
    rest = list(itertools.islice(other, 7))
    assert [batch["index"].tolist() for batch in rest] == whole[5:]
    local = [batch["x0"][:, 0, 0, 0, 0].astype(int).tolist() for batch in rest]
    assert local == [batch[4 - 2 * parts :] for batch in whole[5:]]


def test_an_example_left_out_gives_its_turn_to_one_of_its_shape(two_shapes):
    source = load(two_shapes).train
    every = {i for batch in itertools.islice(batches(source, 2, seed=0, leave_out=(4, 7)), 20) for i in batch["index"]}
    assert every == {0, 1, 2, 3, 5, 6}
    with pytest.raises(ValueError, match="all 3 examples of the data, or of one shape"):
        batches(source, 2, seed=0, leave_out=(5, 6, 7))

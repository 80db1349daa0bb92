"""Checkpoint files: safetensors in and out, sharded or not, whole or not at all."""

import errno
import json
import os
import pathlib
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rcm_jax.convert.files import SAFETENSORS, open_tensors, read_metadata, write_tensors
from rcm_jax.convert.lazy import LazyTensor


def tensors():
    """Every dtype, a matrix that is not contiguous, a number and an empty one, in no alphabetical order."""
    every = {f"z.{name}": np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in SAFETENSORS.items()}
    return every | {"turned": np.arange(6, dtype=np.float32).reshape(2, 3).T, "0-d": np.array(3), "a": np.zeros((0, 4))}


def by_hand(path):
    """({name: (dtype, shape, bytes)}, metadata) of a safetensors file, from its format's description."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__")
    ranges = {name: slice(*(start + end for end in entry["data_offsets"])) for name, entry in header.items()}
    return {name: (e["dtype"], e["shape"], data[ranges[name]]) for name, e in header.items()}, metadata


def assert_same(opened, expected):
    assert set(opened) == set(expected)
    for name, array in expected.items():
        assert (opened[name].shape, opened[name].dtype) == (array.shape, array.dtype), name
        read = np.asarray(opened[name])
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def lazy(array):
    return LazyTensor(array.shape, array.dtype, lambda: array)


def sharded(folder):
    """A folder of two shards: a and b, then c (float32, 8 bytes each); its index."""
    write_tensors(folder, {name: np.full(2, i, np.float32) for i, name in enumerate("abc")}, stem="m", shard_bytes=16)
    return folder / "m.safetensors.index.json"


@pytest.mark.smoke
def test_every_dtype_and_shape_comes_back(tmp_path):
    expected = tensors()
    assert write_tensors(tmp_path / "out", expected) == ["diffusion_pytorch_model.safetensors"]
    path = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    assert_same(open_tensors(path), expected)
    assert_same(open_tensors(tmp_path / "out"), expected)
    held, metadata = by_hand(path)
    assert metadata == {"format": "pt"}
    for name in SAFETENSORS:
        assert held[f"z.{name}"] == (name, [2, 3], expected[f"z.{name}"].tobytes())
    assert held["turned"] == ("F32", [3, 2], expected["turned"].tobytes())


def test_bfloat16_keeps_its_bits(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16)
    write_tensors(tmp_path / "out", {"x": bits.view(ml_dtypes.bfloat16)})
    assert by_hand(tmp_path / "out/diffusion_pytorch_model.safetensors")[0]["x"] == ("BF16", [1 << 16], bits.tobytes())
    np.testing.assert_array_equal(np.asarray(open_tensors(tmp_path / "out")["x"]).view(np.uint16), bits)


def test_a_lazy_tensor_is_read_when_an_array_is_asked_for():
    reads = []
    tensor = LazyTensor((2,), np.dtype("float32"), lambda: reads.append(1) or np.ones(2, np.float32))
    assert not reads and "read" not in repr(tensor)
    assert np.asarray(tensor, np.float64).dtype == np.float64
    assert np.asarray(tensor).dtype == np.float32 and len(reads) == 2
    with pytest.raises(ValueError, match="leave copy=False out"):
        np.array(tensor, copy=False)


def test_opening_reads_headers_alone(tmp_path):
    write_tensors(tmp_path / "out", {"x": np.zeros(1 << 22, np.float32), "y": np.zeros(3)})
    tracemalloc.start()
    opened = open_tensors(tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and opened["x"].shape == (1 << 22,)
    (tmp_path / "out" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        np.asarray(opened["x"])


@pytest.mark.smoke
def test_shards_are_named_and_indexed_as_huggingface_does(tmp_path):
    sizes = {"b": 2, "a": 1, "large": 9, "c": 1, "empty": 0, "d": 4}  # × 4 bytes, at most 16 a shard
    expected = {name: np.arange(n, dtype=np.float32) for name, n in sizes.items()}
    written = write_tensors(
        tmp_path / "out", expected, stem="model", shard_bytes=16, extra_files={"config.json": "{}\n"}
    )
    shards = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert written == [*shards, "model.safetensors.index.json", "config.json"]
    assert sorted(written) == sorted(p.name for p in (tmp_path / "out").iterdir())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    places = dict(zip(sizes, [shards[i] for i in (0, 0, 1, 2, 2, 3)], strict=True))
    assert index == {"metadata": {"total_size": 17 * 4}, "weight_map": places}
    assert list(index["weight_map"]) == list(sizes)
    for i, names in enumerate((["b", "a"], ["large"], ["c", "empty"], ["d"])):
        held, metadata = by_hand(tmp_path / "out" / shards[i])
        assert sorted(held) == sorted(names) and metadata == {"format": "pt"}
    opened = open_tensors(tmp_path / "out")
    assert list(opened) == list(sizes)
    assert_same(opened, expected)
    assert_same(open_tensors(tmp_path / "out" / "model.safetensors.index.json"), expected)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    def zeros():
        return np.zeros(1 << 18, np.float32)

    tensors = {str(i): LazyTensor((1 << 18,), np.dtype("float32"), zeros) for i in range(8)}
    done = []
    tracemalloc.start()
    write_tensors(tmp_path / "out", tensors, progress=done.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done == [1 << 20] * 8
    assert 1 << 20 <= peak < 2.5 * (1 << 20)  # the next one is read while the last one is still named


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_nothing(tmp_path, error):
    def fail():
        raise error("disk full")

    bad = {"a": np.zeros(4), "b": LazyTensor((4,), np.dtype("float64"), fail)}
    with pytest.raises(error, match="disk full"):
        write_tensors(tmp_path / "out", bad, shard_bytes=32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match="disk full"):
        write_tensors(tmp_path / "empty", bad, shard_bytes=32)
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"] and not list((tmp_path / "empty").iterdir())


def test_files_get_the_permissions_of_their_folder(tmp_path):
    write_tensors(tmp_path / "out", {"a": np.zeros(4)}, extra_files={"config.json": ""})
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out").stat().st_mode & 0o666}


def test_folders_with_something_in_them_are_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("x")
    for folder in (tmp_path / "out", tmp_path / "out" / "keep"):
        with pytest.raises(ValueError, match="not an empty folder: choose another"):
            write_tensors(folder, {"a": np.zeros(4)})
    assert (tmp_path / "out" / "keep").read_text() == "x"
    (tmp_path / "out" / "keep").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    write_tensors(tmp_path / "link", {"a": np.zeros(4)})
    assert list(open_tensors(tmp_path / "out")) == ["a"] and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, {}, "0 tensors in shards of inf bytes cannot be written"),
        ({"__metadata__": np.zeros(1)}, {}, "none may be named __metadata__"),
        ({"a": np.zeros(1)}, {"shard_bytes": 0}, "a shard needs a byte"),
        ({"a": np.zeros(1, np.complex64)}, {}, r"cannot write dtypes other than .*: a \(complex64\)"),
        ({"a": np.zeros(1)}, {"extra_files": {"../x": ""}}, r"'\.\./x': not a plain file name"),
        ({"a": np.zeros(1)}, {"stem": "a/b"}, "'a/b': not a plain file name"),
        ({"a": np.zeros(1)}, {"stem": "m", "extra_files": {"m.safetensors": ""}}, "'m.safetensors': not a plain"),
        ({"a": LazyTensor((3,), np.dtype("float64"), lambda: np.zeros(2))}, {}, r"a was announced as \(3,\) float64"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, tensors, options, message):
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "out", tensors, **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_must_leave_no_choice(tmp_path):
    with pytest.raises(ValueError, match="it holds nothing; name the file"):
        open_tensors(tmp_path)
    (tmp_path / "README.md").write_text("")
    with pytest.raises(ValueError, match=r"it holds README\.md; name the file"):
        open_tensors(tmp_path)
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    assert list(open_tensors(tmp_path)) == ["a"]
    (tmp_path / "vae.pth").write_text("")
    with pytest.raises(ValueError, match=r"it holds model\.safetensors, vae\.pth; name the file"):
        open_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_tensors(tmp_path / "none")
    with pytest.raises(ValueError, match=r"README\.md is no checkpoint by its name"):
        open_tensors(tmp_path / "README.md")


def test_an_index_and_its_shards_must_agree_and_all_that_does_not_is_listed(tmp_path):
    index = sharded(tmp_path / "out")
    first, second = (f"m-0000{i}-of-00002.safetensors" for i in (1, 2))
    places = {"a": first, "lost": first, "c": second, "d": "m-gone.safetensors"}
    save_file({"c": np.zeros(2, np.float32), "a": np.zeros(2, np.float32)}, index.parent / second)
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError) as error:
        open_tensors(tmp_path / "out")
    problems = [
        f"{first} holds b, which the index does not name",
        f"{first} lacks lost",
        f"{second} holds a, which the index places in {first}",
        "m-gone.safetensors is missing",
    ]
    start = f"{index} and its files disagree; download or copy them again: "
    assert str(error.value).startswith(start)
    assert sorted(str(error.value).removeprefix(start).split("; ")) == sorted(problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no index .*TypeError"),
        ("{", "is no index .*JSONDecodeError"),
        ('{"weight_map": {"a": "../a.safetensors"}}', r"places tensors in '\.\./a\.safetensors', which is no plain"),
        (
            '{"weight_map": {"a": "%s"}}' % ("x" * 5000),
            r"in .x{200}… \(5,000 characters\)., which is no plain",
        ),
        ('{"weight_map": {"a": "%s"}}' % ("ä" * 200), "which is no plain file name"),
        ('{"weight_map": {"a": "\\ud800"}}', "is no index .*UnicodeEncodeError"),
        ('{"weight_map": {}}', "it has 0 tensors"),
        ("[" * 100_000, "RecursionError"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "named twice: a"),
        ('{"weight_map": {"a": 3}}', "is no index .*TypeError"),
        ('{"tensors": {}}', "is no index .*KeyError: 'weight_map'"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, text, message):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_tensors(tmp_path)


def test_a_truncated_file_is_refused_with_its_sizes(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"x": np.zeros(100, np.float32), "y": np.zeros(2, np.float32)}, path)
    data = path.read_bytes()
    for size in (0, 4, 8, 40, len(data) - 408, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"m\.safetensors is damaged .*actual size {size}\b"):
            open_tensors(path)
    with pytest.raises(ValueError, match=rf"expected {len(data)} bytes, actual size {len(data) - 1}; download or"):
        open_tensors(path)
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match=rf"expected {len(data)} bytes, actual size {len(data) + 1}"):
        open_tensors(path)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="does not begin as a safetensors file does, actual size 42"):
        open_tensors(path)


def test_a_truncated_shard_is_one_of_the_listed_problems(tmp_path):
    index = sharded(tmp_path / "out")
    path = index.parent / "m-00002-of-00002.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    (index.parent / "m-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"m-00001-of-00002.safetensors is missing; .*expected {size} bytes, actual"):
        open_tensors(index)


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path):
    index = sharded(tmp_path / "out")
    opened = open_tensors(index)
    path = index.parent / "m-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="c cannot be read any more"):
        np.asarray(opened["c"])


def test_dtypes_that_numpy_lacks_are_refused_by_name(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"x": np.zeros(3, ml_dtypes.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match=r"holds dtypes other than .*: x \(F8_E4M3\)"):
        open_tensors(path)


def header(path, entries, held: int = 0):
    """A safetensors file with this header, as text or as what JSON makes a text of, and so many zeros behind."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(held))
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[" * 100_000, "RecursionError"),
        ("", "JSONDecodeError"),
        ("[]", "its header is no JSON object"),
        ('{"\\ud800": 3}', r"\\ud800 has no dtype, shape and data_offsets: 3"),
        ("{}", "it has 0 tensors"),
        ('{"x": {}, "x": {}}', "named twice: x"),
        ({"x": entry([1], 0, 4) | {"dtype": 3}}, "x has no dtype, shape"),
        ({"x": {"dtype": "F32", "shape": [1]}}, "x has no dtype, shape"),
        ({"x": entry([1.0], 0, 4)}, "x has no dtype, shape"),
        ({"x": entry([True], 0, 4)}, "x has no dtype, shape"),
        ({"x": entry([-1], 4, 0)}, "x has no dtype, shape"),
        ({"x": entry([1], 0, 10**30)}, "x has no dtype, shape"),
        ({"x": entry([1] * 33, 0, 4)}, "x has 33 axes"),
        ({"x": entry([0, 1 << 61], 0, 0)}, "x has 2 axes"),
        ({"x": entry([1] * 1_000_000, 0, 4)}, r"x has 1,000,000 axes, .*… \(3,000,000 characters\)"),
        ({"x": entry([2], 0, 4)}, r"x, F32 \(2,\), cannot have 4 bytes"),
        ({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, "y begins at byte 0 .* ends at 4"),
        ({"x": entry([1], 4, 8)}, "x begins at byte 4 .* ends at 0"),
        ({"x" * 100_000: entry([1], 0, 4), "x": 3}, "x has no dtype"),
        ({"x" * 100_000: 3}, r"xxx… \(100,000 characters\) has no dtype"),
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_refused_in_one_short_line(tmp_path, entries, message):
    path = header(tmp_path / "m.safetensors", entries, 4)
    with pytest.raises(ValueError, match=rf"^{path}[^\n]* (is damaged|cannot).*{message}|^{path}: {message}") as caught:
        open_tensors(path)
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("problem", ["nothing", "dtypes", "names twice"])
def test_a_file_of_very_many_tensors_takes_time_in_proportion(tmp_path, problem):
    count, kind = 30_000, "F8_E4M3" if problem == "dtypes" else "F32"
    text = json.dumps({f"blocks.{i}.weight": entry([1], 4 * i, 4 * i + 4, kind) for i in range(count)})
    text = text[:-1] + "," + text[1:] if problem == "names twice" else text
    path = header(tmp_path / "m.safetensors", text, 4 * count)
    start = time.process_time()
    if problem == "nothing":
        assert all(np.asarray(tensor).shape == (1,) for tensor in list(open_tensors(path).values())[::10])
    else:
        with pytest.raises(ValueError, match=r"and|more") as caught:
            open_tensors(path)
        assert len(str(caught.value)) < 3000
    assert time.process_time() - start < 5  # it takes 0.3 s; by squares it would be minutes


def test_more_tensors_than_a_file_may_have_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rcm_jax.convert.files.MOST_TENSORS", 2)
    index = sharded(tmp_path / "out")
    with pytest.raises(ValueError, match=r"index.json is no index .*it has 3 tensors, and must have from 1 to 2"):
        open_tensors(index)
    path = header(tmp_path / "m.safetensors", {name: entry([0], 0, 0) for name in "abc"})
    with pytest.raises(ValueError, match="it has 3 tensors"):
        open_tensors(path)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth", "m.pkl", "m.safetensors.index.json"])
def test_what_is_no_file_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{tmp_path / name} is a FIFO, not a file$"):
        open_tensors(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"^{tmp_path / name} is a device, not a file$"):
        open_tensors(tmp_path / name)


def test_a_name_of_a_file_is_that_file_whole_or_not_at_all(tmp_path):
    file, tensors = tmp_path / "x.safetensors", {"a": np.arange(4.0), "b": np.zeros(2)}
    assert write_tensors(file, tensors, metadata={"format": "pt", "few": "1"}) == ["x.safetensors"]
    assert file.is_file() and read_metadata(file) == {"format": "pt", "few": "1"}
    assert_same(open_tensors(file), tensors)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"x\.safetensors is there: choose another name"):
        write_tensors(file, tensors)
    assert file.read_bytes() == before
    file.unlink()
    broken = LazyTensor((4,), np.dtype("float64"), lambda: np.zeros(3))
    for told, given, options in (
        ("this is 2 files: name a folder", tensors, {"shard_bytes": 32}),
        (r"this is a file beside config\.json: name a folder", tensors, {"extra_files": {"config.json": "{}"}}),
        ("a was announced as", {"a": broken}, {}),
    ):
        with pytest.raises(ValueError, match=told):
            write_tensors(file, given, **options)
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_with_the_file_that_the_user_knows(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, name in (("write_bytes", "diffusion_pytorch_model.safetensors"), ("write_text", "config.json")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
            if place == "write_text":
                patch.setattr(pathlib.Path, "write_text", full)
            tensor = np.zeros(4) if place == "write_text" else LazyTensor((4,), np.dtype("float64"), full)
            write_tensors(tmp_path / "out", {"a": tensor}, extra_files={"config.json": "{}"})
        assert str(caught.value) == f"[Errno 28] No space left on device: '{tmp_path}/out/{name}'"
    assert not list(tmp_path.iterdir())

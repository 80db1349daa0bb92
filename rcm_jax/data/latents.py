"""Precomputed latents and text embeddings on disk.

A folder holds latents-00000-of-0000N.array_record … and uncond.safetensors. Every record is one example in safetensors:
x0, the latents [t, h, w, c] of unit variance, and its conditions by name, say text [l, d]; all examples have the same
names, shapes and dtypes. uncond.safetensors has the conditions that guidance replaces, say the text of the negative
prompt, in the names, shapes and dtypes of the examples' conditions. Records are read when they are asked for; in memory
is an index, some 60 bytes a record.
"""

import bisect
import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures

import grain
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter

from rcm_jax.data.dataset import Dataset
from rcm_jax.util.files import new_folder

UNCOND = "uncond.safetensors"
SHARD = re.compile(r"latents-(\d{5,})-of-(\d{5,})\.array_record")
# A group of one: a random read does not read its neighbours. Latents barely compress, and are read faster plain.
OPTIONS = "group_size:1,uncompressed"
# By their names in safetensors, whose own reader of bytes into numpy knows no bfloat16.
STORED_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I32": np.dtype(np.int32),  # conditions such as token ids and labels, not x0
}
ALLOWED = ", ".join(dtype.name for dtype in STORED_DTYPES.values())

Spec = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name -> dtype, shape


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """A folder as `write` makes it, and the shape of x0 without the batch axis: [t, h, w, c].

    Of examples with more frames the first t are taken, as the official runs do, of x0 and of conditions on its frames.
    """

    path: str = ""
    shape: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape must be the sizes of x0, [t, h, w, c], got {list(self.shape)}")


def load(config: LatentsConfig) -> Dataset:
    """The examples as a random-access source, all for training: x0 float32, conditions in their stored dtypes.

    ValueError if there is no folder, it is not whole, or its first record does not fit uncond.safetensors, or
    config.shape in more than having more frames.
    """
    if not config.path:
        raise ValueError("config.data.path is empty: it must name a folder of latents")
    folder = pathlib.Path(config.path)
    examples = Latents(_shard_paths(folder), config.shape[0])
    if (shape := examples.spec["x0"][1]) != config.shape:
        raise ValueError(
            f"{folder}: x0 is {list(shape)} there, but the config's shape is {list(config.shape)}; only frames, the "
            "first number, may be more there"
        )
    path = folder / UNCOND
    if not path.exists():
        raise ValueError(f"{folder} has no {UNCOND}: the condition of guidance, with the names of the conditions")
    uncond = _decode(path.read_bytes(), path)
    uncond = examples.cut(uncond)
    _check_uncond(uncond, examples.spec, path)
    return Dataset(train=examples, test=None, uncond=uncond, num_classes=None, view="video")


class Latents:
    """Random access to the records of shards: examples[rows [b]] is {"x0": float32 [b, ...], "cond": {name: [b, ...]}}.

    Safe to read from several threads. Opening reads the first record: it is `stored`, and `spec` when cut to `frames`.
    """

    def __init__(self, paths: list[pathlib.Path], frames: int | None = None):
        self.paths = paths
        with futures.ThreadPoolExecutor(16) as pool:
            self.shards = list(pool.map(_open, paths))
        self.ends = list(itertools.accumulate(len(shard) for shard in self.shards))  # pyright: ignore[reportArgumentType]
        if not len(self):
            raise ValueError(f"{paths[0].parent} holds no example: its {len(paths)} files are empty")
        tensors, where = self._read(0)
        self.stored, self.frames = _spec(tensors), frames
        _check_x0(self.stored, where)
        self.spec = _spec(self.cut(tensors))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, rows):
        batch = {
            name: np.empty((len(rows), *shape), np.float32 if name == "x0" else dtype)
            for name, (dtype, shape) in self.spec.items()
        }
        for i, row in enumerate(rows):
            tensors, where = self._read(int(row))
            if (spec := _spec(tensors)) != self.stored:
                raise ValueError(f"{where} holds {_show(spec)}; the first record holds {_show(self.stored)}")
            for name, tensor in self.cut(tensors).items():
                batch[name][i] = tensor
        return {"x0": batch.pop("x0"), "cond": batch}

    def cut(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Tensors with the first frames of those that lie, as x0, on all of [t, h, w]; the others as they are."""
        places = self.stored["x0"][1][:-1]
        return {
            name: array[: self.frames] if len(places) == 3 and array.shape[:3] == places else array
            for name, array in tensors.items()
        }

    def _read(self, row: int) -> tuple[dict[str, np.ndarray], str]:
        """The tensors of one example, and what to call it in errors."""
        shard = bisect.bisect_right(self.ends, row)
        position = row - (self.ends[shard - 1] if shard else 0)
        where = f"{self.paths[shard]}: record {position} (example {row})"
        try:
            record = self.shards[shard][position]
        except RuntimeError as error:
            raise ValueError(f"{where} cannot be read: {error}") from None
        return _decode(record, where), where


def write(
    folder: str | os.PathLike,
    examples: Iterable[Mapping[str, np.ndarray]],
    uncond: Mapping[str, np.ndarray],
    *,
    shard_bytes: int = 4 * 2**30,
) -> int:
    """Writes a folder that `load` reads, from a stream of {"x0": [t, h, w, c], "text": [l, d], …}; returns how many.

    Tensors are float32, float16, bfloat16 or int32 and are stored as they are; a new shard is begun after shard_bytes.
    The folder must be new or empty, and it is either whole or not there. ValueError that names the example if one
    differs from the first in names, shapes or dtypes, or is not finite; OSError if the disk is full.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes {shard_bytes} must be at least 1")
    with new_folder(folder) as temporary:
        uncond = _arrays(uncond, UNCOND)
        (temporary / UNCOND).write_bytes(safetensors.numpy.save(uncond))
        return _write_shards(temporary, _records(examples, uncond), shard_bytes)


def _records(examples, uncond) -> Iterator[bytes]:
    """Examples in safetensors, each checked against the first."""
    first = None
    for i, example in enumerate(examples):
        tensors = _arrays(example, f"example {i}")
        spec = _spec(tensors)
        if first is None:
            first = spec
            _check_x0(spec, "example 0")
            _check_uncond(uncond, spec, UNCOND)
        if spec != first:
            raise ValueError(f"example {i} holds {_show(spec)}; example 0 holds {_show(first)}")
        yield safetensors.numpy.save(tensors)
    if first is None:
        raise ValueError("there is no example to write")


def _write_shards(folder, records: Iterator[bytes], limit: int) -> int:
    """The records in shards, which get their names when it is known how many there are; returns how many records."""
    sizes = []
    for record in records:
        path = folder / str(len(sizes))
        sizes.append(_write_shard(path, itertools.chain([record], records), limit))
    for i in range(len(sizes)):
        (folder / str(i)).rename(folder / f"latents-{i:05d}-of-{len(sizes):05d}.array_record")
    return sum(sizes)


def _write_shard(path, records: Iterator[bytes], limit: int) -> int:
    """Records up to the one that reaches the limit in bytes; returns how many."""
    count = size = 0
    with _disk_errors(path):
        writer = ArrayRecordWriter(str(path), OPTIONS)
    try:
        for record in records:
            with _disk_errors(path):
                writer.write(record)
            count, size = count + 1, size + len(record)
            if size >= limit:
                break
    finally:
        with _disk_errors(path):
            writer.close()
    return count


@contextlib.contextmanager
def _disk_errors(path):
    """The RuntimeErrors of array_record as OSErrors that name the file."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {error}") from None


def _shard_paths(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder in order; ValueError if there is none or one is missing."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: latents are read from one that rcm_jax.data.latents.write made")
    found = sorted((int(m[2]), int(m[1]), path) for path in folder.iterdir() if (m := SHARD.fullmatch(path.name)))
    if not found:
        raise ValueError(f"{folder} has no files latents-00000-of-0000N.array_record")
    totals = sorted({total for total, _, _ in found})
    if len(totals) > 1:
        raise ValueError(f"{folder} mixes latents of {' and of '.join(map(str, totals))} files: keep one set")
    if missing := sorted(set(range(totals[0])) - {number for _, number, _ in found}):
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise ValueError(f"{folder} has {len(found)} of {totals[0]} files of latents; missing: {shown}")
    return [path for _, _, path in found]


def _open(path) -> grain.sources.ArrayRecordDataSource:
    try:
        return grain.sources.ArrayRecordDataSource(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged or no array_record file: {error}") from None


def _decode(data: bytes, where) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file or record; ValueError if it is none."""
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where} is not in safetensors: {error}") from None
    if bad := [f"{name} is {tensor['dtype']}" for name, tensor in found if tensor["dtype"] not in STORED_DTYPES]:
        raise ValueError(f"{where}: {', '.join(bad)}; tensors must be {', '.join(STORED_DTYPES)}")
    return {name: np.frombuffer(t["data"], STORED_DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in found}


def _arrays(tensors: Mapping, where) -> dict[str, np.ndarray]:
    """Finite arrays in row-major order: safetensors.numpy.save takes others, but stores them wrong."""
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in STORED_DTYPES.values():
            raise ValueError(f"{where}: {name} is {array.dtype}; tensors must be {ALLOWED}")
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            raise ValueError(f"{where}: {bad} of {array.size} elements of {name} are not finite")
    return arrays


def _spec(tensors: Mapping[str, np.ndarray]) -> Spec:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _show(spec: Spec) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in sorted(spec.items())) or "nothing"


def _check_x0(spec: Spec, where) -> None:
    if "x0" not in spec or spec["x0"][0] == STORED_DTYPES["I32"]:
        raise ValueError(f"{where} holds {_show(spec)}; x0 must be among them, in a float dtype")


def _check_uncond(uncond, examples: Spec, where) -> None:
    known = {name: kind for name, kind in examples.items() if name != "x0"}
    spec = _spec(uncond)
    if not spec or not spec.items() <= known.items():
        raise ValueError(f"{where} holds {_show(spec)}, but the conditions of the examples are {_show(known)}")

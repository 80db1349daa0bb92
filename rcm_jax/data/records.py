"""Records of latents: one example each, in safetensors, in array_record files. What may be in them, and how they are
written and opened."""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import grain
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter

from rcm_jax.util.files import MOST_AXES, brief, listed, local, reading, regular, writing

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


class Kind(NamedTuple):
    """What a tensor is, in examples of any size."""

    dtype: np.dtype
    on_places: bool  # it lies, as x0, on all of [t, h, w]
    shape: tuple[int, ...]  # without those places

    def __str__(self):
        return f"{self.dtype} [{', '.join(['t, h, w'] * self.on_places + [str(n) for n in self.shape])}]"


Kinds = dict[str, Kind]


def kinds_of(tensors: Mapping[str, np.ndarray]) -> Kinds:
    """Those of an example, of whose places x0 decides."""
    places = tensors["x0"].shape[:-1]

    def kind(array):
        on_places = len(places) == 3 and array.shape[:3] == places
        return Kind(array.dtype, on_places, array.shape[3:] if on_places else array.shape)

    return {name: kind(array) for name, array in sorted(tensors.items())}


def in_words(kinds: Kinds) -> str:
    """For errors."""
    return listed(f"{name} {kind}" for name, kind in sorted(kinds.items())) or "nothing"


def show(tensors: Mapping[str, np.ndarray]) -> str:
    """Names, dtypes and shapes, for errors."""
    return listed(f"{name} {array.dtype} {list(array.shape)}" for name, array in sorted(tensors.items())) or "nothing"


def check_x0(tensors: Mapping[str, np.ndarray], where) -> None:
    """ValueError unless x0 is there, in a float dtype."""
    if "x0" not in tensors or tensors["x0"].dtype == np.int32 or not tensors["x0"].ndim:
        raise ValueError(f"{where} holds {show(tensors)}; x0 must be among them, in a float dtype")


def check_uncond(uncond: Mapping[str, np.ndarray], example: Mapping[str, np.ndarray], where) -> None:
    """ValueError unless what guidance replaces is among the conditions of an example, in their dtypes and shapes."""
    known = {name: array for name, array in example.items() if name != "x0"}
    fits = all(n in known and (a.dtype, a.shape) == (known[n].dtype, known[n].shape) for n, a in uncond.items())
    if not uncond or not fits:
        raise ValueError(f"{where} holds {show(uncond)}, but the conditions of the examples are {show(known)}")


def as_arrays(tensors: Mapping, where) -> dict[str, np.ndarray]:
    """Finite arrays in row-major order: safetensors.numpy.save takes others, but stores them wrong."""
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in STORED_DTYPES.values():
            raise ValueError(f"{where}: {name} is {array.dtype}; tensors must be {ALLOWED}")
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            raise ValueError(f"{where}: {bad} of {array.size} elements of {name} are not finite")
    return arrays


def encode(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A record of what `as_arrays` gave: the same bytes for the same arrays."""
    return safetensors.numpy.save(dict(tensors))


def digest(record: bytes) -> str:
    """By which a record is known again."""
    return hashlib.sha256(record).hexdigest()


def decode(data: bytes, where) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file or record; ValueError if it is none."""
    with reading(where, "is not in safetensors"):
        found = safetensors.deserialize(data)
    if bad := [f"{brief(name)} is {t['dtype']}" for name, t in found if t["dtype"] not in STORED_DTYPES]:
        raise ValueError(f"{where}: {listed(bad)}; tensors must be {', '.join(STORED_DTYPES)}")
    if bad := [f"{brief(name)} has {len(t['shape'])}" for name, t in found if len(t["shape"]) > MOST_AXES]:
        raise ValueError(f"{where}: tensors have at most {MOST_AXES} axes, {listed(bad)}")
    with reading(where, "is not in safetensors"):
        return {name: np.frombuffer(t["data"], STORED_DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in found}


def write_shard(path: str | os.PathLike, records: Iterable[bytes], limit: float = math.inf) -> int:
    """An array_record file of records up to the one that reaches a limit in bytes; returns how many.

    It is there before it is whole. OSError that names it if the disk is full.
    """
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
        with writing(path):
            yield
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {error}") from None


def open_shard(path) -> grain.sources.ArrayRecordDataSource:
    """Records by their places; ValueError for a file that is damaged. Of an object store a copy is read."""
    copy = local(path)
    with reading(path, "is damaged or no array_record file"):
        return grain.sources.ArrayRecordDataSource(str(regular(copy)))

"""Checkpoint files as mappings {name: tensor}: .safetensors (one or sharded) in and out, what torch.save writes in.

Nothing here knows a network. Opening reads headers; a tensor is read when `np.asarray` asks for it.
"""

import functools
import json
import math
import os
import pathlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.convert.nvlabs import open_snapshot
from rcm_jax.convert.torch_file import open_torch_file
from rcm_jax.util.files import (
    MOST_AXES,
    as_path,
    brief,
    listed,
    local,
    new_folder,
    parse_json,
    read_json,
    reading,
    regular,
    write_whole,
    writing,
)

INDEX = ".safetensors.index.json"
TORCH = (".pth", ".pt", ".bin")
SNAPSHOT = ".pkl"  # of NVlabs
SAFETENSORS = {  # dtypes, by their names there
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U64": np.dtype("uint64"),
    "U32": np.dtype("uint32"),
    "U16": np.dtype("uint16"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
CODES = {dtype: code for code, dtype in SAFETENSORS.items()}
MOST_HEADER = 100_000_000  # bytes, by the format
MOST_TENSORS = 1_000_000
NOTHING: Mapping[str, str] = types.MappingProxyType({})


def open_tensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """{name: tensor} of a .safetensors, .pth, .pt or .bin file, of a *.safetensors.index.json, or of a folder with one.

    Of a .pkl of NVlabs: its averaged network ("ema"). Files of an object store are copied to the cache of this machine.
    Raises ValueError for files that are damaged, that disagree, or of which there is more than one to choose from.
    """
    place = as_path(path)
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such file or folder")
    if place.is_dir():
        place = only_checkpoint(place)
    if place.name.endswith(INDEX):
        return _open_index(place)
    if place.suffix == ".safetensors":
        return _open_safetensors(local(place))
    if place.suffix in TORCH:
        return open_torch_file(local(place))
    if place.suffix == SNAPSHOT:
        return open_snapshot(local(place))
    endings = f".safetensors, {INDEX}, {', '.join(TORCH)} or {SNAPSHOT}"
    raise ValueError(f"{place} is no checkpoint by its name: it must end in {endings}")


def only_checkpoint(folder):
    """The one checkpoint in a folder; ValueError if there are none, or several."""
    names = sorted(p.name for p in folder.iterdir())
    found = [name for name in names if name.endswith(INDEX)]
    found = found or [name for name in names if name.endswith((".safetensors", *TORCH))]
    if len(found) != 1:
        kinds = f"one *{INDEX} or one .safetensors, .pth, .pt or .bin file"
        there = listed(found or names) or "nothing"
        raise ValueError(f"{folder} must hold {kinds}, it holds {there}; name the file instead of the folder")
    return folder / found[0]


def _open_safetensors(path):
    """The format by hand: the library reads the header anew for every tensor, and copies all of it."""
    with reading(path, "is damaged or no safetensors file", "; download or copy it again"):
        with regular(path).open("rb") as file:
            size, start = os.fstat(file.fileno()).st_size, 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or start > 8 + MOST_HEADER:
                raise ValueError(f"it does not begin as a safetensors file does, actual size {size}")
            if start > size:
                raise ValueError(f"expected {start} bytes or more, actual size {size}")
            entries = _entries(_header(file.read(start - 8)))
        end = start + max((end for _, _, _, end in entries.values()), default=0)
        if end != size:
            raise ValueError(f"expected {end} bytes, actual size {size}")
    if unknown := [f"{name} ({kind})" for name, (kind, *_) in entries.items() if kind not in SAFETENSORS]:
        raise ValueError(f"{path} holds dtypes other than {', '.join(SAFETENSORS)}: {listed(unknown)}")
    tensors = {}
    for name, (kind, shape, begin, end) in entries.items():
        dtype = SAFETENSORS[kind]
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"{path}: {brief(name)}, {kind} {brief(shape)}, cannot have {end - begin} bytes")
        read = functools.partial(_read_safetensors, path, size, name, start + begin, shape, dtype)
        tensors[name] = LazyTensor(shape, dtype, read)
    return tensors


def read_metadata(path) -> dict[str, str]:
    """What the header of a .safetensors file says beside its tensors, which are not looked at."""
    with reading(path, "is damaged or no safetensors file", "; download or copy it again"):
        with regular(local(path)).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MOST_HEADER:
                raise ValueError("it does not begin as a safetensors file does")
            metadata = _header(file.read(size)).get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ is no texts by names")
    return metadata


def _header(text: bytes) -> dict:
    if not isinstance(header := parse_json(text), dict):
        raise ValueError("its header is no JSON object")
    return header


def _entries(header: dict) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """{name: (dtype, shape, first byte, the byte behind)} of a header, in the order of their bytes, none left out."""
    header.pop("__metadata__", None)
    _check_count(header)
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    place = 0
    for name, (_, _, begin, end) in entries.items():
        if begin != place:
            raise ValueError(f"{brief(name)} begins at byte {begin} of the data, where that of another ends at {place}")
        place = end
    return entries


def _check_count(tensors):
    if not 0 < len(tensors) <= MOST_TENSORS:
        raise ValueError(f"it has {len(tensors):,} tensors, and must have from 1 to {MOST_TENSORS:,}")


def _entry(name: str, entry) -> tuple[str, tuple[int, ...], int, int]:
    kind, shape, place = _values(entry)
    fits = isinstance(kind, str) and isinstance(shape, list) and isinstance(place, list) and len(place) == 2
    if not fits or not all(type(n) is int and 0 <= n <= sys.maxsize for n in (*place, *shape)) or place[0] > place[1]:
        raise ValueError(f"{brief(name)} has no dtype, shape and data_offsets: {brief(entry)}")
    if len(shape) > MOST_AXES or math.prod(max(n, 1) for n in shape) > sys.maxsize // 8:
        raise ValueError(f"{brief(name)} has {len(shape):,} axes, {brief(shape)}, which no array has")
    return kind, tuple(shape), place[0], place[1]


def _values(entry) -> tuple[Any, Any, Any]:
    found = entry if isinstance(entry, dict) else {}
    return found.get("dtype"), found.get("shape"), found.get("data_offsets")


def _read_safetensors(path, size, name, place, shape, dtype):
    with path.open("rb") as file:
        if (now := os.fstat(file.fileno()).st_size) != size:
            raise ValueError(f"{path}: {brief(name)} cannot be read any more: expected {size} bytes, actual size {now}")
        file.seek(place)
        array = np.empty(shape, dtype)
        with reading(path, "cannot be read any more"):
            if (count := file.readinto(array.reshape(-1).view(np.uint8))) != array.nbytes:
                raise ValueError(f"{brief(name)} has {count} of {array.nbytes} bytes")
    return array


def _open_index(path):
    shards = _by_shard(places := _weight_map(path))
    problems, tensors = [], {}
    for shard, names in shards.items():
        if not (path.parent / shard).is_file():
            problems.append(f"{shard} is missing")
            continue
        try:
            held = _open_safetensors(local(path.parent / shard))
        except ValueError as error:
            problems.append(str(error))
            continue
        for name in held:
            if name not in places:
                problems.append(f"{shard} holds {brief(name)}, which the index does not name")
            elif places[name] != shard:
                problems.append(f"{shard} holds {brief(name)}, which the index places in {places[name]}")
        problems += [f"{shard} lacks {brief(name)}" for name in names if name not in held]
        tensors |= {name: held[name] for name in names if name in held}
    if problems:
        told = listed(problems, 20, "; ")
        raise ValueError(f"{path} and its files disagree; download or copy them again: {told}")
    return {name: tensors[name] for name in places}


def _by_shard(places: Mapping[str, str]) -> dict[str, list[str]]:
    shards = {}
    for name, place in places.items():
        shards.setdefault(place, []).append(name)
    return shards


def _weight_map(path):
    problem = 'is no index {"weight_map": {tensor: file name}}'
    places = read_json(path, problem)
    with reading(path, problem):
        places = places["weight_map"]
        _check_count(places)
        for place in dict.fromkeys(places.values()):
            if pathlib.PurePath(place).name != place or len(os.fsencode(place)) > 255:  # no folder takes it
                raise ValueError(f"it places tensors in '{brief(place)}', which is no plain file name")
    return places


def write_tensors(
    folder: str | os.PathLike,
    tensors: Mapping,
    *,
    stem: str = "diffusion_pytorch_model",
    shard_bytes: float = math.inf,
    metadata: Mapping[str, str] = types.MappingProxyType({"format": "pt"}),
    extra_files: Mapping[str, str] = NOTHING,
    progress: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Writes {name: tensor} as {stem}.safetensors, or in shards with an index as huggingface names them; their names.

    A tensor has .shape, .dtype and goes through np.asarray, one at a time. extra_files maps file names to texts.
    progress is called with the bytes of every tensor written. The folder must be empty or not there; it appears whole
    or not at all. A name that ends in .safetensors is that of the only file, and there is no folder. Raises ValueError
    for a folder that is not empty, no tensors, or dtypes that are not in SAFETENSORS.
    """
    shards = _plan(tensors, shard_bytes)
    if (place := as_path(folder)).suffix == ".safetensors":
        return [_write_one(place, tensors, len(shards), extra_files, metadata, progress)]
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [f"{stem}.safetensors"]
    ours = (*names, f"{stem}{INDEX}")
    if wrong := [name for name in (stem, *extra_files) if pathlib.PurePath(name).name != name or name in ours]:
        raise ValueError(f"{', '.join(map(repr, wrong))}: not a plain file name, or one of {', '.join(ours)}")
    texts = dict(extra_files)
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(map(_nbytes, tensors.values()))}, "weight_map": places}
        texts = {f"{stem}{INDEX}": json.dumps(index, indent=2) + "\n"} | texts
    with new_folder(folder, last=[*names, *texts][-1]) as temporary:
        for name, shard in zip(names, shards, strict=True):
            _write_file(temporary / name, {tensor: tensors[tensor] for tensor in shard}, metadata, progress)
        for name, text in texts.items():
            with writing(temporary / name):
                (temporary / name).write_text(text, encoding="utf-8")
    return [*names, *texts]


def _write_one(place, tensors, shards: int, extra_files, metadata, progress) -> str:
    """One file, whole or not at all."""
    if shards > 1 or extra_files:
        what = f"{shards} files" if shards > 1 else f"a file beside {', '.join(extra_files)}"
        raise ValueError(f"{place} is to be one file, and this is {what}: name a folder")
    if place.exists():
        raise FileExistsError(f"{place} is there: choose another name")
    write_whole(place, lambda path: _write_file(path, tensors, metadata, progress))
    return place.name


def _nbytes(tensor):
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _plan(tensors, shard_bytes):
    """Names by shard, in order; a tensor larger than shard_bytes is alone in its shard."""
    if not tensors or "__metadata__" in tensors or shard_bytes < 1:
        raise ValueError(
            f"{len(tensors)} tensors in shards of {shard_bytes} bytes cannot be written: there must be one at least, "
            "none may be named __metadata__, and a shard needs a byte"
        )
    if wrong := [f"{name} ({t.dtype})" for name, t in tensors.items() if np.dtype(t.dtype) not in CODES]:
        raise ValueError(f"cannot write dtypes other than {', '.join(map(str, CODES))}: {', '.join(wrong)}")
    shards, room = [], -1
    for name, tensor in tensors.items():
        size = _nbytes(tensor)
        if size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_file(path, tensors, metadata, progress):
    """The safetensors format by hand, tensor by tensor: the library's writer wants all of a file in memory at once."""
    # Wide dtypes first, as the library does it: every tensor is then aligned.
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header, end = {"__metadata__": dict(metadata)}, 0
    for name in order:
        start, end = end, end + _nbytes(tensors[name])
        shape = [int(n) for n in tensors[name].shape]
        header[name] = {"dtype": CODES[np.dtype(tensors[name].dtype)], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name]
            array = np.asarray(tensor, order="C")
            if array.shape != tuple(tensor.shape) or array.dtype != np.dtype(tensor.dtype):
                raise ValueError(
                    f"{name} was announced as {tuple(tensor.shape)} {tensor.dtype} and is {array.shape} {array.dtype}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
            progress(array.nbytes)

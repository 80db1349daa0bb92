"""Checkpoint files as mappings {name: tensor}: .safetensors (one or sharded) in and out, what torch.save writes in.

Nothing here knows a network. Opening reads headers; a tensor is read when `np.asarray` asks for it.
"""

import functools
import json
import math
import os
import pathlib
import types
from collections.abc import Callable, Mapping

import ml_dtypes  # also teaches numpy the name "bfloat16", by which safetensors makes such arrays
import numpy as np
import safetensors

from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.convert.nvlabs import open_snapshot
from rcm_jax.convert.torch_file import open_torch_file
from rcm_jax.util.files import as_path, local, new_folder

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
MOST_HEADER = 100_000_008  # bytes, by the format
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
        place = _only_checkpoint(place)
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


def _only_checkpoint(folder):
    names = sorted(p.name for p in folder.iterdir())
    found = [name for name in names if name.endswith(INDEX)]
    found = found or [name for name in names if name.endswith((".safetensors", *TORCH))]
    if len(found) != 1:
        kinds = f"one *{INDEX} or one .safetensors, .pth, .pt or .bin file"
        there = ", ".join(found or names) or "nothing"
        raise ValueError(f"{folder} must hold {kinds}, it holds {there}; name the file instead of the folder")
    return folder / found[0]


def _open_safetensors(path):
    try:
        # The file is opened again for every read: an open one is a memory map, which keeps what was read resident.
        with safetensors.safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {_sizes(path)}; download or copy it again") from None
    if unknown := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in SAFETENSORS]:
        raise ValueError(f"{path} holds dtypes other than {', '.join(SAFETENSORS)}: {', '.join(unknown)}")
    return {
        name: LazyTensor(shapes[name], SAFETENSORS[kind], functools.partial(_read_safetensors, path, name))
        for name, kind in kinds.items()
    }


def _read_safetensors(path, name):
    try:
        with safetensors.safe_open(path, "np") as file:
            return file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: {name} cannot be read any more ({error}): {_sizes(path)}") from None


def _sizes(path):
    """What the header of a damaged file asks for, and what is there."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        try:
            if header > MOST_HEADER:
                return f"it does not begin as a safetensors file does, actual size {actual}"
            if header > actual:
                return f"expected {header} bytes or more, actual size {actual}"
            entries = json.loads(file.read(header - 8))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            return f"expected {header + max(ends, default=0)} bytes, actual size {actual}"
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return f"its header cannot be read, actual size {actual}"


def _open_index(path):
    places = _weight_map(path)
    problems, tensors = [], {}
    for shard in dict.fromkeys(places.values()):
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
                problems.append(f"{shard} holds {name}, which the index does not name")
            elif places[name] != shard:
                problems.append(f"{shard} holds {name}, which the index places in {places[name]}")
        lacking = [name for name, place in places.items() if place == shard and name not in held]
        problems += [f"{shard} lacks {name}" for name in lacking]
        tensors |= held
    if problems:
        raise ValueError(f"{path} and its files disagree; download or copy them again: {'; '.join(problems)}")
    return {name: tensors[name] for name in places}


def _weight_map(path):
    try:
        places = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
        for place in places.values():
            if pathlib.PurePath(place).name != place:
                raise ValueError(f"it places tensors in {place!r}, which is no plain file name")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        wanted = '{"weight_map": {tensor: file name}}'
        raise ValueError(f"{path} is no index {wanted}: {type(error).__name__}: {error}") from None
    return places


def _unique(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"named twice: {', '.join(sorted({name for name in names if names.count(name) > 1}))}")
    return dict(pairs)


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
    or not at all. Raises ValueError for such a folder, no tensors, or dtypes that are not in SAFETENSORS.
    """
    shards = _plan(tensors, shard_bytes)
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
            (temporary / name).write_text(text, encoding="utf-8")
    return [*names, *texts]


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
    with path.open("wb") as file:
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

"""Reads the .pkl snapshots of NVlabs (EDM, EDM2, StyleGAN's Inception) without executing anything that is in them.

Such a pickle holds whole modules: of each class its source, which unpickling would run, and the state of the object.
Here a module is its state alone, and its source a string that nobody reads. A tensor's storage is in it as the bytes of
a file of torch.save of before 1.6: five pickles (a magic number, a version, the machine, the storage, its key), then
the number of elements and their memory. All of a file is held in memory until its tensors are read.
"""

import io
import os
import pickle
import re
import typing

from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.convert.torch_file import (
    ALLOWED,
    STORAGES,
    WAY_OUT,
    Dict,
    File,
    Ignored,
    Inert,
    Storage,
    Unpickler,
    check_opcodes,
    flatten,
    lazy_tensor,
)
from rcm_jax.util.files import as_path

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # what a file of the old format begins with
TORCH_MODULE = re.compile(r"torch\.nn\.modules\.\w+")  # containers, and layers of other networks


class _Module(Inert):
    """A module of torch: what __setstate__ would be given."""

    __slots__ = ("state",)

    def __new__(cls, *args):
        module = super().__new__(cls)
        module.state = {}
        return module

    def __setstate__(self, state):
        self.state = state


class _Persistent(_Module):
    """A module of a class whose source is in the file."""

    __slots__ = ()

    def __new__(cls, meta):
        module = super().__new__(cls)
        module.state = meta["state"]
        return module


class _Storage(Inert):
    """The storage in the bytes of a file of the old format."""

    __slots__ = ()

    def __new__(cls, data):
        return _old_storage(data)


SNAPSHOT = {key: made for key, made in ALLOWED.items() if key[1] not in STORAGES} | {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Persistent,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("torch", "device"): Ignored,
    ("dnnlib.util", "EasyDict"): Dict,
    # Numbers and arrays of numpy beside the networks, and sets of hooks.
    ("numpy", "dtype"): Ignored,
    ("numpy", "ndarray"): Ignored,
    ("builtins", "set"): Ignored,
    ("__builtin__", "set"): Ignored,
}
for _core in ("numpy.core", "numpy._core"):
    SNAPSHOT |= {(f"{_core}.multiarray", name): Ignored for name in ("scalar", "_reconstruct")}
    SNAPSHOT |= {(f"{_core}.numeric", "_frombuffer"): Ignored}
STORAGE_TYPES = {key: made for key, made in ALLOWED.items() if key[1] in STORAGES}


class _Snapshot(Unpickler):
    """Also makes modules."""

    def find_class(self, module, name):
        return _Module if TORCH_MODULE.fullmatch(module) else super().find_class(module, name)


class _Old(Unpickler):
    """The pickles of the old format: a storage is (its type, its key, its number of elements)."""

    def persistent_load(self, reference):
        tag, kind, key, _, numel, view = reference
        if tag != "storage" or type(kind) is not str or type(numel) is not int or numel < 0 or view is not None:
            raise pickle.UnpicklingError("a reference is not (storage, type, key, location, number of elements, None)")
        return kind, key, numel


def _old_storage(data: bytes) -> Storage:
    """The storage that is all of a file of the old format; pickle.UnpicklingError for any other file."""
    stream, parts = io.BytesIO(data), []
    for _ in range(5):
        start = stream.tell()
        check_opcodes(stream, len(data))
        stream.seek(start)
        parts.append(_Old(stream, _nothing, STORAGE_TYPES).load())
    magic, version, machine, (kind, key, numel), keys = parts
    if (magic, version, machine["little_endian"], keys) != (MAGIC, VERSION, True, [key]):
        raise pickle.UnpicklingError("a tensor's storage is not as torch writes it on a little-endian machine")
    dtype, start = STORAGES[kind], stream.tell() + 8
    if int.from_bytes(data[start - 8 : start], "little") != numel or len(data) < start + numel * dtype.itemsize:
        raise pickle.UnpicklingError(f"storage {key!s:.50} has {len(data) - start} bytes, not {numel} × {dtype}")
    return Storage(memoryview(data)[start:], dtype, numel)


def _nothing(name):
    raise pickle.UnpicklingError("it refers to a storage outside itself")


def open_snapshot(path: str | os.PathLike, which: str = "ema") -> dict[str, LazyTensor]:
    """{name: tensor} of the state dict of a .pkl: of the module in it, or of the one it has under `which`.

    Raises ValueError for damaged files, for a file without that module, and for anything in the pickle that is neither
    data, a module nor a tensor (nothing of it is executed).
    """
    with as_path(path).open("rb") as opened:
        data = opened.read()
    file = File(str(path), len(data), lambda: io.BytesIO(data))
    try:
        check_opcodes(data, len(data))
        content: typing.Any = _Snapshot(io.BytesIO(data), _nothing, SNAPSHOT).load()
        if isinstance(content, dict):
            modules = {name: value for name, value in content.items() if isinstance(value, _Module)}
            if which not in modules:
                raise ValueError(f"it has no module {which!r}, but {', '.join(map(str, modules)) or 'none at all'}")
            content = modules[which]
        state = _state_dict(content)
    except Exception as error:  # a hostile pickle can raise anything
        raise ValueError(
            f"{file} is no snapshot of NVlabs: {type(error).__name__}: {error}. Nothing in it was executed; {WAY_OUT}"
        ) from None
    return {name: lazy_tensor(file, name, view) for name, view in flatten(file, state).items()}


def _state_dict(module) -> dict:
    """Parameters and buffers, and those of the modules inside, nested. Modules without an end end in an error."""
    if not isinstance(module, _Module):
        raise ValueError(f"there is {type(module).__name__!r} in the place of a module")
    groups = [module.state.get(name) or {} for name in ("_parameters", "_buffers")]
    found = {name: value for group in groups for name, value in group.items() if value is not None}
    inner = (module.state.get("_modules") or {}).items()
    return found | {name: _state_dict(value) for name, value in inner if value is not None}

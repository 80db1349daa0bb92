"""Reads the .pkl snapshots of NVlabs (EDM, EDM2, StyleGAN's Inception) without executing anything that is in them.

Such a pickle holds whole modules: of each class its source, which unpickling would run, and the state of the object.
Here a module is its state alone, and its source a string that nobody reads. A tensor's storage is in it as the bytes of
a file of torch.save of before 1.6: five pickles (a magic number, a version, the machine, the storage, its key), then
the number of elements and their memory. All of a file is held in memory until its tensors are read.
"""

import functools
import io
import os
import pickle
import re
from collections.abc import Iterator

from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.convert.pickles import Dict, Ignored, Inert, load
from rcm_jax.convert.torch_file import (
    ALLOWED,
    STORAGES,
    WAY_OUT,
    File,
    Storage,
    flatten,
    lazy_tensor,
    named_in,
)
from rcm_jax.util.files import listed, reading, regular

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


def _find(module, name):
    """Also finds modules."""
    return _Module if TORCH_MODULE.fullmatch(module) else named_in(SNAPSHOT)(module, name)


def _referred(reference) -> tuple:
    """In the old format: a storage is (its type, its key, its number of elements)."""
    tag, kind, key, _, numel, view = reference
    if tag != "storage" or type(kind) is not str or type(numel) is not int or numel < 0 or view is not None:
        raise pickle.UnpicklingError("a reference is not (storage, type, key, location, number of elements, None)")
    return kind, key, numel


def _old_storage(data: bytes) -> Storage:
    """The storage that is all of a file of the old format; pickle.UnpicklingError for any other file."""
    stream = io.BytesIO(data)
    parts = [load(stream, len(data), named_in(STORAGE_TYPES), _referred) for _ in range(5)]
    magic, version, machine, (kind, key, numel), keys = parts
    if (magic, version, machine["little_endian"], keys) != (MAGIC, VERSION, True, [key]):
        raise pickle.UnpicklingError("a tensor's storage is not as torch writes it on a little-endian machine")
    dtype, start = STORAGES[kind], stream.tell() + 8
    if int.from_bytes(data[start - 8 : start], "little") != numel or len(data) < start + numel * dtype.itemsize:
        raise pickle.UnpicklingError(f"storage {key!s:.50} has {len(data) - start} bytes, not {numel} × {dtype}")
    return Storage(memoryview(data)[start:], dtype, numel)


def _nothing(reference):
    raise pickle.UnpicklingError("it refers to a storage outside itself")


def open_snapshot(path: str | os.PathLike, which: str = "ema") -> dict[str, LazyTensor]:
    """{name: tensor} of the state dict of a .pkl: of the module in it, or of the one it has under `which`.

    Raises ValueError for damaged files, for a file without that module, and for anything in the pickle that is neither
    data, a module nor a tensor (nothing of it is executed).
    """
    with regular(path).open("rb") as opened:
        data = opened.read()
    file = File(str(path), len(data), functools.partial(io.BytesIO, data))
    with reading(file, "is no snapshot of NVlabs", f". Nothing in it was executed; {WAY_OUT}"):
        content = load(io.BytesIO(data), len(data), _find, _nothing)
        if isinstance(content, dict):
            modules = {name: value for name, value in content.items() if isinstance(value, _Module)}
            if which not in modules:
                raise ValueError(f"it has no module {which!r}, but {listed(modules) or 'none at all'}")
            content = modules[which]
        state = _state_dict(content, iter(range(len(data))))
    return {name: lazy_tensor(file, name, view) for name, view in flatten(file, state).items()}


def _state_dict(module, visits: Iterator) -> dict:
    """Parameters and buffers, and those of the modules inside, nested. A module may be in several: visits end."""
    if not isinstance(module, _Module):
        raise ValueError(f"there is {type(module).__name__!r} in the place of a module")
    if next(visits, None) is None:
        raise ValueError("its modules are in each other more often than it has bytes")
    groups = [module.state.get(name) or {} for name in ("_parameters", "_buffers")]
    found = {name: value for group in groups for name, value in group.items() if value is not None}
    inner = (module.state.get("_modules") or {}).items()
    return found | {name: _state_dict(value, visits) for name, value in inner if value is not None}

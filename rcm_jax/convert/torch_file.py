"""Reads the files of torch.save without torch, and without executing anything that is in them.

Format: a zip in which <root>/data.pkl is a pickle in which tensors refer to storages, <root>/data/<key> is the raw
memory of one storage, stored uncompressed; <root>/byteorder. Before torch 1.6 it was one pickle after another (a magic
number, a version, the machine, the content, the keys of its storages) and then the storages, each behind the number of
its elements. A pickle is a program: this one may name nothing but what ALLOWED has (rcm_jax.convert.pickles).
The CRC-32 of a record of the zip is compared when something of it is first read.
"""

import collections
import dataclasses
import functools
import io
import math
import os
import pickle
import sys
import typing
import zipfile
import zlib

import ml_dtypes
import numpy as np

from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.convert.pickles import Dict, Ignored, Inert, load
from rcm_jax.util.files import MOST_AXES, brief, listed, reading, regular

STORAGES = {
    "FloatStorage": np.dtype("float32"),
    "HalfStorage": np.dtype("float16"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype("float64"),
    "LongStorage": np.dtype("int64"),
    "IntStorage": np.dtype("int32"),
    "ShortStorage": np.dtype("int16"),
    "CharStorage": np.dtype("int8"),
    "ByteStorage": np.dtype("uint8"),
    "BoolStorage": np.dtype("bool"),
}
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # with which files of before torch 1.6 begin
CHUNK = 1 << 20
WAY_OUT = "load it with torch where you trust it and save only its state dict, or use the safetensors release"


@dataclasses.dataclass(frozen=True)
class File:
    """What is read: its name in errors, its number of bytes, what opens it, and which records are known to be whole."""

    name: str
    size: int
    open: typing.Callable[[], typing.BinaryIO]
    whole: set[str] = dataclasses.field(default_factory=set)

    def __str__(self):
        return self.name


@dataclasses.dataclass
class Raw:
    """A storage of a file that is no zip; where its memory starts is known when all of them are."""

    filename: str
    file_size: float = math.inf
    start: int = 0


class Storage(typing.NamedTuple):
    """An entry of the zip, a part of an old file, or what is in memory already, as `numel` elements of a dtype."""

    entry: zipfile.ZipInfo | Raw | memoryview
    dtype: np.dtype
    numel: int


class View(Inert, collections.namedtuple("View", "storage offset size stride grad hooks metadata", defaults=[None])):
    """The arguments of torch's rebuild function, unchecked."""

    __slots__ = ()


class _Parameter(Inert):
    """Its tensor."""

    __slots__ = ()

    def __new__(cls, data, requires_grad=None, hooks=None):
        return data


ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): View,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("collections", "OrderedDict"): Dict,
    ("torch", "Size"): Ignored,
    # The `_extra_state` that Transformer Engine puts into state dicts: a BytesIO, its bytes encoded as text.
    ("_io", "BytesIO"): Ignored,
    ("_codecs", "encode"): Ignored,
    ("__builtin__", "bytes"): Ignored,
} | {("torch", name): name for name in STORAGES}


def named_in(allowed: typing.Mapping) -> typing.Callable[[str, str], typing.Any]:
    """What finds a class, or the name of a storage, in a table; every other name is an error."""

    def find(module, name):
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for '{brief(f'{module}.{name}')}', which no plain state dict needs")
        return allowed[module, name]

    return find


def _referred(find_entry, storages: list[Storage], reference) -> Storage:
    """The storage of a persistent reference, also appended to those that were met before."""
    tag, kind, key, _, numel, *view = reference
    known = type(kind) is str and kind in STORAGES and view in ([], [None])  # a view of another: until torch 0.4
    if tag != "storage" or not known or type(key) is not str or type(numel) is not int or numel < 0:
        raise pickle.UnpicklingError("a reference is not (storage, type, key, location, number of elements)")
    entry = find_entry(f"data/{key}")
    storage = Storage(entry, STORAGES[kind], numel)
    needed, held = numel * storage.dtype.itemsize, entry.file_size
    if held < needed:
        raise pickle.UnpicklingError(f"storage {key:.50} has {held} bytes, {numel} × {storage.dtype} need {needed}")
    storages.append(storage)
    return storage


def open_torch_file(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """{name: tensor} of a .pth/.pt file; names of nested dicts are joined by dots, what is no tensor is left out.

    Reads the pickle and the zip's directory; a tensor's bytes are read when it is. Raises ValueError for other formats,
    for damaged files, and for anything in the pickle that is neither data nor a tensor (nothing of it is executed).
    """
    place = regular(path)
    with place.open("rb") as opened:
        file = File(str(path), opened.seek(0, os.SEEK_END), lambda: place.open("rb"))
    return {name: lazy_tensor(file, name, view) for name, view in flatten(file, _content(file)).items()}


def read_torch_tensor(data: bytes, name: str) -> np.ndarray:
    """The tensor of a .pth/.pt file that is one tensor and no dict, from the file's bytes; name: its name in errors.

    Raises ValueError as open_torch_file does, and for a file with anything else in it.
    """
    file = File(name, len(data), lambda: io.BytesIO(data))
    content = _content(file)
    if not isinstance(content, View):
        raise ValueError(f"{name} holds {type(content).__name__.strip('_').lower()}, not one tensor by itself")
    return np.asarray(lazy_tensor(file, "the tensor", content))


def _content(file: File) -> typing.Any:
    """What the pickle makes, with views in the place of tensors."""
    with file.open() as opened:
        if opened.read(len(MAGIC)) == MAGIC:
            return _old_content(file, opened)
    with reading(file, f"({file.size} bytes) cannot be read"), file.open() as opened:
        archive = _directory(opened)
        root = _root(archive, file.size)
        find_entry = functools.partial(_entry, archive, file.size, root)
        if f"{root}/byteorder" in archive.NameToInfo and _record(file, find_entry("byteorder")) != b"little":
            raise ValueError(f"it was written on a big-endian machine; {WAY_OUT}")
        data = _record(file, find_entry("data.pkl"))
    with reading(file, "is no plain state dict", f". Nothing in it was executed; {WAY_OUT}"):
        return load(io.BytesIO(data), len(data), named_in(ALLOWED), functools.partial(_referred, find_entry, []))


def _directory(opened) -> zipfile.ZipFile:
    """Of a zip; zipfile reads it when it is opened, and nothing else."""
    try:
        with zipfile.ZipFile(opened) as archive:
            return archive
    except Exception as error:  # a hostile directory can raise anything
        opened.seek(0)
        is_zip = opened.read(4) == b"PK\x03\x04"
        why = f"the zip is truncated or damaged ({brief(error)}); download or copy it again"
        other = f"it is no zip, and no old file of torch.save; load and save it with a current torch, or {WAY_OUT}"
        raise ValueError(why if is_zip else other) from None


def _old_content(file, opened):
    """The same for a file of before torch 1.6, opened behind its magic number."""
    storages: list[typing.Any] = []
    refer = functools.partial(_referred, functools.cache(Raw), storages)
    with reading(file, "is no plain state dict", f". Nothing in it was executed; {WAY_OUT}"):
        version, machine = (load(opened, file.size, named_in(ALLOWED), _nothing) for _ in range(2))
        if version != 1001 or not machine["little_endian"]:
            raise ValueError(f"it is of version {version}, or written on a big-endian machine")
        content = load(opened, file.size, named_in(ALLOWED), refer)
        order = load(opened, file.size, named_in(ALLOWED), _nothing)
        left: dict[str, typing.Any] = {storage.entry.filename: storage for storage in storages}
        if any(storage != left[storage.entry.filename] for storage in storages):
            raise ValueError("it has two storages of one name")
        start = opened.tell()
        for storage in (left.pop(f"data/{key}") for key in order):
            opened.seek(start)
            if int.from_bytes(opened.read(8), "little") != storage.numel:
                raise ValueError(f"{storage.entry.filename:.50} has not {storage.numel} elements")
            storage.entry.start = start + 8
            start += 8 + storage.numel * storage.dtype.itemsize
    if left or start > file.size:
        raise ValueError(f"{file} is truncated: it has {file.size} of {start} bytes; download or copy it again")
    return content


def _nothing(reference):
    raise pickle.UnpicklingError("it refers to a storage where none is")


def _root(archive, size):
    """The folder in a zip that has all; ValueError unless every record is there once, and in a place of its own."""
    entries, names = archive.infolist(), archive.NameToInfo
    if len(names) < len(entries):
        twice = (name for name, count in collections.Counter(e.filename for e in entries).items() if count > 1)
        raise ValueError(f"the zip has two records of one name: {listed(twice)}")
    if sum(entry.compress_size for entry in entries) > size:
        raise ValueError("the zip has records in the place of others")
    roots = [name.split("/")[0] for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"a file of torch.save has one data.pkl in a folder, this zip has {len(roots)}; {WAY_OUT}")
    return roots[0]


def _entry(archive, file_size, root, name):
    """The zip entry <root>/<name>. Names are looked up in the zip's directory and nowhere else."""
    try:
        entry = archive.getinfo(f"{root}/{name}")
    except KeyError:
        raise ValueError(f"the entry {brief(f'{root}/{name}')} is missing") from None
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        why = "is compressed or encrypted, which torch.save never does"
        raise ValueError(f"the entry {brief(entry.filename)} {why}; {WAY_OUT}")
    if not 0 <= entry.header_offset <= file_size - entry.file_size:
        raise ValueError(f"the entry {brief(entry.filename)} lies outside the file's {file_size} bytes")
    return entry


def flatten(file, content):
    """{dotted name: view} in order, without recursion: depth and sharing are the file's choice, the length of all names
    together is not."""
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no dict of tensors; {WAY_OUT}")
    views, seen, letters = {}, set(), 0
    stack: list[tuple[str, dict | View]] = [("", content)]
    while stack:
        prefix, item = stack.pop()
        if isinstance(item, View):
            name = prefix[1:]
            if name in views:
                raise ValueError(f"{file} holds two tensors named {brief(name)!r}; {WAY_OUT}")
            views[name] = item
        elif id(item) in seen:
            raise ValueError(f"{file} holds {brief(prefix[1:])!r} a second time; {WAY_OUT}")
        else:
            seen.add(id(item))
            below = [(key, value) for key, value in item.items() if isinstance(value, dict | View)]
            if not all(isinstance(key, str | int) for key, _ in below):
                raise ValueError(
                    f"{file}: {brief(prefix[1:])!r} has keys that are neither strings nor integers; {WAY_OUT}"
                )
            letters += sum(len(prefix) + len(key) if isinstance(key, str) else len(prefix) for key, _ in below)
            if letters > 1_000_000 + file.size:
                raise ValueError(f"{file}: {brief(prefix[1:])!r} is too long for a name, or too deep; {WAY_OUT}")
            stack += reversed([(f"{prefix}.{key}", value) for key, value in below])
    if not views:
        raise ValueError(f"{file} holds not a single tensor in its dicts; {WAY_OUT}")
    return views


def lazy_tensor(file, name, view):
    """The view as a tensor, after checking that it lies inside its storage."""
    storage, offset, size, stride = view[:4]
    shaped = isinstance(storage, Storage) and type(size) is tuple and type(stride) is tuple
    if not shaped or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError(f"{file}: {brief(name)!r} is no storage with an offset, a shape and strides from 0 up")
    extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=False))
    numpy_can = len(size) == len(stride) <= MOST_AXES and math.prod(max(n, 1) for n in size) * 8 <= sys.maxsize
    repeated = numpy_can and math.prod(size) > max(file.size, storage.numel)  # by strides of 0
    if not numpy_can or repeated or offset + extent > storage.numel:
        raise ValueError(
            f"{file}: {brief(name)!r} with shape {brief(size)}, strides {brief(stride)} and offset {brief(offset)} "
            f"does not lie inside its storage of {storage.numel} elements"
        )
    return LazyTensor(size, storage.dtype, functools.partial(_read, file, view, extent))


def _read(file, view, extent):
    """Reads no byte outside the view's extent."""
    entry, dtype, _ = view.storage
    start, count = view.offset * dtype.itemsize, extent * dtype.itemsize
    in_memory = isinstance(entry, memoryview)
    content = bytes(entry[start : start + count]) if in_memory else _read_entry(file, entry, start, count)
    data = np.frombuffer(content, np.uint8)
    # The stride of an axis of one element is arbitrary, and so are all strides of an empty tensor.
    strides = [step * dtype.itemsize if n > 1 and extent else 0 for n, step in zip(view.size, view.stride, strict=True)]
    return np.lib.stride_tricks.as_strided(data.view(dtype), view.size, strides)


def _read_entry(file, entry, start, count):
    """So many bytes of an old file, or of an entry of the zip."""
    with reading(file, "cannot be read any more"), file.open() as opened:
        if isinstance(entry, Raw):
            opened.seek(entry.start + start)
            content = opened.read(count)
        else:
            content = _record(file, entry, start, count, opened)
    if len(content) != count:
        raise ValueError(f"{file} is truncated: {brief(entry.filename)} has {len(content)} of {count} bytes")
    return content


def _record(file, entry, start=0, count=None, opened=None):
    """So many bytes of an entry of the zip, by default all. Its directory does not tell where an entry's data starts:
    that is behind a local header (30 bytes, then a name and padding) of its own length."""
    if opened is None:
        with file.open() as opened:
            return _record(file, entry, start, entry.file_size, opened)
    opened.seek(entry.header_offset)
    header = opened.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        name, place = brief(entry.filename), entry.header_offset
        raise ValueError(f"{file} is damaged: no entry {name} at byte {place}")
    opened.seek(sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28)), os.SEEK_CUR)
    if entry.filename in file.whole or not entry.CRC:  # torch writes 0 where set_crc32_options(False) was called
        opened.seek(start, os.SEEK_CUR)
        return opened.read(count)
    total = _crc(opened, start)
    content = opened.read(count)
    total = _crc(opened, entry.file_size - start - count, zlib.crc32(content, total))
    if len(content) == count and total != entry.CRC:
        told = f"{brief(entry.filename)} has the CRC-32 {total:08x}, not {entry.CRC:08x}"
        raise ValueError(f"{file} is damaged: {told}; download or copy it again")
    file.whole.add(entry.filename)
    return content


def _crc(opened, count, total=0) -> int:
    """Of the next so many bytes."""
    while count > 0 and (part := opened.read(min(count, CHUNK))):
        total, count = zlib.crc32(part, total), count - len(part)
    return total

"""Reads the files of torch.save without torch, and without executing anything that is in them.

Format: a zip in which <root>/data.pkl is a pickle in which tensors refer to storages, <root>/data/<key> is the raw
memory of one storage, stored uncompressed; <root>/byteorder. Before torch 1.6 it was one pickle after another (a magic
number, a version, the machine, the content, the keys of its storages) and then the storages, each behind the number of
its elements. A pickle is a program: this one may name nothing but what ALLOWED has.
A hostile file can take long or end the process (keys nested millions deep), it cannot run anything.
"""

import collections
import dataclasses
import functools
import io
import math
import os
import pickle
import pickletools
import sys
import typing
import zipfile

import ml_dtypes
import numpy as np

from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.util.files import as_path

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
WAY_OUT = "load it with torch where you trust it and save only its state dict, or use the safetensors release"


class File(typing.NamedTuple):
    """What is read: its name in errors, its number of bytes, and what opens it."""

    name: str
    size: int
    open: typing.Callable[[], typing.BinaryIO]

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


class Inert:
    """Base of the classes that a file can name. A pickle's BUILD finds __setstate__ on the class and on its instances,
    so it can change neither; there is no __dict__."""

    __slots__ = ()

    @staticmethod
    def __setstate__(*state):
        pass


class Dict(Inert, dict):
    """An OrderedDict without attributes: the _metadata of state dicts is dropped."""

    __slots__ = ()


class View(Inert, collections.namedtuple("View", "storage offset size stride grad hooks metadata", defaults=[None])):
    """The arguments of torch's rebuild function, unchecked."""

    __slots__ = ()


class _Parameter(Inert):
    """Its tensor."""

    __slots__ = ()

    def __new__(cls, data, requires_grad=None, hooks=None):
        return data


class Ignored(Inert):
    """Something that is no tensor and that real checkpoints have beside them; its arguments are dropped."""

    __slots__ = ()

    def __new__(cls, *args):
        return super().__new__(cls)


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


class Unpickler(pickle.Unpickler):
    """Makes dicts, lists, tuples, numbers, strings and the classes above; every other name is an error."""

    def __init__(self, stream: typing.BinaryIO, find_entry: typing.Any, allowed: typing.Mapping = ALLOWED):
        super().__init__(stream)
        self._find_entry, self._allowed = find_entry, allowed
        self.storages: list[typing.Any] = []  # in the order in which they were met

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r:.200}, which no plain state dict needs")
        return self._allowed[module, name]

    def persistent_load(self, reference):
        tag, kind, key, _, numel, *view = reference
        known = type(kind) is str and kind in STORAGES and view in ([], [None])  # a view of another: until torch 0.4
        if tag != "storage" or not known or type(key) is not str or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a reference is not (storage, type, key, location, number of elements)")
        entry = self._find_entry(f"data/{key}")
        storage = Storage(entry, STORAGES[kind], numel)
        needed, held = numel * storage.dtype.itemsize, entry.file_size
        if held < needed:
            raise pickle.UnpicklingError(f"storage {key:.50} has {held} bytes, {numel} × {storage.dtype} need {needed}")
        self.storages.append(storage)
        return storage


def open_torch_file(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """{name: tensor} of a .pth/.pt file; names of nested dicts are joined by dots, what is no tensor is left out.

    Reads the pickle and the zip's directory; a tensor's bytes are read when it is. Raises ValueError for other formats,
    for damaged files, and for anything in the pickle that is neither data nor a tensor (nothing of it is executed).
    """
    place = as_path(path)
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
    try:
        with file.open() as opened, zipfile.ZipFile(opened) as archive:
            root = _root(archive)
            find_entry = functools.partial(_entry, archive, file.size, root)
            if f"{root}/byteorder" in archive.namelist() and archive.read(find_entry("byteorder")) != b"little":
                raise ValueError("it was written on a big-endian machine")
            data = archive.read(find_entry("data.pkl"))
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{file} ({file.size} bytes) cannot be read: {_why(file, error)}") from None
    try:
        check_opcodes(data, len(data))
        return Unpickler(io.BytesIO(data), find_entry).load()
    except Exception as error:  # a hostile pickle can raise anything
        raise ValueError(
            f"{file} is no plain state dict: {type(error).__name__}: {error}. Nothing in it was executed; {WAY_OUT}"
        ) from None


def _old_content(file, opened):
    """The same for a file of before torch 1.6, opened behind its magic number."""
    try:
        version, machine = (Unpickler(_next_pickle(opened), None).load() for _ in range(2))
        if version != 1001 or not machine["little_endian"]:
            raise pickle.UnpicklingError(f"it is of version {version}, or written on a big-endian machine")
        unpickler = Unpickler(_next_pickle(opened), functools.cache(Raw))
        content = unpickler.load()
        order = Unpickler(_next_pickle(opened), None).load()
        storages = {storage.entry.filename: storage for storage in unpickler.storages}
        if any(storage != storages[storage.entry.filename] for storage in unpickler.storages):
            raise pickle.UnpicklingError("it has two storages of one name")
        start = opened.tell()
        for storage in (storages.pop(f"data/{key}") for key in order):
            opened.seek(start)
            if int.from_bytes(opened.read(8), "little") != storage.numel:
                raise pickle.UnpicklingError(f"{storage.entry.filename} has not {storage.numel} elements")
            assert isinstance(storage.entry, Raw)
            storage.entry.start = start + 8
            start += 8 + storage.numel * storage.dtype.itemsize
    except Exception as error:  # a hostile pickle can raise anything
        raise ValueError(
            f"{file} is no plain state dict: {type(error).__name__}: {error}. Nothing in it was executed; {WAY_OUT}"
        ) from None
    if storages or start > file.size:
        raise ValueError(f"{file} is truncated: it has {file.size} of {start} bytes; download or copy it again")
    return content


def _next_pickle(opened) -> typing.BinaryIO:
    """The pickle that begins where a file is open, checked; the file then stands behind it."""
    start = opened.tell()
    collections.deque(pickletools.genops(opened), 0)
    size = opened.tell() - start
    opened.seek(start)
    data = opened.read(size)
    check_opcodes(data, size)
    return io.BytesIO(data)


def _root(archive):
    roots = [name.split("/")[0] for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"a file of torch.save has one data.pkl in a folder, this zip has {len(roots)}")
    return roots[0]


def _entry(archive, file_size, root, name):
    """The zip entry <root>/<name>. Names are looked up in the zip's directory and nowhere else."""
    try:
        entry = archive.getinfo(f"{root}/{name}")
    except KeyError:
        raise ValueError(f"the entry {root}/{name:.100} is missing") from None
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        raise ValueError(f"the entry {entry.filename} is compressed or encrypted, which torch.save never does")
    if not 0 <= entry.header_offset <= file_size - entry.file_size:
        raise ValueError(f"the entry {entry.filename} lies outside the file's {file_size} bytes")
    return entry


def _why(file, error):
    with file.open() as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"
    if not isinstance(error, zipfile.BadZipFile):
        return f"{error}; {WAY_OUT}"
    if is_zip:
        return f"the zip is truncated or damaged ({error}); download or copy it again"
    return f"it is no zip, and no old file of torch.save; load and save it with a current torch, or {WAY_OUT}"


def check_opcodes(data, size):
    """Refuses what the unpickler does without asking: codes of the copyreg registry, and a memo of any length.

    data: bytes, or a stream that is left behind the pickle; of so many bytes in all.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(f"it uses the extension code {argument}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > size:
            raise pickle.UnpicklingError(f"it has {size} bytes and wants to memorise item {argument}")


def flatten(file, content):
    """{dotted name: view} in order, without recursion: depth and sharing are the file's choice."""
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no dict of tensors; {WAY_OUT}")
    views, seen = {}, set()
    stack: list[tuple[str, dict | View]] = [("", content)]
    while stack:
        prefix, item = stack.pop()
        if isinstance(item, View):
            name = prefix[1:]
            if name in views:
                raise ValueError(f"{file} holds two tensors named {name!r:.200}; {WAY_OUT}")
            views[name] = item
        elif id(item) in seen:
            raise ValueError(f"{file} holds {prefix[1:]!r:.200} a second time; {WAY_OUT}")
        else:
            seen.add(id(item))
            below = [(key, value) for key, value in item.items() if isinstance(value, dict | View)]
            if not all(isinstance(key, str | int) for key, _ in below):
                raise ValueError(
                    f"{file}: {prefix[1:]!r:.200} has keys that are neither strings nor integers; {WAY_OUT}"
                )
            stack += reversed([(f"{prefix}.{key}", value) for key, value in below])
    if not views:
        raise ValueError(f"{file} holds not a single tensor in its dicts; {WAY_OUT}")
    return views


def lazy_tensor(file, name, view):
    """The view as a tensor, after checking that it lies inside its storage."""
    storage, offset, size, stride = view[:4]
    shaped = isinstance(storage, Storage) and type(size) is tuple and type(stride) is tuple
    if not shaped or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError(f"{file}: {name!r:.200} is no storage with an offset, a shape and strides from 0 up")
    extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=False))
    numpy_can = len(size) == len(stride) <= 64 and math.prod(max(n, 1) for n in size) * 8 <= sys.maxsize
    if not numpy_can or offset + extent > storage.numel:
        raise ValueError(
            f"{file}: {name!r:.200} with shape {size}, strides {stride} and offset {offset} does not lie inside its "
            f"storage of {storage.numel} elements"
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
    """So many bytes of an old file, or of an entry of the zip. Its directory does not tell where an entry's data
    starts: that is behind a local header (30 bytes, then a name and padding) of its own length."""
    with file.open() as opened:
        if isinstance(entry, Raw):
            opened.seek(entry.start + start)
        else:
            opened.seek(entry.header_offset)
            header = opened.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise ValueError(f"{file} is damaged: no entry {entry.filename} at byte {entry.header_offset}")
            skip = sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            opened.seek(skip + start, os.SEEK_CUR)
        content = opened.read(count)
    if len(content) != count:
        raise ValueError(f"{file} is truncated: {entry.filename} has {len(content)} of {count} bytes")
    return content

"""Files as torch.save makes them, from pickle opcodes: honest ones and others."""

import pathlib
import pickle
import typing
import zipfile

import numpy as np


class Name(typing.NamedTuple):
    """The opcode GLOBAL."""

    module: str
    name: str


class Call(typing.NamedTuple):
    """The opcode REDUCE, and BUILD if there is a state."""

    function: typing.Any
    arguments: tuple
    state: typing.Any = None


class Reference(typing.NamedTuple):
    """The opcode BINPERSID."""

    target: typing.Any


REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
ORDERED = Call(Name("collections", "OrderedDict"), ())


def opcodes(x) -> bytes:
    """What builds x, in protocol 2 and without memo."""
    if isinstance(x, bytes):
        return x  # opcodes already
    if isinstance(x, Name):
        return f"c{x.module}\n{x.name}\n".encode()
    if isinstance(x, Call):
        built = b"" if x.state is None else opcodes(x.state) + b"b"
        return opcodes(x.function) + opcodes(x.arguments) + b"R" + built
    if isinstance(x, Reference):
        return opcodes(x.target) + b"Q"
    if isinstance(x, tuple | list):
        end = b"t" if isinstance(x, tuple) else b"l"
        return b"(" + b"".join(map(opcodes, x)) + end
    if isinstance(x, dict):
        return b"}(" + b"".join(opcodes(part) for item in x.items() for part in item) + b"u"
    return pickle.dumps(x, 2)[2:-1].split(b"q\x00")[0]  # a string, a number, None, a bool


def pickled(x) -> bytes:
    return b"\x80\x02" + opcodes(x) + b"."


def storage(key: str, numel, kind: str = "FloatStorage", rest: tuple = ()):
    return Reference(("storage", Name("torch", kind), key, "cpu", numel, *rest))


def tensor(key: str, size, stride, numel, offset=0, kind: str = "FloatStorage", rest: tuple = ()):
    """rest: what references have besides in old files."""
    return Call(REBUILD, (storage(key, numel, kind, rest), offset, size, stride, False, ORDERED))


def save(path: pathlib.Path, content, storages=None, *, byteorder=b"little", compression=zipfile.ZIP_STORED):
    """A file as torch.save makes it; content is what opcodes takes, or a whole pickle."""
    data = content if isinstance(content, bytes) else pickled(content)
    storages = {"0": np.arange(6, dtype=np.float32)} if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        if byteorder is not None:
            archive.writestr("archive/byteorder", byteorder)
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", np.asarray(array).tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def save_state_dict(path: pathlib.Path, arrays: dict[str, np.ndarray]):
    """A state dict of float32 or bfloat16 arrays, each with a storage of its own."""
    kinds = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage"}
    tensors, storages = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        array = np.ascontiguousarray(array)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        tensors[name] = tensor(str(i), array.shape, strides, array.size, kind=kinds[array.dtype.name])
        storages[str(i)] = array
    return save(path, tensors, storages)


def in_bytes(data: bytes) -> bytes:
    """The opcode BINBYTES."""
    return b"B" + len(data).to_bytes(4, "little") + data


def old_stream(array: np.ndarray, kind: str = "FloatStorage", **changes) -> bytes:
    """The storage of an array as torch.save wrote it before 1.6; changes: of the parts below."""
    reference = ("storage", Name("torch", kind), "7", "cpu", array.size, None)
    parts = {
        "magic": opcodes(0x1950A86A20F9469CFC6C),
        "version": opcodes(1001),
        "machine": opcodes({"protocol_version": 1001, "little_endian": True}),
        "storage": opcodes(Reference(reference)),
        "keys": opcodes(["7"]),
        "count": array.size.to_bytes(8, "little"),
        "memory": array.ravel("K").tobytes(),
    } | changes
    pickles = [b"\x80\x02" + parts[name] + b"." for name in ("magic", "version", "machine", "storage", "keys")]
    return b"".join(pickles) + parts["count"] + parts["memory"]


def snapshot_tensor(array: np.ndarray, stream: bytes | None = None, kind: str = "FloatStorage"):
    """A tensor in a pickle of its own, not in a file of torch.save."""
    data = in_bytes(old_stream(array, kind) if stream is None else stream)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    from_bytes = Call(Name("torch.storage", "_load_from_bytes"), (data,))
    return Call(REBUILD, (from_bytes, 0, array.shape, strides, False, ORDERED))


def module(parameters=None, buffers=None, modules=None, **state):
    """A module of NVlabs, with a source that must not run."""
    groups = {"_parameters": parameters or {}, "_buffers": buffers or {}, "_modules": modules or {}}
    meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": "Net"}
    return Call(Name("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta | {"state": groups | state},))


def nested_modules(arrays: dict[str, np.ndarray]):
    """A module of modules that has these arrays as its state dict."""
    own = {name: snapshot_tensor(array) for name, array in arrays.items() if "." not in name}
    parts = {}
    for name, array in arrays.items():
        first, _, rest = name.partition(".")
        if rest:
            parts.setdefault(first, {})[rest] = array
    return module(own, modules={name: nested_modules(part) for name, part in parts.items()})

"""Numpy arrays in pickles, as NVlabs keep statistics of features, read without running the pickle."""

import io
import pickle
from typing import Any

import numpy as np

from rcm_jax.convert.pickles import Dict, Inert, load
from rcm_jax.util.files import brief, local, reading, regular


class _Dtype(Inert):
    """numpy.dtype(code, False, True), whose state has the order of bytes second."""

    __slots__ = ("code", "order")

    def __init__(self, code, *_):
        self.code, self.order = code, "<"

    def __setstate__(self, state):
        self.order = state[1]

    def made(self) -> np.dtype:
        """ValueError for what are no numbers."""
        if not isinstance(self.code, str) or self.code[:1] not in "fiub" or self.order not in ("<", ">", "|"):
            raise ValueError(f"it has an array of {brief(self.code)}, not of numbers")
        return np.dtype(self.code).newbyteorder(self.order)


class _Array(Inert):
    """What _reconstruct makes: its state is (version, shape, dtype, whether columns come first, bytes)."""

    __slots__ = ("state",)

    def __init__(self, *_):
        self.state: Any = ()

    def __setstate__(self, state):
        self.state = state

    def made(self) -> np.ndarray:
        _, shape, dtype, by_columns, data = self.state
        return np.ndarray(shape, dtype.made(), data, order="F" if by_columns else "C")


class _FromBuffer(_Array):
    """numpy's _frombuffer(bytes, dtype, shape, order)."""

    __slots__ = ()

    def __init__(self, data, dtype, shape, order):
        self.state = 1, shape, dtype, order == "F", data


class _Encoded(bytes):
    """_codecs.encode(text, "latin1"): bytes in the older protocols."""

    def __new__(cls, text, encoding):
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it encodes in {brief(encoding)}")
        return super().__new__(cls, text.encode("latin1"))


class _Class(Inert):
    """numpy.ndarray, which is an argument of _reconstruct alone."""

    __slots__ = ()


FOUND = {("numpy", "ndarray"): _Class, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): _Encoded} | {
    (f"numpy.{core}{module}", name): made
    for core in ("core.", "_core.")
    for module, name, made in (("multiarray", "_reconstruct", _Array), ("numeric", "_frombuffer", _FromBuffer))
}


def _find(module: str, name: str) -> Any:
    if (module, name) not in FOUND:
        raise pickle.UnpicklingError(f"it asks for {brief(f'{module}.{name}', 100)}, which no dict of arrays needs")
    return FOUND[module, name]


def _refer(reference) -> Any:
    raise pickle.UnpicklingError(f"it refers to {brief(reference)}, which is not in it")


def read_arrays(path, key: str) -> dict[str, np.ndarray]:
    """The arrays of the dict `key` in the dict that a pickle holds; ValueError for anything else."""
    with reading(path, "is no pickle of arrays"):
        data = regular(local(path)).read_bytes()
        content = load(io.BytesIO(data), len(data), _find, _refer)
        found = content.get(key, {}) if isinstance(content, dict | Dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"it has no dict {key!r}")
        return {name: value.made() for name, value in found.items() if isinstance(value, _Array)}

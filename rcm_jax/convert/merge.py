"""base + Σ w·(a − b) of checkpoints, tensor by tensor: what a training changed, added to other weights."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from rcm_jax import convert
from rcm_jax.convert import table
from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.convert.values import check_finite

AT_ONCE = 2**22  # numbers in float64


class Term(NamedTuple):
    """weight·(plus − minus), of tensors under the same names."""

    weight: float
    plus: Mapping
    minus: Mapping


def under_names_of(
    layout: str, kind: str, tensors: Mapping, config, left: Callable[[str], bool] = lambda name: False
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint under the names, and in the shapes, of a layout; nothing is read.

    Args:
      layout: of the result.
      kind: one of convert.GENERATORS.
      tensors: of any layout, seen by names and shapes, with or without one of table.PREFIXES.
      config: of the model.
      left: whether a name of the layout is left out, whatever it is in the tensors: another shape, or nothing.

    Raises:
      ValueError: that lists all other tensors that are missing, unexpected, of another shape or of no float dtype.
    """
    tensors, layouts = convert.parameters(kind, tensors), convert.entries(kind, config)
    there, problems = table.nearest(tensors, layouts)
    by_place = {_place(entry): name for name, entry in layouts[layout].items()}
    names = {name: by_place[_place(entry)] for name, entry in layouts[there].items()}
    what = f"the {len(tensors)} tensors are no {kind} of this config; nearest is the layout {there!r}"
    table.check_no_problems([(name, wrong) for name, wrong in problems if not left(names.get(name, name))], what)
    shapes = convert.shapes_of(kind, config)

    def read(name):
        theirs, entry = np.asarray(tensors[name]), layouts[there][name]
        check_finite(name, theirs)
        if there == layout:
            return theirs
        shape = shapes[entry.rule.ours] if entry.layer is None else shapes[entry.rule.ours][1:]
        wanted = layouts[layout][names[name]]
        return wanted.rule.form.to_theirs(entry.rule.form.to_ours(theirs, shape), wanted.shape)

    return {
        ours: LazyTensor(layouts[layout][ours].shape, tensors[name].dtype, functools.partial(read, name))
        for name, ours in names.items()
        if not left(ours)
    }


def _place(entry: table.Entry) -> tuple[str, str]:
    """Which part of our parameters a tensor is."""
    return entry.rule.ours, str(entry.layer)


def merge(base: Mapping, terms: Iterable[Term]) -> dict[str, LazyTensor]:
    """{name: tensor} of base + Σ weight·(plus − minus), in the dtypes of base; made when they are read, one by one.

    Each number is computed in float64. A name that a term lacks stays as it is in base.
    """
    terms = list(terms)

    def read(name):
        return merged(name, np.asarray(base[name]), [term for term in terms if name in term.plus])

    return {
        name: LazyTensor(tuple(tensor.shape), np.dtype(tensor.dtype), functools.partial(read, name))
        for name, tensor in base.items()
    }


def merged(name: str, base: np.ndarray, terms: Iterable[Term]) -> np.ndarray:
    """One tensor of `merge`. A term of weight 1 whose minus is base, bit by bit, puts plus in the place of base: alone
    it gives plus itself, which a sum would not always do. ValueError for results too large for float16."""
    terms, start = list(terms), base
    for i, (weight, plus, minus) in enumerate(terms):
        if weight == 1 and _same_bits(base, np.asarray(minus[name])):
            start = np.asarray(plus[name])
            del terms[i]
            break
    total = start.astype(np.float64).reshape(-1)
    for weight, *both in terms:
        plus, minus = (np.asarray(tensors[name]).reshape(-1) for tensors in both)
        for at in range(0, total.size, AT_ONCE):
            part = slice(at, at + AT_ONCE)
            total[part] += weight * (plus[part].astype(np.float64) - minus[part].astype(np.float64))
    return table.cast(total.reshape(base.shape), base.dtype, name)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    first, second = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return np.array_equal(first, second)

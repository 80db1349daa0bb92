"""From the names of a reference to ours and back, by tables: every tensor is used exactly once, or it is an error.

A layout is one way in which a model is published: its names, and the shapes under them. Blocks that we keep stacked
along a leading layer axis are one tensor each there; their names hold "{}" for the number of the layer.
"""

import functools
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from rcm_jax.convert.values import check_finite
from rcm_jax.util.files import brief, listed

FLOATS = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
# Of training checkpoints, of ComfyUI, of the networks that NVlabs wraps. The longest that fits is a name's.
PREFIXES = ("net.", "net_ema.", "net_fake_score.", "model.diffusion_model.", "model.")


class Conversion(NamedTuple):
    """What conversion must know of a model; functions of its config."""

    record: Any  # of rcm_jax.models: its config class, its published sizes
    init: Callable  # (config, key) -> our parameters, boxed
    layouts: Callable[[Any], dict[str, "list[Rule]"]]
    described: Callable[[Any, str], dict]  # (config, layout) -> what config.json says there
    wide: tuple[str, ...] = ()  # parts of names of tensors that an export does not narrow
    ignored: re.Pattern = re.compile("(?!)")  # names of tensors in files that are no parameters
    aliases: Mapping[str, str] = types.MappingProxyType({})  # second names of a tensor, and its first


@functools.cache
def shapes_of(init: Callable, config) -> dict[str, tuple[int, ...]]:
    """{path: shape} of our parameters; nothing is allocated."""
    boxed = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    leaves: dict[str, Any] = flatten_dict(boxed, sep="/")
    return {path: leaf.value.shape for path, leaf in leaves.items()}


class Form(NamedTuple):
    """How one of our arrays is laid out in a reference: the shape there, and the way to and fro (views if possible)."""

    shape: Callable[[tuple], tuple]
    to_ours: Callable[[np.ndarray, tuple], np.ndarray]  # (theirs, our shape)
    to_theirs: Callable[[np.ndarray, tuple], np.ndarray]  # (ours, their shape)


SAME = Form(lambda shape: shape, lambda a, shape: a, lambda a, shape: a)
MATRIX = Form(lambda shape: shape[::-1], lambda a, shape: a.T, lambda a, shape: a.T)  # torch keeps [out, in]
TABLE = Form(lambda shape: (1, *shape), lambda a, shape: a[0], lambda a, shape: a[None])
CONV = Form(  # ours is [*window, in, out]
    lambda shape: (*shape[:-3:-1], *shape[:-2]),
    lambda a, shape: np.moveaxis(a, (1, 0), (-2, -1)),
    lambda a, shape: np.moveaxis(a, (-1, -2), (0, 1)),
)


def channel_form(axes: int) -> Form:
    """Our [c] as one value for each channel of an image or a video: [c, 1, …], with so many axes of one."""
    return Form(lambda shape: shape + (1,) * axes, lambda a, shape: a.reshape(shape), lambda a, shape: a.reshape(shape))


# The leaves of a module: ours, suffix there, form.
MODULES = {
    "dense": (("/kernel", ".weight", MATRIX), ("/bias", ".bias", SAME)),
    "matrix": (("/kernel", ".weight", MATRIX),),
    "norm": (("/scale", ".weight", SAME), ("/bias", ".bias", SAME)),
    "scale": (("/scale", ".weight", SAME),),
    "table": (("", "", TABLE),),
    "conv": (("/kernel", ".weight", CONV), ("/bias", ".bias", SAME)),
    "image_gamma": (("/scale", ".gamma", channel_form(2)),),
    "kernel": (("/kernel", ".weight", CONV),),
    "batch_norm": tuple(
        (f"/{ours}", f".{theirs}", SAME)
        for ours, theirs in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var"))
    ),
    "video_gamma": (("/scale", ".gamma", channel_form(3)),),
}


class Rule(NamedTuple):
    """One array of ours: its path, its name in the layout (with "{}" if it is stacked) and its form there.

    parts: where the layout has several tensors for it, what "{part}" is in their names; each is an equal part of our
    last axis.
    """

    ours: str
    theirs: str
    form: Form
    parts: tuple[str, ...] = ()


class Entry(NamedTuple):
    """One tensor of a layout: its rule, its index in our array (a layer, a part; None: it is all of it), its shape."""

    rule: Rule
    layer: int | tuple | None
    shape: tuple[int, ...]


def rules_of_modules(rows: Iterable[tuple[str, str, str]], ours: str = "", theirs: str = "") -> list[Rule]:
    """Rules of rows (our module, its name there, kind in MODULES), below the given prefixes."""
    return [
        Rule(ours + module + leaf, theirs + name + suffix, form)
        for module, name, kind in rows
        for leaf, suffix, form in MODULES[kind]
    ]


def columns_of(rows, column: int) -> list[tuple[str, str, str]]:
    """(our module, its name there, kind) of rows (our module, its name in each layout …, kind)."""
    return [(row[0], row[column], row[-1]) for row in rows]


def patch_form(patch) -> Form:
    """Our kernel [pt·ph·pw·c, dim] as a Conv3d kernel [dim, c, pt, ph, pw]."""

    def to_ours(a, shape):
        return a.transpose(2, 3, 4, 1, 0).reshape(shape)

    def to_theirs(a, shape):
        return a.reshape(*patch, shape[1], shape[0]).transpose(4, 3, 0, 1, 2)

    return Form(lambda shape: (shape[1], _channels(shape, patch), *patch), to_ours, to_theirs)


def flat_patch_form(patch) -> Form:
    """Our kernel [pt·ph·pw·c, dim] as a Linear's weight [dim, c·pt·ph·pw]."""
    form = patch_form(patch)

    def to_ours(a, shape):
        return form.to_ours(a.reshape(form.shape(shape)), shape)

    def to_theirs(a, shape):
        return form.to_theirs(a, form.shape(a.shape)).reshape(shape)

    return Form(lambda shape: shape[::-1], to_ours, to_theirs)


def _channels(shape, patch) -> int:
    pt, ph, pw = patch
    return shape[0] // (pt * ph * pw)


def entries_of_rules(rules: Iterable[Rule], shapes: Mapping[str, tuple]) -> dict[str, Entry]:
    """{their name: entry} of a layout; shapes are those of our arrays by path. ValueError unless each has one rule."""
    rules = list(rules)
    paths = [rule.ours for rule in rules]
    if sorted(paths) != sorted(shapes):
        wrong = {*paths} ^ {*shapes} or {path for path in paths if paths.count(path) > 1}
        raise ValueError(f"the conversion table does not cover the parameters exactly once: {sorted(wrong)}")
    found = [(rule, *tensor) for rule in rules for tensor in _tensors_of(rule, shapes[rule.ours])]
    entries = {name: Entry(rule, index, rule.form.shape(shape)) for rule, name, index, shape in found}
    if len(entries) != len(found):
        raise ValueError("the conversion table gives one name to two tensors")
    return entries


def _tensors_of(rule: Rule, shape: tuple) -> list[tuple[str, Any, tuple]]:
    """(name, index in our array, our shape there) of each tensor of a rule, for an array of that shape."""
    if "{}" in rule.theirs:
        whole = [(rule.theirs.replace("{}", str(i)), i, shape[1:]) for i in range(shape[0])]
    else:
        whole = [(rule.theirs, None, shape)]
    if not rule.parts:
        return whole
    width = shape[-1] // len(rule.parts)
    return [
        (
            name.replace("{part}", part),
            (*(() if layer is None else (layer,)), ..., slice(i * width, (i + 1) * width)),
            (*rest[:-1], width),
        )
        for name, layer, rest in whole
        for i, part in enumerate(rule.parts)
    ]


def without_prefix(tensors: Mapping) -> Mapping:
    """The tensors under names without the one of PREFIXES that all of them share, if they do.

    Raises ValueError if a file holds several networks, told apart by such prefixes.
    """
    prefixes = {name: max((p for p in PREFIXES if name.startswith(p)), key=len, default="") for name in tensors}
    found = [prefix for prefix in PREFIXES if prefix in prefixes.values()]
    if not found:
        return tensors
    bare = [name for name, prefix in prefixes.items() if not prefix]
    if len(found) > 1 or bare:
        some = found + ([f"none ({brief(bare[0])}, …)"] if bare else [])
        raise ValueError(f"the tensors have several prefixes, {', '.join(some)}: choose one network by its prefix")
    return {name.removeprefix(found[0]): tensor for name, tensor in tensors.items()}


def recognise(tensors: Mapping, layouts: Mapping[str, Mapping[str, Entry]], what: str) -> str:
    """The layout that the tensors are in; ValueError with all that is wrong with the one they come nearest to."""
    layout, problems = nearest(tensors, layouts)
    check_no_problems(problems, f"the {len(tensors)} tensors are no {what}; nearest is the layout {layout!r}")
    return layout


def nearest(tensors: Mapping, layouts: Mapping[str, Mapping[str, Entry]]) -> tuple[str, list[tuple[str, str]]]:
    """(the layout that the tensors come nearest to, [(tensor, what is wrong with it)])."""
    problems = {name: _problems(tensors, entries) for name, entries in layouts.items()}
    layout = min(problems, key=lambda name: len(problems[name]))
    return layout, problems[layout]


def check_no_problems(problems, what: str) -> None:
    """ValueError that says what, and lists the problems, if there are some."""
    if problems:
        lines = listed(_grouped(problems), 200, "\n- ")
        raise ValueError(f"{what}, with {len(problems)} problems:\n- {lines}")


def _problems(tensors, entries) -> list[tuple[str, str]]:
    """(tensor, what is wrong with it) of everything that keeps the tensors from being this layout."""
    wrong = [(name, f"missing, of shape {_list(entries[name].shape)}") for name in entries if name not in tensors]
    for name, tensor in tensors.items():
        if name not in entries:
            wrong.append((name, f"unexpected, of shape {_list(tensor.shape)}"))
        elif tuple(tensor.shape) != entries[name].shape:
            wrong.append((name, f"shape {_list(tensor.shape)}, must be {_list(entries[name].shape)}"))
        elif np.dtype(tensor.dtype) not in FLOATS:
            wrong.append((name, f"dtype {tensor.dtype}, must be one of {', '.join(map(str, FLOATS))}"))
    return wrong


def _list(shape) -> str:
    return brief([int(n) for n in shape])


def _grouped(problems) -> list[str]:
    """One line for what several layers have in common: blocks.{0-3,7}.norm3.bias: missing."""
    groups = {}
    for name, problem in problems:
        block = re.match(r"(.*\bblocks?\.)(\d{1,9})(\..*)", name)
        key = (block[1], block[3], problem) if block else (name, "", problem)
        groups.setdefault(key, []).append(int(block[2]) if block else None)
    return [
        f"{brief(before)}{_ranges(layers) if after else ''}{brief(after)}: {problem}"
        for (before, after, problem), layers in groups.items()
    ]


def _ranges(numbers) -> str:
    """Numbers as one sees them in a shell: 3, or {0-3,7}."""
    there = set(numbers)
    starts = [n for n in sorted(there) if n - 1 not in there]
    ends = [n for n in sorted(there) if n + 1 not in there]
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return parts[0] if len(numbers) == 1 else "{" + ",".join(parts) + "}"


def read_arrays(tensors: Mapping, entries: Mapping[str, Entry], shapes, dtype=None, progress=lambda count: None):
    """{our path: array} from tensors that are this layout, read one by one into place.

    dtype is that of the result (None: each as it comes; layers of one array are promoted to what holds them all).
    progress is called with the bytes of every tensor read.
    """
    arrays = {}
    for name, (rule, layer, _) in entries.items():
        theirs = np.asarray(tensors[name])
        check_finite(name, theirs)
        shape = shapes[rule.ours]
        if rule.ours not in arrays:
            arrays[rule.ours] = np.empty(shape, dtype or _common_dtype(tensors, entries, rule))
        place = arrays[rule.ours] if layer is None else arrays[rule.ours][layer]
        place[...] = cast(rule.form.to_ours(theirs, place.shape), place.dtype, name)
        progress(theirs.nbytes)
        del theirs  # before the next is read
    return arrays


def cast(array: np.ndarray, dtype, name: str) -> np.ndarray:
    """The array in that dtype; ValueError if a finite value is not finite there (float16 ends at 65,504)."""
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype, copy=False)
    if np.dtype(dtype) == np.float16 and array.dtype != np.float16:
        lost = int(np.sum(np.isfinite(array) & ~np.isfinite(narrow)))
        if lost:
            raise ValueError(f"{name}: {lost} of {array.size} values are too large for float16; take bfloat16")
    return narrow


def _common_dtype(tensors, entries, rule) -> np.dtype:
    dtypes = {np.dtype(tensors[name].dtype) for name, entry in entries.items() if entry.rule is rule}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(jnp.result_type(*dtypes))


def write_arrays(arrays: Mapping, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """{their name: tensor} from {our path: array}; views of the arrays wherever the form allows it."""
    tensors = {}
    for name, (rule, layer, shape) in entries.items():
        ours = np.asarray(arrays[rule.ours])
        tensors[name] = rule.form.to_theirs(ours if layer is None else ours[layer], shape)
    return tensors

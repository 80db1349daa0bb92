"""Checkpoints of reference implementations to our parameters and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rcm_jax.convert import (
    clip_vision,
    cosmos,
    edm,
    edm2,
    efficientnet,
    inception,
    sd_vae,
    t5,
    table,
    wan,
    wan22_vae,
    wan_vae,
)
from rcm_jax.models import NETWORKS
from rcm_jax.util.config import build
from rcm_jax.util.files import brief, read_json, reading

MODELS = {
    "wan": wan.CONVERSION,
    "cosmos": cosmos.CONVERSION,
    "edm": edm.CONVERSION,
    "edm2": edm2.CONVERSION,
    "t5": t5.CONVERSION,
    "umt5": t5.CONVERSION,
    "clip_vision": clip_vision.CONVERSION,
    "wan_vae": wan_vae.CONVERSION,
    "wan22_vae": wan22_vae.CONVERSION,
    "sd_vae": sd_vae.CONVERSION,
    "inception": inception.CONVERSION,
    "efficientnet": efficientnet.CONVERSION,
}
GENERATORS = [name for name in MODELS if name in NETWORKS]
PUBLISHED = {name: (kind, config) for kind in GENERATORS for name, config in NETWORKS[kind].published.items()}
# Encoders and autoencoders are read from their published files whenever they are needed.
PUBLISHED_AROUND = {
    name: (kind, config)
    for kind, model in MODELS.items()
    for name, config in model.record.published.items()
    if kind not in GENERATORS and getattr(config, "model_type", kind) == kind
}
PUBLISHED_DTYPES = ("float32", "bfloat16", "float16")  # of weights


def named(name: str) -> tuple[str, Any]:
    """(key of GENERATORS, config) of a name in PUBLISHED, or of a JSON file that holds {"kind": …, sizes …}."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name in PUBLISHED_AROUND:
        raise ValueError(f"{name} is read as it is published: there is nothing to convert")
    if not name.endswith(".json"):
        raise ValueError(f"model {name!r} is none of {', '.join(PUBLISHED)}, and no .json file")
    values = read_json(name)
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind not in GENERATORS:
        raise ValueError(f"{name}: its kind is '{brief(kind)}'; it must be one of {', '.join(GENERATORS)}")
    with reading(name, "is no config of a model"):
        return kind, build(MODELS[kind].record.config, values)


def name_of(config) -> str:
    """The key of MODELS of a config."""
    names = [name for name, model in MODELS.items() if model.record.config is type(config)]
    asked = getattr(config, "model_type", None)
    return asked if asked in names else names[0]


def under_prefix(tensors: Mapping, prefix: str) -> dict:
    """The tensors whose names begin with the prefix, without it; ValueError if there is none."""
    prefix = prefix if prefix.endswith(".") else f"{prefix}."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        first = brief(next(iter(tensors), "not there"))
        raise ValueError(f"of {len(tensors)} tensors none begins with {prefix!r}; the first is {first}")
    return found


def shapes_of(name: str, config) -> dict[str, tuple[int, ...]]:
    """{path: shape} of our parameters of a model of that config; nothing is allocated."""
    return table.shapes_of(MODELS[name].init, config)


def entries(name: str, config) -> dict[str, dict[str, table.Entry]]:
    """{layout: {tensor name: entry}} of a model of that config; nothing is allocated."""
    shapes = shapes_of(name, config)
    return {layout: table.entries_of_rules(rules, shapes) for layout, rules in MODELS[name].layouts(config).items()}


def check_layout(name: str, config, layout: str) -> None:
    """ValueError for a layout that the model does not have."""
    known = MODELS[name].layouts(config)
    if layout not in known:
        raise ValueError(f"layout {layout!r} is none of {', '.join(known)}")


def recognise(name: str, tensors: Mapping, config) -> str:
    """The layout of tensors, with or without one of table.PREFIXES; ValueError that lists all that does not fit."""
    return table.recognise(parameters(name, tensors), entries(name, config), f"{name} of this config")


def parameters(name: str, tensors: Mapping) -> Mapping:
    """The tensors without their common prefix, under their first names, and without what is no parameter."""
    tensors, model = table.without_prefix(tensors), MODELS[name]
    names = {key: model.aliases.get(key, key) for key in tensors if not model.ignored.fullmatch(key)}
    return tensors if list(names.values()) == list(tensors) else {first: tensors[key] for key, first in names.items()}


def check_aliases(name: str, tensors: Mapping) -> None:
    """ValueError where files hold a tensor under two names, and with two values; both are read."""
    tensors = table.without_prefix(tensors)
    for alias, first in MODELS[name].aliases.items():
        if {alias, first} <= tensors.keys() and not np.array_equal(tensors[alias], tensors[first]):
            raise ValueError(f"{alias} and {first} must be the same, as {name} has one tensor for both; they differ")


def from_reference(name: str, tensors: Mapping, config, *, dtype=None, progress=lambda count: None) -> dict:
    """Our parameters (nested dict of numpy arrays) from tensors of any layout, recognised by names and shapes.

    Args:
      name: a key of MODELS.
      tensors: {reference name: array, or anything with shape and dtype that np.asarray reads}, with or without one
        of table.PREFIXES. They are read one by one: at no time is more than one in memory beside the result. (Two for
        a moment, where a file has a tensor under two names.)
      config: of the model, e.g. WanConfig.
      dtype: of the result; None keeps that of the tensors.
      progress: called with the bytes of every tensor read.

    Raises:
      ValueError: that lists every tensor which is missing, unexpected, of another shape or not of a float dtype; or
        for one that is there under two names, with two values.
    """
    check_aliases(name, tensors)
    tensors = parameters(name, tensors)
    layouts = entries(name, config)
    layout = table.recognise(tensors, layouts, f"{name} of this config")
    arrays = table.read_arrays(tensors, layouts[layout], shapes_of(name, config), dtype, progress)
    return unflatten_dict(arrays, sep="/")


def to_reference(name: str, params, config, layout: str) -> dict[str, np.ndarray]:
    """{reference name: array} of our parameters in a layout; the arrays are views wherever that is possible.

    Raises ValueError for an unknown layout and for parameters that are not those of the config.
    """
    check_layout(name, config, layout)
    layouts, shapes = entries(name, config), shapes_of(name, config)
    arrays: dict[str, Any] = flatten_dict(params, sep="/")
    wrong = [
        f"{path} is {arrays[path].shape if path in arrays else 'missing'}, must be {shapes.get(path, 'absent')}"
        for path in sorted({*arrays, *shapes})
        if path not in arrays or path not in shapes or tuple(arrays[path].shape) != tuple(shapes[path])
    ]
    if wrong:
        raise ValueError(f"the parameters are not {name} of this config: " + "; ".join(wrong))
    return table.write_arrays(arrays, layouts[layout])

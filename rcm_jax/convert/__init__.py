"""Checkpoints of reference implementations to our parameters and back."""

import json
import pathlib
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rcm_jax.convert import cosmos, t5, table, wan, wan_vae
from rcm_jax.models.cosmos import PUBLISHED as PUBLISHED_COSMOS
from rcm_jax.models.cosmos import CosmosConfig
from rcm_jax.models.t5 import PUBLISHED as PUBLISHED_T5
from rcm_jax.models.t5 import T5Config
from rcm_jax.models.wan import PUBLISHED as PUBLISHED_WAN
from rcm_jax.models.wan import WanConfig
from rcm_jax.models.wan_vae import PUBLISHED as PUBLISHED_WAN_VAE
from rcm_jax.models.wan_vae import WanVAEConfig
from rcm_jax.util.config import build


class Model(NamedTuple):
    """What conversion needs of a model; all are functions of its config."""

    config: type
    layouts: Callable[[Any], dict[str, list[table.Rule]]]
    shapes: Callable[[Any], dict[str, tuple]]  # of our parameters, by path
    described: Callable[[Any, str], dict]  # (config, layout) -> what config.json says there
    wide: tuple[str, ...]  # parts of names of tensors that an export does not narrow
    generator: dict[str, Any] | None  # what the published networks predict, as an experiment says it; None: nothing
    ignored: re.Pattern = re.compile("(?!)")  # names of tensors in files that are no parameters
    aliases: Mapping[str, str] = types.MappingProxyType({})  # second names of a tensor, and its first


TEXT_ENCODER = Model(T5Config, t5.layouts, t5.shapes, t5.described, (), None, t5.IGNORED, t5.ALIASES)
MODELS = {
    "wan": Model(
        WanConfig,
        wan.layouts,
        wan.shapes,
        wan.described,
        wan.WIDE,
        {"parametrization": "rectified_flow", "time_scale": 1000.0},
    ),
    "cosmos": Model(
        CosmosConfig,
        cosmos.layouts,
        cosmos.shapes,
        cosmos.described,
        cosmos.WIDE,
        {"parametrization": "rectified_flow", "time_scale": 1.0},
        cosmos.IGNORED,
    ),
    "t5": TEXT_ENCODER,
    "umt5": TEXT_ENCODER,
    "wan_vae": Model(WanVAEConfig, wan_vae.layouts, wan_vae.shapes, wan_vae.described, wan_vae.WIDE, generator=None),
}
GENERATORS = [name for name, model in MODELS.items() if model.generator]
PUBLISHED = {
    name: (kind, config)
    for kind, published in (("wan", PUBLISHED_WAN), ("cosmos", PUBLISHED_COSMOS))
    for name, config in published.items()
}
# Text encoders and the autoencoder are read from their published files whenever they are needed.
PUBLISHED_AROUND = {name: (config.model_type, config) for name, config in PUBLISHED_T5.items()}
PUBLISHED_AROUND |= {name: ("wan_vae", config) for name, config in PUBLISHED_WAN_VAE.items()}
DTYPES = ("float32", "bfloat16", "float16")  # that weights are published in


def named(name: str) -> tuple[str, Any]:
    """(key of GENERATORS, config) of a name in PUBLISHED, or of a JSON file that holds {"kind": …, sizes …}."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name in PUBLISHED_AROUND:
        raise ValueError(f"{name} is read as it is published: there is nothing to convert")
    if not name.endswith(".json"):
        raise ValueError(f"model {name!r} is none of {', '.join(PUBLISHED)}, and no .json file")
    try:
        values = json.loads(pathlib.Path(name).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind not in GENERATORS:
        raise ValueError(f"{name}: its kind is {kind!r}; it must be one of {', '.join(GENERATORS)}")
    return kind, build(MODELS[kind].config, values, name)


def under_prefix(tensors: Mapping, prefix: str) -> dict:
    """The tensors whose names begin with the prefix, without it; ValueError if there is none."""
    prefix = prefix if prefix.endswith(".") else f"{prefix}."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"of {len(tensors)} tensors none begins with {prefix!r}; the first is {next(iter(tensors))}")
    return found


def entries(name: str, config) -> dict[str, dict[str, table.Entry]]:
    """{layout: {tensor name: entry}} of a model of that config; nothing is allocated."""
    shapes = MODELS[name].shapes(config)
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
    arrays = table.read_arrays(tensors, layouts[layout], MODELS[name].shapes(config), dtype, progress)
    return unflatten_dict(arrays, sep="/")


def to_reference(name: str, params, config, layout: str) -> dict[str, np.ndarray]:
    """{reference name: array} of our parameters in a layout; the arrays are views wherever that is possible.

    Raises ValueError for an unknown layout and for parameters that are not those of the config.
    """
    check_layout(name, config, layout)
    layouts, shapes = entries(name, config), MODELS[name].shapes(config)
    arrays = flatten_dict(params, sep="/")
    wrong = [
        f"{path} is {arrays[path].shape if path in arrays else 'missing'}, must be {shapes.get(path, 'absent')}"
        for path in sorted({*arrays, *shapes})
        if path not in arrays or path not in shapes or tuple(arrays[path].shape) != tuple(shapes[path])
    ]
    if wrong:
        raise ValueError(f"the parameters are not {name} of this config: " + "; ".join(wrong))
    return table.write_arrays(arrays, layouts[layout])

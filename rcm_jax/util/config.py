"""Frozen dataclasses and plain mappings: strictly there, every key used exactly once, and back.

A field that may be one of several dataclasses says so by metadata={"kinds": table}: {name: dataclass, or a record with
it as .config}. In a mapping its group has the key "kind", which may be left out where the table has one entry. With
metadata={"optional": True} it may be None, whatever its type hint says.
"""

import dataclasses
import json
import types
from collections.abc import Callable, Mapping

from rcm_jax.util.ranges import fitted, hints, options


def build(cls, values, where: str = "config"):
    """An instance of the dataclass cls from a mapping, its dataclass fields recursively.

    An empty group is None where that is allowed. Raises ValueError that names the key (where.key) and what is allowed.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a group of keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(fields) or 'none'}")
    missing = [name for name, field in fields.items() if _required(field) and name not in values]
    if missing:
        raise ValueError(f"{where}: missing key {', '.join(sorted(missing))}")
    built = {key: _convert(fields[key], hints(cls)[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _required(field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(field, hint, value, where):
    kinds = options(hint)
    classes = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    is_group = bool(classes or "kinds" in field.metadata)
    optional = types.NoneType in kinds or field.metadata.get("optional", False)
    if optional and (value is None or (is_group and value == {})):
        return None
    if "kinds" in field.metadata:
        return _build_kind(field.metadata["kinds"], value, where)
    if classes:
        return build(classes[0], value, where)
    return fitted(hint, value, where)


def _build_kind(kinds: Mapping, value, where):
    rest = dict(value) if isinstance(value, Mapping) else {}
    kind = rest.pop("kind", next(iter(kinds)) if len(kinds) == 1 else None)
    if kind not in kinds:
        raise ValueError(f"{where}.kind is {kind!r}; it must be one of {', '.join(kinds)}")
    return build(config_of(kinds[kind]), rest, where)


def config_of(entry) -> type:
    """The dataclass of an entry of a table of kinds."""
    return entry if isinstance(entry, type) else entry.config


def kind_of(kinds: Mapping, config) -> str:
    """The name in a table of kinds of an instance; ValueError if it has none."""
    for name, entry in kinds.items():
        if config_of(entry) is type(config):
            return name
    raise ValueError(f"{type(config).__name__} is none of {', '.join(kinds)}: it has no line in that table")


def to_mapping(config, absent: Callable = lambda field, hint: None) -> dict:
    """The nested mapping that `build` makes it of; absent(field, its type hint) stands for a value that is None."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            value = absent(field, hints(type(config))[field.name])
        elif dataclasses.is_dataclass(value):
            kinds = field.metadata.get("kinds", {})
            kind = {"kind": kind_of(kinds, value)} if kinds else {}
            value = kind | to_mapping(value, absent)
        values[field.name] = value
    return values


def revise(config, changes: Mapping):
    """A copy of nested dataclasses with {"group.key": value} in the place of what it had, checked anew.

    ValueError for a key that is not there.
    """
    groups, own = {}, {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if not hasattr(config, name):
            raise ValueError(f"{type(config).__name__} has no key {name} (of {path})")
        if rest:
            groups.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    for name, inner in groups.items():
        own[name] = revise(own.get(name, getattr(config, name)), inner)
    return dataclasses.replace(config, **own)


def flatten(values, where: str = "config") -> dict:
    """{"config.a.b": leaf} of a nested mapping, with leaves as JSON has them (tuples are lists)."""
    if isinstance(values, Mapping):
        return {path: leaf for key, value in values.items() for path, leaf in flatten(value, f"{where}.{key}").items()}
    return {where: json.loads(json.dumps(values))}

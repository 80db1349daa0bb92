"""From a plain mapping to frozen dataclasses, strictly: every key used exactly once, or an error that names it."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping


def build(cls, values, where: str = "config", kinds: Mapping[str, type] = types.MappingProxyType({})):
    """An instance of the dataclass cls from a mapping, its dataclass fields recursively.

    For a field whose dataclasses are in kinds, the key "kind" picks one of them by name.
    Raises ValueError that names the key (where.key) and what is allowed.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a group of keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(fields)}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise ValueError(f"{where}: missing key {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    built = {key: _convert(hints[key], value, f"{where}.{key}", kinds) for key, value in values.items()}
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _convert(hint, value, where, kinds):
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    names = [name for name, cls in kinds.items() if cls in classes]
    if names:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if kind not in names:
            raise ValueError(f"{where}.kind is {kind!r}; it must be one of {', '.join(names)}")
        rest = {key: v for key, v in value.items() if key != "kind"}
        return build(kinds[kind], rest, where, kinds)
    if classes:
        return build(classes[0], value, where, kinds)
    return _convert_plain(options, value, where)


def _convert_plain(options, value, where):
    """int, float, bool, str, and tuples of them; an int is a float where a float is asked for."""
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, tuple | list):
            items = typing.get_args(option)
            items = (items[0],) * len(value) if items[-1] is Ellipsis else items
            if len(items) == len(value):
                pairs = enumerate(zip(items, value, strict=True))
                return tuple(_convert(item, v, f"{where}[{i}]", {}) for i, (item, v) in pairs)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{where} must be {wanted}, got {value!r}")


def flatten(values, where: str = "config") -> dict:
    """{"config.a.b": leaf} of a nested mapping, with leaves as JSON has them (tuples are lists)."""
    if isinstance(values, Mapping):
        return {path: leaf for key, value in values.items() for path, leaf in flatten(value, f"{where}.{key}").items()}
    return {where: json.loads(json.dumps(values))}

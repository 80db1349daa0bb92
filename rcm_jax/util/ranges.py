"""Configs: frozen dataclasses whose fields say what they may be, and which refuse all else when they are made.

The type hint of a field says it: `learning_rate: Positive = 1e-4`, `names: tuple[Count, ...]`, or for this field alone
`shift: Annotated[float, between(0.001, 1000)]`. A float of which nothing is said must be finite.

A rule is a function (value) -> what it must be, in words, or "" if it is.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any

Rule = Callable[[Any], str]
Class = typing.TypeVar("Class")
INT32 = 2**31 - 1  # what counters hold
PLAIN = (int, float, bool, str, types.NoneType)
WRONG = object()
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers of float32


def between(low: float, high: float) -> Rule:
    """Both ends among them."""
    return lambda value: "" if low <= value <= high else f"from {_number(low)} to {_number(high)}"


def at_least(low: int) -> Rule:
    """An int that counters hold."""
    return lambda value: "" if low <= value <= INT32 else f"at least {low}, and at most {INT32:,}"


def below(low: float, high: float) -> Rule:
    """From low, and that too, to below high."""
    return lambda value: "" if low <= value < high else f"at least {_number(low)} and below {_number(high)}"


def among(known: Iterable[str] | Callable[[], Iterable[str]], *more: str) -> Rule:
    """A name in a table, or more names; a table that stands further down in a file is given by a function."""

    def rule(value):
        names = [*more, *(known() if callable(known) else known)]
        return "" if value in names else f"one of {', '.join(name or repr(name) for name in names)}"

    return rule


def _number(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def only(built) -> Rule:
    """Of what the config of a reference can say: that for which networks are built here."""
    return lambda value: "" if value == built else f"{built!r}, for nothing else is supported"


def multiple(unit: int) -> Rule:
    """Of a number."""
    return lambda value: "" if value % unit == 0 else f"a multiple of {unit}"


def finite(value: float) -> str:
    """A number, and that in float32, too."""
    return "" if abs(value) <= LARGEST else "finite in float32"


def positive(value: float) -> str:
    """Also in float32."""
    return "" if SMALLEST <= value <= LARGEST else "above 0, and finite in float32"


def not_negative(value: float) -> str:
    """Also in float32."""
    return "" if 0 <= value <= LARGEST else "at least 0, and finite in float32"


def some(value: tuple) -> str:
    """Of tuples: not empty."""
    return "" if value else "one value or more"


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Seed = Annotated[int, between(0, INT32 - 1)]  # the next one is a seed, too
Depth = Annotated[int, between(1, 10_000)]  # layers, heads
Few = Annotated[int, between(1, 100)]  # of what is compiled one by one
Width = Annotated[int, between(1, 1_000_000)]  # channels, rows, classes
WidthOr0 = Annotated[int, between(0, 1_000_000)]
Frequencies = Annotated[int, between(2, 1_000_000), multiple(2)]  # as many cosines as sines
Finite = Annotated[float, finite]
Positive = Annotated[float, positive]
NotNegative = Annotated[float, not_negative]
Share = Annotated[float, below(0, 1)]
Probability = Annotated[float, between(0, 1)]
Epsilon = Annotated[float, between(1e-30, 1)]  # of norms
Shift = Annotated[float, between(1e-3, 1e3)]  # of rectified-flow time
Guidance = Annotated[float, between(0, 1_000)]
Time = Annotated[float, between(0, math.pi / 2)]
Steps = Annotated[int, between(1, 10_000)]  # of a sampler


@typing.overload
def config(cls: type[Class], /) -> type[Class]: ...
@typing.overload
def config(*, kw_only: bool) -> Callable[[type[Class]], type[Class]]: ...
@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls=None, /, *, kw_only=False):
    """A frozen dataclass whose fields are `fitted` to their type hints before its own __post_init__."""
    if cls is None:
        return functools.partial(config, kw_only=kw_only)
    own = getattr(cls, "__post_init__", lambda self: None)

    def __post_init__(self):
        for name, hint in hints(type(self)).items():
            object.__setattr__(self, name, fitted(hint, getattr(self, name), name))
        own(self)

    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)


@functools.cache
def hints(cls) -> dict[str, Any]:
    """{field: its type hint, with its rules} of a dataclass."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def options(hint) -> tuple:
    """The types that a value may have: of X | None, X and NoneType."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def parts(hint) -> tuple[Any, list[Rule]]:
    """A type and its rules."""
    kind, *rules = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    return kind, rules or ([finite] if kind is float else [])


def fitted(hint, value, name: str):
    """The value as its type hint says: int, float, bool, str and tuples of them; of other hints as it is.

    A list becomes a tuple, and an int a float, where that is asked for. ValueError that begins with the name if the
    value is of another type, or a rule does not hold.
    """
    for kind, rules in map(parts, options(hint)):
        found = _typed(kind, value, name)
        if found is WRONG:
            continue
        for problem in filter(None, (rule(found) for rule in rules)):
            raise ValueError(f"{name} is {found!r:.200}: it must be {problem}")
        return found
    raise ValueError(f"{name} must be {_words(hint)}, got {value!r:.200}")


def _typed(kind, value: Any, name: str) -> Any:
    """As `fitted`, of a type without rules; WRONG for a value of another type."""
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, tuple | list) or (items[-1] is not Ellipsis and len(items) != len(value)):
            return WRONG
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return tuple(fitted(item, value[i], f"{name}[{i}]") for i, item in enumerate(items))
    if kind is float and type(value) is int:
        return float(value) if abs(value) <= LARGEST else math.inf if value > 0 else -math.inf
    if kind not in PLAIN or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    return WRONG


def _words(hint) -> str:
    if hint is Ellipsis:
        return "..."
    kinds = [parts(option)[0] for option in options(hint)]
    inner = [", ".join(map(_words, typing.get_args(kind))) for kind in kinds]
    return " or ".join(f"{kind.__name__}[{of}]" if of else kind.__name__ for kind, of in zip(kinds, inner, strict=True))

"""Every field of every config says what it may be, and nonsense is refused by its key, before anything is built."""

import dataclasses
import functools
import importlib
import math
import pathlib
import pkgutil
import re

import pytest

import configs
from rcm_jax import convert
from rcm_jax.data import SyntheticConfig
from rcm_jax.run.experiment import Experiment, Predictor, Pretraining, from_mapping
from rcm_jax.util import ranges
from rcm_jax.util.config import build, config_of, to_mapping

LIBRARY = pathlib.Path(ranges.__file__).parents[1]
NONSENSE = {
    float: (math.nan, math.inf, -math.inf, -1, 1e18, 1e39, -(10**400), True, "1", "", [], {}),
    int: (-1, 10**18, 1e18, 0.5, math.nan, math.inf, True, "1", "", [], {}),
    str: ("nonsense", 0, math.nan, True, [], {}),
    bool: (1, 0.0, math.nan, "True", "", [], {}),
}
# What is meant to be possible, by fields.
FREE = {"teacher", "start", "fake_start", "vae_path", "path", "wandb_project", "wandb_name"}  # any text
FREE |= {"name", "train", "test", "image", "label"}  # of TFDS
FREE |= {"targets"}  # of adapters: the network knows its modules
FREE |= {"pos_emb_interpolation"}  # of Cosmos, which changes nothing here
INFINITE = {"sigma_max", "teacher_sigma_max"}  # they stand for the time pi/2
NEGATIVE = {"mean", "means", "latents_mean", "data", "fsdp", "seq"}
LARGE = {ranges.finite, ranges.positive, ranges.not_negative}  # rules of what may be 1e18: it diverges, no more


def groups(config, path=("config",)):
    """(path, dataclass) of a config and of all that are in it."""
    yield path, config
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from groups(value, (*path, field.name))


def classes(cls, found: set) -> set:
    """All that a config of a class may have in it, by its tables of kinds."""
    if cls not in found:
        found.add(cls)
        for field in dataclasses.fields(cls):
            kinds = [config_of(entry) for entry in field.metadata.get("kinds", {}).values()]
            for kind in (*kinds, *ranges.options(ranges.hints(cls)[field.name])):
                if dataclasses.is_dataclass(kind):
                    classes(kind, found)
    return found


MODULES = [importlib.import_module(f"configs.{module.name}") for module in pkgutil.iter_modules(configs.__path__)]
RUNS = [module.EXPERIMENT for module in MODULES if hasattr(module, "EXPERIMENT")]
PLACES = {type(config): (run, path) for run in RUNS for path, config in groups(run)}  # of each class, one
CLASSES = classes(Experiment, {model.record.config for model in convert.MODELS.values()}) | {Predictor, Pretraining}
TEACHERS = next(run.pretraining for run in RUNS if run.pretrain)
EXAMPLES = {Predictor: Predictor(TEACHERS.model), Pretraining: TEACHERS, SyntheticConfig: SyntheticConfig((2, 2))}
EXAMPLES |= {type(config): config for model in convert.MODELS.values() for config in model.record.published.values()}
EXAMPLES |= {type(config): config for run in RUNS for _, config in groups(run)}
every_class = pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda cls: cls.__name__))


def plain(hint):
    """(type, rules) of all numbers and texts in a type hint."""
    for kind, rules in map(ranges.parts, ranges.options(hint)):
        if kind in NONSENSE:
            yield kind, rules
        for item in getattr(kind, "__args__", ()):
            yield from plain(item)


def swapped(value, nonsense):
    """A value with nonsense in the place of its first number or text."""
    if not isinstance(value, tuple | list):
        return nonsense
    return [swapped(value[0], nonsense), *value[1:]] if value else [nonsense]


def is_meant(name, rules, value) -> bool:
    """Whether a field may be what is nonsense in others."""
    if value == 1e18 and rules:
        return rules[0] in LARGE
    known = {math.inf: INFINITE, -1: NEGATIVE, "nonsense": FREE}
    return isinstance(value, int | float | str) and name in known.get(value, ())


def test_every_config_of_the_library_is_walked():
    sources = [path.read_text() for path in LIBRARY.rglob("*.py")]
    there = {name for text in sources for name in re.findall(r"^class (\w+Config)\b", text, re.MULTILINE)}
    assert len(there) > 25 and there <= {cls.__name__ for cls in CLASSES}


@every_class
def test_every_number_has_a_range(cls):
    for name, hint in ranges.hints(cls).items():
        for option in ranges.options(hint):
            assert option not in (int, float), f"{cls.__name__}.{name} has no range"
        for kind, rules in plain(hint):
            assert rules or kind in (str, bool), f"{cls.__name__}.{name} has no range"


@every_class
def test_nonsense_is_refused_by_its_key(cls):
    example = EXAMPLES.get(cls) or cls()
    values = to_mapping(example)
    for name, hint in ranges.hints(cls).items():
        for kind, rules in plain(hint):
            for nonsense in NONSENSE[kind]:
                if is_meant(name, rules, nonsense):
                    continue
                with pytest.raises(ValueError, match=rf"^config\.{name}(\[\d+\])* (is|must be) "):
                    build(cls, values | {name: swapped(getattr(example, name), nonsense)})
                    pytest.fail(f"{cls.__name__}.{name} takes {nonsense!r}")


def test_a_key_is_named_in_full():
    for run, path in PLACES.values():
        for field in dataclasses.fields(functools.reduce(getattr, path[1:], run)):
            values = to_mapping(run)
            functools.reduce(dict.__getitem__, path[1:], values)[field.name] = {"non": "sense"}
            with pytest.raises(ValueError, match=re.escape(".".join((*path, field.name)))):
                from_mapping(values)

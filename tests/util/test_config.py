"""From a mapping to frozen dataclasses: every key used exactly once, or an error that names it."""

import copy
import dataclasses
import json

import pytest

from configs import digits
from rcm_jax.run import experiment
from rcm_jax.util.config import build, flatten, revise, to_mapping


@dataclasses.dataclass(frozen=True)
class Circle:
    radius: float


@dataclasses.dataclass(frozen=True)
class Square:
    side: float

    def __post_init__(self):
        if self.side <= 0:
            raise ValueError(f"side {self.side} must be positive")


KINDS = {"circle": Circle, "square": Square}


@dataclasses.dataclass(frozen=True)
class Scene:
    shape: Circle | Square = dataclasses.field(metadata={"kinds": KINDS})
    count: int
    visible: bool = True
    names: tuple[str, ...] = ()
    size: tuple[int, int] = (1, 2)
    limit: int | None = None
    times: tuple[tuple[float, ...], ...] = ()


GOOD = {"shape": {"kind": "square", "side": 2.0}, "count": 3}


def scene(**changes):
    return build(Scene, GOOD | changes)


@pytest.mark.smoke
def test_a_mapping_becomes_a_dataclass_with_defaults_and_kinds():
    assert scene() == Scene(Square(2.0), 3)
    assert scene(shape={"kind": "circle", "radius": 1}).shape == Circle(1.0)
    assert isinstance(scene(shape={"kind": "circle", "radius": 1}).shape.radius, float)
    assert scene(times=[[], [1], [2.5, 1.5]]).times == ((), (1.0,), (2.5, 1.5))
    assert scene(limit=None).limit is None
    assert scene(limit=4).limit == 4


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, r"config: unknown key colour; known: shape, count"),
        ({"count": 1.5}, r"config.count must be int, got 1.5"),
        ({"count": True}, r"config.count must be int, got True"),
        ({"count": "3"}, r"config.count must be int, got '3'"),
        ({"visible": 1}, r"config.visible must be bool, got 1"),
        ({"names": "abc"}, r"config.names must be tuple.*, got 'abc'"),
        ({"names": ["a", 2]}, r"config.names\[1\] must be str, got 2"),
        ({"size": (1, 2, 3)}, r"config.size must be tuple.*, got \(1, 2, 3\)"),
        ({"limit": "x"}, r"config.limit must be int or NoneType, got 'x'"),
        ({"times": [[1.0], ["a"]]}, r"config.times\[1\]\[0\] must be float, got 'a'"),
        ({"shape": {"kind": "cube", "side": 1.0}}, r"config.shape.kind is 'cube'; it must be one of circle, square"),
        ({"shape": {"side": 1.0}}, r"config.shape.kind is None; it must be one of circle, square"),
        ({"shape": 5}, r"config.shape.kind is None"),
        ({"shape": {"kind": "square"}}, r"config.shape: missing key side"),
        ({"shape": {"kind": "square", "side": 1.0, "edge": 2}}, r"config.shape: unknown key edge; known: side"),
        ({"shape": {"kind": "square", "side": "a"}}, r"config.shape.side must be float, got 'a'"),
        ({"shape": {"kind": "square", "side": -1.0}}, r"config.shape: side -1.0 must be positive"),
    ],
)
def test_an_error_names_the_key_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        scene(**changes)


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="config: missing key count, shape"):
        build(Scene, {})


def test_a_group_that_is_none_is_named():
    with pytest.raises(ValueError, match="must be a group of keys, got 3"):
        build(Circle, 3)


def test_flatten_gives_a_path_to_every_leaf_as_json_has_it():
    values = {"a": {"b": (1, (2.0, "x")), "c": None}, "d": True}
    assert flatten(values) == {"config.a.b": [1, [2.0, "x"]], "config.a.c": None, "config.d": True}
    assert flatten(json.loads(json.dumps(values))) == flatten(values)


def test_a_mapping_of_a_dataclass_makes_it_again():
    one = scene(limit=4)
    assert build(Scene, to_mapping(one)) == one
    assert to_mapping(one)["shape"] == {"kind": "square", "side": 2.0}
    assert to_mapping(scene(), absent=lambda field, hint: field.name)["limit"] == "limit"


def test_the_kind_of_a_table_of_one_may_be_left_out_and_an_empty_group_is_none():
    @dataclasses.dataclass(frozen=True)
    class Page:
        shape: Circle | None = dataclasses.field(default=None, metadata={"kinds": {"circle": Circle}})

    assert build(Page, {"shape": {"radius": 2}}) == Page(Circle(2.0))
    assert build(Page, {"shape": {}}) == build(Page, {}) == Page()


def test_keys_are_revised_together_and_a_key_that_is_not_there_is_named():
    one = scene()
    assert revise(one, {"shape.side": 3.0, "count": 5}) == Scene(Square(3.0), 5)
    assert revise(one, {"shape": Circle(1.0), "shape.radius": 4.0}).shape == Circle(4.0)
    with pytest.raises(ValueError, match=r"Square has no key edge \(of edge\)"):
        revise(one, {"shape.edge": 3.0})
    with pytest.raises(ValueError, match=r"side -1\.0 must be positive"):
        revise(one, {"shape.side": -1.0})


# --- the experiment


def values():
    return to_mapping(digits.EXPERIMENT)


def set_key(mapping, path, value):
    *groups, name = path.split(".")
    for group in groups:
        mapping = mapping[group]
    mapping[name] = value


def test_the_digits_config_is_an_experiment_and_survives_json():
    run = experiment.from_mapping(values())
    assert isinstance(run, experiment.Experiment)
    assert experiment.from_mapping(json.loads(json.dumps(values()))) == run


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("rcm.consistency.warmup_form", "mine", "config.rcm.consistency.warmup_form is 'mine': it must be one of"),
        ("rcm.dmd.update_freq", 1, r"config.rcm.dmd.update_freq is 1: it must be from 2"),
        ("rcm.consistency.time.kind", "normal", r"config.rcm.consistency.time.kind is 'normal'"),
        ("rcm.student.learning_rate", "big", r"config.rcm.student.learning_rate must be float"),
        ("parametrization", "v", r"config.parametrization is 'v': it must be one of '', trigflow, rectified_flow, edm"),
        ("data", "cats", r"config.data must be a group|config.data.kind is None; it must be one of digits, latents"),
        ("train.batch_size", 0, r"config.train.batch_size is 0: it must be from 1"),
        ("sampling.mid_times", [[], [1.1, 1.0]], r"config.sampling: mid_times\[1\] is for 2 steps"),
    ],
)
def test_a_bad_value_of_an_experiment_names_its_place(path, value, message):
    bad = copy.deepcopy(values())
    set_key(bad, path, value)
    with pytest.raises(ValueError, match=message):
        experiment.from_mapping(bad)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("rcm.student.decay_steps", 50, "decay_steps 50"),
        ("pretrain.method.optimizer.decay_steps", 50, "decay_steps 50"),
        ("rcm.ema_std", 0.5, r"config.rcm.ema_std is 0.5: .*below 0.28"),
        ("pretrain.method.ema_std", 0.0, r"config.pretrain.method.ema_std is 0.0"),
        ("sampling.mid_times", [[], [1.1], [1.0, 1.2]], "times must fall"),
        ("model.dtype", "float33", "float33"),
        ("model.patch", 0, "patch"),
        ("model.num_heads", 0, "num_heads"),
    ],
)
def test_a_value_that_can_only_fail_later_is_refused_before_training(path, value, message):
    """Not after hours of pretraining, and not with a traceback."""
    bad = copy.deepcopy(values())
    set_key(bad, path, value)
    with pytest.raises(ValueError, match=message):
        experiment.from_mapping(bad)

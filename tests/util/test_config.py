"""From a mapping to frozen dataclasses: every key used exactly once, or an error that names it."""

import copy
import dataclasses
import json

import pytest

from configs import digits
from rcm_jax.run import experiment
from rcm_jax.util.config import build, flatten


@dataclasses.dataclass(frozen=True)
class Circle:
    radius: float


@dataclasses.dataclass(frozen=True)
class Square:
    side: float

    def __post_init__(self):
        if self.side <= 0:
            raise ValueError(f"side {self.side} must be positive")


@dataclasses.dataclass(frozen=True)
class Scene:
    shape: Circle | Square
    count: int
    visible: bool = True
    names: tuple[str, ...] = ()
    size: tuple[int, int] = (1, 2)
    limit: int | None = None
    times: tuple[tuple[float, ...], ...] = ()


KINDS = {"circle": Circle, "square": Square}
GOOD = {"shape": {"kind": "square", "side": 2.0}, "count": 3}


def scene(**changes):
    return build(Scene, GOOD | changes, kinds=KINDS)


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
        build(Scene, {}, kinds=KINDS)


def test_a_group_that_is_none_is_named():
    with pytest.raises(ValueError, match="must be a group of keys, got 3"):
        build(Circle, 3)


def test_flatten_gives_a_path_to_every_leaf_as_json_has_it():
    values = {"a": {"b": (1, (2.0, "x")), "c": None}, "d": True}
    assert flatten(values) == {"config.a.b": [1, [2.0, "x"]], "config.a.c": None, "config.d": True}
    assert flatten(json.loads(json.dumps(values))) == flatten(values)


# --- the experiment


def values():
    return digits.get_config().to_dict()


def set_key(mapping, path, value):
    *groups, name = path.split(".")
    for group in groups:
        mapping = mapping[group]
    mapping[name] = value


def test_the_digits_config_is_an_experiment_and_survives_json():
    run = experiment.from_mapping(values())
    assert isinstance(run, experiment.Experiment)
    assert experiment.from_mapping(json.loads(json.dumps(values()))) == run


def test_the_part_that_makes_the_teacher_is_a_pretraining_without_the_rest():
    theirs = experiment.teacher_values(values())
    assert not {"rcm", "train", "teacher"} & set(theirs)
    assert type(experiment.from_mapping(theirs)) is experiment.Pretraining


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("rcm.consistency.warmup_form", "mine", r"config.rcm.consistency: warmup_form 'mine' is none of paper, code"),
        ("rcm.dmd.update_freq", 1, r"config.rcm.dmd: update_freq 1"),
        ("rcm.consistency.time.kind", "normal", r"config.rcm.consistency.time.kind is 'normal'"),
        ("rcm.student.learning_rate", "big", r"config.rcm.student.learning_rate must be float"),
        ("parametrization", "v", r"config: parametrization 'v' is none of trigflow, rectified_flow, edm"),
        ("data", "cats", r"config.data must be a group|config.data.kind is None; it must be one of digits, latents"),
        ("train.batch_size", 0, r"config.train: batch_size must be at least 1"),
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
        ("rcm.ema_std", 0.5, "EMA width 0.5"),
        ("pretrain.method.ema_std", 0.0, "EMA width 0.0"),
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

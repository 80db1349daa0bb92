"""What would make a plan fit: the order of the changes by a compiler that is made up, then one search that compiles."""

import importlib

import pytest

from rcm_jax.plan import remedy, report, topologies
from rcm_jax.plan.program import prepare
from rcm_jax.plan.report import Estimate, Need, Planned
from rcm_jax.run.experiment import from_mapping
from rcm_jax.util.config import revise
from tests import tiny

fast_compilation = pytest.fixture(scope="module")(tiny.fast_compilation)
SAMPLE = 1e6  # bytes of one sample; ten times as many of one that keeps everything


def run_of(name, variant, **changes):
    run = from_mapping(importlib.import_module(f"configs.{name}").get_config(variant).to_dict())
    return revise(run, {key.replace("__", "."): value for key, value in changes.items()})


def planned_of(programs, name):
    """As a compiler might plan it that knows nothing but samples at a time."""
    run, size = programs.run, SAMPLE if getattr(programs.run.model, "remat", "") == "full" else 10 * SAMPLE
    parts = run.train.accumulate if name in remedy.TRAINING else 10  # the sampler keeps nothing for a backward pass
    temporaries = size * run.train.batch_size / programs.mesh.size / parts
    return Planned(Need(programs.held, 0, temporaries, 0, 0.0, None, Estimate(1.0, 1.0, 1.0)), 1.0, "")


@pytest.fixture
def compiled(monkeypatch):
    """The (changes that matter, program) in the order in which they are compiled."""
    order = []

    def plan(programs, chip, names=None):
        for name in names or programs.lower:
            run, mesh = programs.run, tuple(programs.mesh.shape.values())
            order.append((mesh, run.train.accumulate, getattr(run.model, "remat", ""), run.train.offload, name))
            yield name, planned_of(programs, name)

    monkeypatch.setattr(report, "plan", plan)
    return order


def search(run, topology, hbm):
    """(programs, attempts, what is printed at the end), of a chip with that much memory."""
    chip, devices = topologies.devices(topology)
    chip = chip._replace(hbm=hbm)
    programs = prepare(run, chip, devices)
    planned = dict(report.plan(programs, chip)) if programs.held <= hbm else {}
    attempts = list(remedy.search(run, programs, planned, chip, devices))
    return programs, attempts, remedy.verdict(run, programs, attempts, chip)


class TestOrder:
    def test_the_batch_is_cut_and_what_cannot_fit_is_not_compiled(self, compiled):
        run = run_of("wan_1_3b", "tiny,scm", train__batch_size=64, model__remat="full")
        held = prepare(run, *topologies.devices("cpu:2")).held
        _, attempts, words = search(run, "cpu:2", held + 9 * SAMPLE)
        assert [attempt.changes for attempt in attempts] == [{"train.accumulate": parts} for parts in (2, 4)]
        assert [attempt.fits for attempt in attempts] == [False, True]
        assert "not compiled: at least " in attempts[0].words  # half of 32 samples, by the first plan
        assert [(parts, name) for _, parts, *_, name in compiled] == [
            (1, "student"),
            (1, "sampler"),
            (4, "student"),  # what did not fit comes first
            (4, "sampler"),
        ]
        line = remedy.line(run, attempts[-1])
        assert line.startswith("  --config.train.accumulate=4: student ") and ": fits " in line
        assert words.startswith("\nwith --config.train.accumulate=4 it needs ") and "\nfits. Estimate" in words

    def test_changes_alone_then_together_then_a_sample_over_more_chips(self, compiled):
        """A sample that keeps everything on each of two chips, with room for less than one that keeps little."""
        run = run_of("wan_1_3b", "tiny,scm", train__batch_size=2, model__remat="none", mesh__data=2, mesh__fsdp=1)
        held = prepare(run, *topologies.devices("cpu:2")).held
        _, attempts, words = search(run, "cpu:2", held + 0.75 * SAMPLE)
        split, again = {"mesh.data": 1, "mesh.fsdp": 2}, {"model.remat": "full"}
        shared = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.seq": 2, "train.accumulate": 2}
        changes = [attempt.changes for attempt in attempts]
        assert changes == [split, {"train.offload": True}, again, split | again, again | shared]
        assert [bool(attempt.steps) for attempt in attempts] == [True, False, True, True, True]
        assert attempts[-1].fits and not any(attempt.fits for attempt in attempts[:-1])
        flags = "--config.mesh.data=1 --config.model.remat=full --config.mesh.seq=2 --config.train.accumulate=2"
        assert words.startswith(f"\nwith {flags} it needs ")

    def test_more_chips(self, compiled):
        programs, attempts, words = search(run_of("wan_1_3b", "tiny,scm"), "cpu:2", 1000)
        assert not compiled and [attempt.changes for attempt in attempts] == [{"train.offload": True}]
        assert attempts[0].words.startswith("not compiled: state and teacher alone hold ")
        least = 2 * attempts[0].programs.held
        assert least < 2 * programs.held  # second moments are with the host
        assert f": {-(-least // 1000)} chips of 1000 B, and" in words


@pytest.mark.usefixtures("fast_compilation")
def test_what_is_named_was_compiled():
    changes = dict(train__batch_size=4096, model__num_layers=1, sampling__mid_times=((),))
    run = run_of("mixture", "scm", **changes)
    programs, attempts, words = search(run, "cpu:1", 3_000_000)
    assert [attempt.changes for attempt in attempts] == [{"train.accumulate": 2}, {"train.accumulate": 4}]
    assert attempts[-1].fits and attempts[-1].programs.run.train.accumulate == 4
    assert set(attempts[-1].steps) == set(programs.lower) == {"student", "sampler"}
    assert report.gib(max(planned.need.peak for planned in attempts[-1].steps.values())) in words

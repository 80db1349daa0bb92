"""When training stops by itself, and what it says."""

import numpy as np
import pytest

from rcm_jax.train.guard import SHOWN, Diverged, Guard


def follow(guard, step, bad=(), shares=None, gradients=None, data=(), **skipped):
    """A step of a batch of the examples 3, 5 and 8, of which some are bad for a loss, or by themselves."""
    flags = {
        name: np.array([float(i in some) for i in (3, 5, 8)]) for name, some in (("data", data), ("examples", bad))
    }
    watched = flags | {"gradients": gradients or {}}
    skips = {f"{network}/skipped": float(value) for network, value in skipped.items()}
    guard.add(step, skips | (shares or {}) | {"watched": watched}, np.array([3, 5, 8]))


def test_skipped_updates_of_one_network_are_counted_until_one_is_applied():
    guard = Guard(3)
    for step, (student, critic) in enumerate([(1, 0), (1, 0), (0, 1), (1, 0), (1, 0)], 1):
        follow(guard, step, student=student, critic=critic)
    guard.check()
    assert not guard.healthy
    follow(guard, 6, critic=0)  # an iteration without an update of the student
    follow(guard, 7, student=1)
    with pytest.raises(Diverged, match=r"3 updates of the student in a row were skipped up to step 7.*allows 2\. It b"):
        guard.check()


def test_it_looks_by_itself_at_steps_that_must_have_ended():
    guard = Guard(3)
    with pytest.raises(Diverged, match="up to step 3"):
        for step in range(1, 100):
            follow(guard, step, student=1)
    assert step == 6


def test_a_few_skipped_updates_are_no_end_unless_no_other_was():
    guard = Guard(10)
    follow(guard, 1, student=0)
    follow(guard, 2, student=1)
    guard.check(last=True)
    assert not guard.healthy
    guard = Guard(10)
    follow(guard, 1, student=1)
    guard.check()
    follow(guard, 2, critic=0)
    with pytest.raises(Diverged, match="1 updates of the student"):
        guard.check(last=True)


def test_the_diagnosis_names_losses_times_parameters_and_examples_of_the_first_skipped_update(caplog):
    guard = Guard(2, {"student": ["blocks", "head", "in", "out", "time"]})
    shares = {"scm/nonfinite": 2 / 3, "scm/nonfinite/t3": (2.0, 2), "scm/nonfinite/t0": (0.0, 1), "dmd/nonfinite": 0.0}
    fine = np.ones(5, bool)
    follow(guard, 1, student=0, gradients={"student": fine})
    follow(guard, 2, [5, 8], shares, {"student": np.array([True, False, True, False, True])}, student=1)
    follow(guard, 3, [3], {"dmd/nonfinite": 1.0}, {"student": ~fine}, student=1)
    with pytest.raises(Diverged) as raised:
        guard.check()
    for words in (
        "It began at step 2: scm left out 2 of 3 samples, at times in quarter 4 of 4; ",
        "gradients of 2 of 5 groups of parameters were not finite (head, out)",
        "Examples 3, 5, 8 of the data are not finite",
        'leave_out="(3, 5, 8,)"',
        "--from_step=N",
    ):
        assert words in str(raised.value)


def test_examples_are_forgotten_when_all_is_well_again():
    guard = Guard(2)
    for step, (bad, student) in enumerate([([8], 1), ([], 0), ([5], 1), ([5], 1)], 1):
        follow(guard, step, bad, student=student)
    with pytest.raises(
        Diverged, match=r"Example 5 of the data is not finite, .*; --config\.train\.leave_out=\"\(5,\)\""
    ):
        guard.check()


def test_examples_that_cost_themselves_alone_are_named_in_the_log(caplog):
    guard = Guard(3)
    with caplog.at_level("WARNING", logger="absl"):
        follow(guard, 1, [8], student=0)
        guard.check()
    assert "step 1: example 8 of the data is not finite" in caplog.text and guard.healthy


def test_where_no_example_is_to_blame_that_is_said():
    guard = Guard(1)
    follow(guard, 4, student=1)
    with pytest.raises(Diverged, match=r"every loss was finite; .*No example of the data is to blame by itself"):
        guard.check()


@pytest.mark.parametrize("data", [(), (3, 5, 8)])
def test_a_loss_that_is_not_finite_for_all_samples_blames_only_examples_that_are_not_finite_themselves(data):
    guard = Guard(1)
    follow(guard, 4, (3, 5, 8), data=data, student=1)
    words = "Examples 3, 5, 8 of the data are" if data else "No example of the data is to blame"
    with pytest.raises(Diverged, match=words):
        guard.check()


def test_many_examples_are_counted_not_listed():
    guard = Guard(1)
    watched = {"examples": np.ones(100), "data": np.ones(100), "gradients": {}}
    guard.add(2, {"student/skipped": 1.0, "watched": watched}, np.arange(100))
    with pytest.raises(Diverged, match=rf"{SHOWN - 1} and {100 - SHOWN} more of the data are not finite"):
        guard.check()

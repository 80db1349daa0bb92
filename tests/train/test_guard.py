"""When training stops by itself."""

import pytest

from rcm_jax.train.guard import Guard
from rcm_jax.train.metrics import Reading


def reading(examples=(), **skips):
    return Reading({}, skips, list(examples))


def test_skipped_updates_of_one_network_are_counted_over_windows_until_one_is_applied():
    guard = Guard(3)
    guard.follow(10, reading(student=[True], critic=[False] * 9))
    guard.follow(20, reading(student=[True], critic=[False] * 9))
    guard.follow(30, reading(student=[False]))
    guard.follow(40, reading(student=[True]))
    guard.follow(50, reading(student=[True]))
    with pytest.raises(ValueError, match=r"3 updates of the student in a row were skipped up to step 60.*allows 2"):
        guard.follow(60, reading(student=[True], critic=[False]))


def test_one_update_of_a_window_that_has_no_other_is_no_end():
    Guard(10).follow(10, reading(student=[True]))


@pytest.mark.parametrize("skips", [[True] * 3, [True] * 3 + [False]])
def test_a_window_of_any_length_is_seen_whole(skips):
    with pytest.raises(ValueError, match="3 updates of the critic in a row"):
        Guard(3).follow(100, reading(critic=skips))


def test_examples_are_named_until_all_is_well_again():
    guard = Guard(2)
    guard.follow(1, reading([8], student=[True]))
    guard.follow(2, reading(student=[False]))
    guard.follow(3, reading([5], student=[True]))
    with pytest.raises(
        ValueError,
        match=r"xample 5 of the data is not finite, .*; --config\.train\.leave_out=\"\(5,\)\"",
    ):
        guard.follow(4, reading([5], student=[True]))


def test_where_no_example_is_to_blame_that_is_said():
    with pytest.raises(ValueError, match="No example of the data is to blame by itself"):
        Guard(1).follow(4, reading(student=[True]))


def test_many_examples_are_counted_not_listed():
    with pytest.raises(ValueError, match=r"19 and 80 more of the data are not finite"):
        Guard(1).follow(4, reading(range(100), student=[True]))

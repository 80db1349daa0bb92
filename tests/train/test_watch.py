"""A training that stands still."""

import time

import pytest

from rcm_jax.train.watch import HUNG, watched


def wait_for(ended, seconds=10.0):
    until = time.monotonic() + seconds
    while not ended and time.monotonic() < until:
        time.sleep(0.02)


def test_what_was_waited_for_is_said_with_the_stacks_and_the_process_ends(capfd):
    ended = []
    with watched(0.2, ended.append) as watch:
        watch.at("iteration 7 (student)")
        wait_for(ended)
    assert ended == [HUNG]
    said = capfd.readouterr().err
    assert "error: process 0 of 1 stands still: iteration 7 (student) takes more than 0.2 s" in said


@pytest.mark.parametrize("limit", [0, 0.4])
def test_who_moves_or_is_not_watched_goes_on(limit):
    ended = []
    with watched(limit, ended.append) as watch:
        for i in range(12):
            time.sleep(0.05)
            watch.at(f"iteration {i}")
    time.sleep(0.3)
    assert not ended

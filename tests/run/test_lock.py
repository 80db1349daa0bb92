"""Two trainings in one workdir."""

import json
import socket
import subprocess
import sys
import time

import pytest

from rcm_jax.run import lock
from rcm_jax.util.files import write_text


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, seconds in {"BEAT": 0.05, "DEAD": 0.6, "SETTLED": 0.2}.items():
        monkeypatch.setattr(lock, name, seconds)


def left_by(folder, **changes):
    """A lock of another process."""
    write_text(folder / lock.NAME, json.dumps(lock._identity() | changes))


def test_a_second_run_is_refused_and_may_begin_when_the_first_has_ended(tmp_path):
    with lock.held(tmp_path):
        with (
            pytest.raises(ValueError, match=rf"trained in by process \d+ on {socket.gethostname()}: stop that"),
            lock.held(tmp_path),
        ):
            pass
        assert (tmp_path / lock.NAME).exists()
    assert not list(tmp_path.iterdir())
    with lock.held(tmp_path):
        pass


def test_a_process_that_is_gone_keeps_no_lock(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    born = lock._born(ended.pid)
    ended.wait()
    left_by(tmp_path, pid=ended.pid, born=born)
    with lock.held(tmp_path):
        pass


def test_a_number_that_another_process_has_now_keeps_none(tmp_path):
    left_by(tmp_path, born="12345")
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("place", ["another boot", ""])
def test_of_another_machine_the_count_must_move(tmp_path, place):
    left_by(tmp_path, place=place, host="elsewhere", pid=7)
    started = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - started > lock.DEAD


def test_another_machine_that_counts_is_alive(tmp_path, monkeypatch):
    with lock.held(tmp_path):
        identity = lock._identity()
        monkeypatch.setattr(lock, "_identity", lambda: identity | {"place": "another boot", "token": "mine"})
        with pytest.raises(ValueError, match="is being trained in by"), lock.held(tmp_path):
            pass


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "3", "null", '{"pid": "x", "place": 3}'])
def test_a_lock_that_cannot_be_read_is_that_of_a_dead_process(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with lock.held(tmp_path):
        pass


def test_who_is_taken_over_ends_and_leaves_the_new_lock(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(lock, "_leave", left.append)
    with lock.held(tmp_path):
        left_by(tmp_path, host="elsewhere", pid=7)
        until = time.monotonic() + 5
        while not left and time.monotonic() < until:
            time.sleep(0.02)
    assert left == [f"process 7 on elsewhere has taken over {tmp_path}"]
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "elsewhere"

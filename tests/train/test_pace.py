"""How fast a run goes: what counts as lost, products per second, forecasts, traces, lines on the console."""

import math
import time

import jax
import jax.numpy as jnp
import pytest

from rcm_jax.parallel.chips import peak_flops
from rcm_jax.train import console, pace
from rcm_jax.train.state import TrainState

N = 64


def state_at(step: int) -> TrainState:
    return TrainState(step=jnp.int32(step), student=None, ema=None)


@jax.jit
def product(state, x):
    return state.replace(step=state.step + 1), x @ x


def test_a_window_knows_what_was_computed_and_what_was_lost():
    clock, state = pace.Pace({"student": product}, 1.0, 0), state_at(0)
    for step in range(4):
        with clock.waiting(state):
            jax.block_until_ready(state)
            time.sleep(0.05)
        state, _ = clock.run("student", step, state, jnp.ones((N, N)))
    with clock.stopped("checkpoints", state):
        time.sleep(0.2)
    jax.block_until_ready(state)
    values = clock.read(4)
    assert values["pace/data_seconds"] == pytest.approx(0.2, abs=0.1)
    assert values["pace/checkpoints_seconds"] == pytest.approx(0.2, abs=0.1)
    assert values["pace/compilation_seconds"] > 0 and values["pace/previews_seconds"] == 0
    busy = 4 * values["pace/step_seconds"]
    assert values["pace/tflops_per_chip"] * 1e12 * busy == pytest.approx(4 * 2 * N**3)
    assert values["pace/steps_per_second"] * values["pace/step_seconds"] == pytest.approx(1)
    lost = sum(values[f"pace/{what}_seconds"] for what in pace.LOSSES)
    assert values["pace/goodput"] == pytest.approx(busy / (busy + lost), rel=0.05)
    assert "pace/share_of_peak" not in values  # of a CPU it is not known
    assert values["memory/host_peak_gib"] > 0.01


def test_the_next_window_begins_anew_and_a_program_is_compiled_once():
    clock, state = pace.Pace({"student": product}, 1.0, 0), state_at(0)
    state, _ = clock.run("student", 0, state, jnp.ones((N, N)))
    clock.read(1)
    state, _ = clock.run("student", 1, state, jnp.ones((N, N)))
    values = clock.read(2)
    assert values["pace/compilation_seconds"] == 0 and len(clock.compiled) == 1
    assert values["pace/tflops_per_chip"] > 0


def test_what_is_left_does_not_count_compilation_again():
    clock = pace.Pace({}, 1.0, 10)
    clock.began -= 100
    clock.lost["compilation"] = 80.0
    assert clock.left(20, 40) == pytest.approx(40, abs=0.5)
    assert clock.left(40, 40) == 0


def test_a_program_is_compiled_for_every_shape_of_a_batch_once():
    traced = []

    @jax.jit
    def step(state, batch):
        traced.append(batch["x0"].shape)
        return state, batch["x0"].sum()

    clock = pace.Pace({"student": step}, 1.0, 0)
    for n in (2, 3, 2, 3, 3):
        _, total = clock.run("student", 0, state_at(0), {"x0": jnp.ones((1, n))})
        assert total == n
    assert traced == [(1, 2), (1, 3)]


def test_data_that_come_while_the_devices_work_cost_nothing():
    class Busy:
        step = type("Pending", (), {"is_ready": lambda self: False})()

    clock = pace.Pace({}, 1.0, 0)
    with clock.waiting(Busy()):
        time.sleep(0.01)
    assert clock.lost["data"] == 0


def test_a_program_that_cannot_be_read_has_no_rate(caplog):
    class Strange:
        def as_text(self):
            return "HloModule empty"

    assert math.isnan(pace.products(Strange(), 1.0))
    assert "not counted" in caplog.text
    clock = pace.Pace({"student": product}, 1.0, 0)
    clock.flops["student", ()], clock.compiled["student", ()] = math.nan, lambda *args: args
    clock.run("student", 0, 1, 2)
    assert "pace/tflops_per_chip" not in clock.read(1)


def test_the_rest_is_foretold_once_a_phase_has_run_for_a_while():
    clock, state = pace.Pace({"warmup": product, "student": product}, 1.0, 0), state_at(0)
    told = []
    for step in range(120):
        state, _ = clock.run("warmup" if step < 60 else "student", step, state, jnp.ones((4, 4)))
        told += [(step + 1, words)] if (words := clock.forecast(step + 1, 200, state)) else []
    assert [step for step, _ in told] == [50, 110]
    assert told[0][1].startswith("150 more steps take about ") and told[1][1].startswith("90 more")
    assert clock.forecast(110, 110, state) == ""


@pytest.mark.parametrize(
    "seconds, words", [(3.4, "3 s"), (150, "2 min"), (5_970, "100 min"), (9_000, "2 h 30 min"), (200_000, "2 days 7 h")]
)
def test_times_in_words(seconds, words):
    assert pace.span(seconds) == words.replace("100 min", "1 h 40 min")


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("Radeon", None),
    ],
)
def test_the_peak_of_a_chip_by_its_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_a_trace_is_written_between_two_steps(tmp_path):
    state = state_at(0)
    with pace.traced(tmp_path, (1, 2)) as at:
        for step in range(3):
            at(step, state)
            assert (tmp_path / "profile").exists() == (step == 2)
            state, _ = product(state, jnp.ones((4, 4)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_ends_within_a_trace_writes_it(tmp_path):
    with pytest.raises(RuntimeError), pace.traced(tmp_path, (0, 5)) as at:
        at(0, state_at(0))
        raise RuntimeError("the machine is gone")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", [(5, 5), (6, 5), (0, 4), (30, 41)])
def test_steps_that_cannot_be_traced_are_refused_with_those_that_can(steps):
    with pytest.raises(ValueError, match=r"--profile=.* 1 <= START < END <= 40"):
        pace.check_trace(steps, 1, 40)
    pace.check_trace((1, 40), 1, 40)


def test_a_line_has_losses_what_went_wrong_and_the_pace(capsys):
    values = {"scm/loss": 0.51234, "student/grad_norm": 3.0, "scm/nonfinite": 0.25, "dmd/nonfinite": 0.0}
    speed = {
        "pace/step_seconds": 2.0,
        "pace/tflops_per_chip": 412.3,
        "pace/share_of_peak": 0.417,
        "memory/device_peak_gib": 71.23,
        "pace/goodput": 0.8,
    }
    with console.Console("rCM", 0, 10_000) as told:
        told.show(100, values, speed, 24_750.0)
        told.show(101, values, speed, 24_748.0)  # too soon after the last
        told.show(10_000, values, speed, 0.0, last=True)
    assert capsys.readouterr().err.splitlines() == [
        "rCM 100/10,000: scm 0.512, scm/nonfinite 0.25, 2 s a step, 412 TFLOP/s a chip (42%), 71.2 GiB, goodput 80%, "
        "6 h 52 min left",
        "rCM 10,000/10,000: scm 0.512, scm/nonfinite 0.25, 2 s a step, 412 TFLOP/s a chip (42%), 71.2 GiB, goodput 80%",
    ]

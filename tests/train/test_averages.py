"""Averages of the student: power EMA, half-life EMA, and power EMAs of other widths made from snapshots."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.train import averages
from rcm_jax.train.averages import Averaged
from rcm_jax.train.state import Learner, TrainState
from tests.tiny import x64


@pytest.fixture
def phema(golden):
    """(JSON, arrays) of EDM2's power EMA."""
    return json.loads((golden / "edm2_unet/phema.json").read_text()), np.load(golden / "edm2_unet/phema.npz")


def walked(config, path, batch_size=1):
    """The states after each update of a student along path [steps + 1, d], in float64."""

    @jax.jit
    def update(state, params):
        new = config.averages(state, params, batch_size, True)
        return state.replace(student=Learner(params, None, state.student.updates + 1), **new)

    with x64():
        first, states = jnp.asarray(path[0], jnp.float64), []
        state = TrainState(jnp.int32(0), Learner(first, None, jnp.int32(0)), first)
        state = state.replace(tracks=tuple(first for _ in config.ema_tracks) or None)
        for params in path[1:]:
            state = update(state, jnp.asarray(params, jnp.float64))
            states.append(jax.device_get(state))
    return states


# --- the averages themselves


@pytest.mark.golden
@pytest.mark.smoke
def test_exponents_and_widths_are_those_of_edm2(phema):
    pairs = phema[0]["std_to_exp"]
    assert pairs
    for std, gamma in pairs:
        assert averages.power_ema_exponent(std) == pytest.approx(gamma, rel=1e-9)
    for gamma, std in phema[0]["exp_to_std"]:
        if std < 0.28:
            assert averages.power_ema_exponent(std) == pytest.approx(gamma, rel=1e-9)


@pytest.mark.golden
def test_betas_are_those_of_edm2_counted_in_updates(phema):
    """t_next images after an update of t_delta: update n = t_next/t_delta − 1 from 0."""
    cases = phema[0]["power_function_beta"]
    assert cases
    for case in cases:
        n, gamma = case["t_next"] / case["t_delta"] - 1, averages.power_ema_exponent(case["std"])
        with x64():
            assert float(averages.power_ema_beta(n, gamma)) == pytest.approx(case["beta"], rel=1e-11, abs=1e-12)
        # What an update gives stays exact in float32, where beta itself is rounded.
        assert float(averages.power_ema_share(n, gamma)) == pytest.approx(1 - case["beta"], rel=2e-6)


@pytest.mark.golden
def test_tracked_power_emas_are_those_of_edm2(phema):
    data = phema[1]
    std, *tracks = data["stds"].tolist()
    config = Averaged(ema_std=std, ema_tracks=tuple(tracks))
    assert config.widths == tuple(data["stds"])
    for state, expected in zip(walked(config, data["params"]), data["power_ema_f64"], strict=True):
        ours = config.powers(state)
        np.testing.assert_allclose([ours[s] for s in config.widths], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.golden
def test_half_life_ema_with_a_ramp_is_edm2s(phema):
    data = phema[1]
    half_life = round(float(data["traditional_halflife_Mimg"]) * 1e6)
    config = Averaged(ema_half_life=half_life, ema_ramp=float(data["traditional_rampup_ratio"]))
    assert config.widths == ()
    states = walked(config, data["params"], int(data["batch_size"]))
    np.testing.assert_allclose([s.ema for s in states], data["traditional_ema_f32"], rtol=1e-6, atol=1e-6)


def test_without_a_ramp_half_of_the_start_is_left_after_a_half_life():
    config = Averaged(ema_half_life=40, ema_tracks=(0.1,))
    state = walked(config, np.array([[1.0]] + [[0.0]] * 10), batch_size=4)[-1]
    assert state.ema == pytest.approx(0.5, rel=1e-12)
    assert config.powers(state) == {0.1: pytest.approx(0.0)}  # the start counts nothing


def test_an_update_that_is_not_applied_changes_no_average():
    config = Averaged(ema_tracks=(0.1,))
    state = TrainState(jnp.int32(3), Learner(None, None, jnp.int32(3)), jnp.ones(2), tracks=(jnp.zeros(2),))
    new = config.averages(state, jnp.full(2, 7.0), 8, jnp.array(False))
    np.testing.assert_array_equal(new["ema"], state.ema)
    np.testing.assert_array_equal(new["tracks"], state.tracks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(ema_tracks=(0.1, 0.3)), r"ema_tracks\[1\] is 0.3"),
        (dict(ema_tracks=(0.1, 0.1)), "EMA widths 0.05, 0.1, 0.1: one is there twice"),
        (dict(ema_tracks=(0.05,)), "EMA widths 0.05, 0.05: one is there twice"),
        (dict(ema_half_life=0), "ema_half_life is 0"),
        (dict(ema_ramp=0.05), "ema_ramp 0.05 .* needs ema_half_life"),
        (dict(ema_half_life=500_000, ema_ramp=0.0), "ema_ramp is 0.0"),
    ],
)
def test_averages_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Averaged(**values)


# --- reconstruction


@pytest.mark.golden
def test_responses_are_those_of_edm2(phema):
    case = phema[0]["response"]
    ours = averages.response(np.arange(case["len"]), case["ofs"], case["std"])
    np.testing.assert_allclose(ours / ours.sum(), case["response"], rtol=1e-9, atol=1e-15)


@pytest.mark.golden
def test_correlations_and_coefficients_are_those_of_edm2(phema):
    case = phema[0]["posthoc"]
    given = case["in_ofs"], case["in_std"]
    np.testing.assert_allclose(averages.correlation(*given, *given), case["correlation_in_in"], rtol=1e-9)
    targets = zip(case["out_ofs"], case["out_std"], strict=True)
    ours = np.stack([averages.coefficients(*given, *target)[0] for target in targets], axis=1)
    np.testing.assert_allclose(ours, case["coefficients_in_by_out"], rtol=0, atol=1e-9)


@pytest.mark.golden
def test_reconstructed_averages_are_those_of_edm2(phema):
    data = phema[1]
    given = data["snapshot_step"], data["snapshot_std"]
    for count, std, expected in zip(data["target_step"], data["target_std"], data["reconstructed_f64"], strict=True):
        weights, _ = averages.coefficients(*given, count, std)
        np.testing.assert_allclose(averages.combined(weights, data["snapshots_f64"]), expected, rtol=1e-9, atol=1e-9)


def test_the_error_is_the_distance_of_the_responses():
    """By sums over a fine grid of time."""
    counts, stds, count, std = (50, 50, 100, 100), (0.05, 0.1, 0.05, 0.1), 100, 0.08
    time = (np.arange(200_000) + 0.5) / 2000
    weights, error = averages.coefficients(counts, stds, count, std)
    wanted = averages.response(time, count, std)
    made = sum(w * averages.response(time, c, s) for w, c, s in zip(weights, counts, stds, strict=True))
    assert error == pytest.approx(np.linalg.norm(made - wanted) / np.linalg.norm(wanted), rel=1e-3)
    assert 1e-3 < error < 0.1


def test_a_width_that_was_tracked_comes_back_and_others_nearly():
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=(201, 50)), axis=0)
    config = Averaged(ema_std=0.05, ema_tracks=(0.1,))
    kept = {n: config.powers(state) for n, state in enumerate(walked(config, path), 1) if n % 25 == 0}
    snapshots = [(n, std, tree) for n, trees in kept.items() for std, tree in trees.items()]
    counts, stds, trees = zip(*snapshots, strict=True)

    def made(std):
        return averages.combined(averages.coefficients(counts, stds, 200, std)[0], trees)

    direct = walked(dataclasses.replace(config, ema_std=0.075), path)[-1].ema
    for std in config.widths:
        np.testing.assert_allclose(made(std), kept[200][std], rtol=1e-9, atol=1e-9)
    spread = np.linalg.norm(kept[200][0.1] - kept[200][0.05])
    assert np.linalg.norm(made(0.075) - direct) < 0.03 * spread

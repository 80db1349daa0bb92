"""A network for a part of the noise is asked for that part alone, in every loss, and samples from there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method import samplers, trigflow
from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.objectives import DcmConfig, DmdConfig, Given, RfScmConfig, ScmConfig
from rcm_jax.method.trigflow import LogNormal, ShiftedUniform
from rcm_jax.train.steps import RcmConfig
from tests import tiny

HIGH, LOW = (0.9, 1.0), (0.0, 0.9)  # Wan2.2's, of image to video
WIDE = LogNormal(1.5, 1.6)
LOSSES = {
    "scm": ScmConfig(WIDE).term,
    "rf_scm": RfScmConfig(WIDE).term,
    "dcm": DcmConfig(steps=48, skip=3).term,
    "dmd": DmdConfig(max_rollout=3, rollout_length="cycled").term,
    "critic": DmdConfig(max_rollout=3, rollout_length="cycled").critic,
}


@pytest.mark.parametrize("within", [HIGH, LOW])
@pytest.mark.parametrize("distribution", [WIDE, ShiftedUniform(5.0)])
def test_times_cut_to_a_range_are_those_of_the_whole_that_lie_in_it(distribution, within):
    whole = np.asarray(distribution.sample(jax.random.key(0), (40_000,)))
    low, high = map(trigflow.time_of, within)
    inside = whole[(whole >= low) & (whole < high)]
    cut = np.asarray(distribution.sample(jax.random.key(1), (len(inside),), within))
    assert low - 1e-6 <= cut.min() and cut.max() <= high + 1e-6
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(cut, quantiles), np.quantile(inside, quantiles), atol=0.03 * (high - low))
    np.testing.assert_allclose(distribution.share(within), len(inside) / len(whole), atol=0.01)
    assert distribution.share(trigflow.WHOLE) == pytest.approx(1)


@pytest.mark.parametrize("within", [HIGH, LOW])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_asks_its_networks_within_their_range_alone(name, within):
    asked = []

    def note(params, x, t, cond):
        jax.debug.callback(lambda t: asked.append(np.asarray(t)), t)
        return params * x

    batch = {"x0": jax.random.normal(jax.random.key(0), (64, 3)), "cond": {}}
    given = Given(
        Velocities(note, lambda p, x, t, conds: note(p, x, t, conds[0]), note), jnp.float32(0.3), jnp.float32(0.2),
        tiny.Teacher(jnp.float32(0.1), {}), batch, jax.random.key(1), count=2, within=within,
    )  # fmt: skip
    LOSSES[name](given)
    jax.effects_barrier()
    times = np.concatenate([t.reshape(-1) for t in asked])
    low, high = map(trigflow.time_of, within)
    assert len(times) >= 2 * 64
    assert low - 1e-5 <= times.min() and times.max() <= high + 1e-5


def test_the_rollout_of_a_network_for_less_noise_begins_with_noised_data():
    """F = 0 makes f = c·x: one step gives c·(c·x0 + s·noise)."""
    x0 = jnp.full((4, 20_000), 3.0)
    zero = lambda params, x, t, cond: jnp.zeros_like(x)  # noqa: E731
    given = Given(Velocities(zero, zero, zero), None, None, None, {"x0": x0, "cond": {}}, None, within=LOW)
    sample = DmdConfig(max_rollout=1).rollout(given, jax.random.key(0))
    t = trigflow.time_of(0.9)
    np.testing.assert_allclose(np.mean(sample, axis=1), 3 * np.cos(t) ** 2, atol=0.005)
    np.testing.assert_allclose(np.std(sample, axis=1), np.cos(t) * np.sin(t), rtol=0.02)


def test_samplers_take_the_times_of_their_range_and_start_from_noised_data():
    times = samplers.student_times(200.0, (1.5, 1.4, 1.0))
    np.testing.assert_array_equal(samplers.within(times, HIGH), times[:2])
    np.testing.assert_array_equal(samplers.within(times, LOW), times[2:])
    np.testing.assert_array_equal(samplers.within(times, trigflow.WHOLE), times)
    noise, x0 = jnp.ones((2, 3)), jnp.full((2, 3), 2.0)
    start, cond = samplers.started(noise, 1.4, {"text": 1, samplers.START: x0})
    np.testing.assert_allclose(start, np.cos(1.4) * 2 + np.sin(1.4), rtol=1e-6)
    assert cond == {"text": 1}
    assert samplers.started(noise, 1.4, {"text": 1})[0] is noise


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RcmConfig(noise_range=(0.9, 0.1)), "rising"),
        (lambda: RcmConfig(noise_range=(0.9, 1.0), consistency=ScmConfig(LogNormal(-3.0, 0.5))), "0.01"),
        (lambda: RcmConfig(noise_range=HIGH, dmd=DmdConfig(max_rollout=2, mid_times=(1.0,))), "1.4601"),
        (lambda: RcmConfig(noise_range=HIGH, consistency=DcmConfig(steps=4, skip=3)), "steps higher"),
        (lambda: samplers.within([1.5, 1.4], (0.0, 0.5)), "no time"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_a_range_are_refused_with_their_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()

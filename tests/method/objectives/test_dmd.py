"""Rollouts: how long, at which times; settings that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.objectives import Given, dmd
from tests import tiny

BATCH = {"x0": jnp.zeros((4, 2)), "cond": {}}


def last_times(config, count, key=0):
    """The times [b] of the last step of a rollout: F = −params makes f = c·x + s·params, with gradient s in params."""

    def F(params, x, t, cond):
        return jnp.full_like(x, -params[:, None])

    def total(params):
        given = Given(Velocities(F, F, F), params, None, None, BATCH, None, count=count)
        return jnp.sum(config.rollout(given, jax.random.key(key))) / 2

    return np.arcsin(jax.grad(total)(jnp.zeros(4)))


@pytest.mark.parametrize("count", range(7))
def test_cycled_rollouts_at_fixed_times_go_one_step_further_with_every_update(count):
    config = tiny.dmd_config(max_rollout=3, rollout_length="cycled", mid_times=(1.2, 0.5))
    expected = (np.pi / 2, 1.2, 0.5)[count % 3]
    np.testing.assert_allclose(last_times(config, count), expected, atol=1e-3)
    np.testing.assert_array_equal(last_times(config, count, key=1), last_times(config, count))


def test_random_times_differ_between_samples_and_keys():
    config = tiny.dmd_config(max_rollout=3, rollout_length="cycled")
    one, other = last_times(config, 2), last_times(config, 2, key=1)
    assert len(set(one)) > 1
    assert set(one) != set(other)


def test_every_step_of_a_rollout_has_noise_of_its_own():
    """F = 0 makes f = c·x: three steps end in c2·(c2·c1·s1·n1 + s2·n2), whose variance tells one draw from two."""
    config = tiny.dmd_config(max_rollout=3, rollout_length="cycled", mid_times=(0.8, 0.7))
    data = {"x0": jnp.zeros((4, 5000)), "cond": {}}

    def F(params, x, t, cond):
        return jnp.zeros_like(x)

    x0 = config.rollout(Given(Velocities(F, F, F), None, None, None, data, None, count=2), jax.random.key(0))
    (c1, s1), (c2, s2) = ((np.cos(t), np.sin(t)) for t in (0.8, 0.7))
    two, one = (c2 * c2 * c1 * s1) ** 2 + (c2 * s2) ** 2, (c2 * (c2 * c1 * s1 + s2)) ** 2
    assert one > 1.8 * two
    np.testing.assert_allclose(np.var(x0), two, rtol=0.05)


@pytest.mark.parametrize("broken", ["x0", "x_t", "F_teacher", "F_fake"])
def test_a_sample_that_is_not_finite_counts_nothing_and_its_gradient_is_zero(broken):
    rng = np.random.default_rng(0)
    names = ("x0", "x_t", "F_teacher", "F_fake")
    arrays = {name: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for name in names}
    t = jnp.array([0.3, 0.8, 1.2])

    def total(x0, arrays):
        values, metrics = dmd.loss(x0, arrays["x_t"], t, arrays["F_teacher"], arrays["F_fake"])
        return jnp.sum(values), (values, metrics)

    gradient = jax.grad(total, has_aux=True)
    whole, (values, metrics) = gradient(arrays["x0"], arrays)
    assert not np.any(metrics["nonfinite"])
    bad = arrays | {broken: arrays[broken].at[1, 2].set(jnp.nan)}
    masked, (left, metrics) = gradient(bad["x0"], bad)
    assert metrics["nonfinite"].tolist() == [0, 1, 0] and left[1] == metrics["weight"][1] == 0
    assert np.all(masked[1] == 0)
    np.testing.assert_array_equal(masked[::2], whole[::2])
    np.testing.assert_array_equal(left[::2], values[::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rollout_length="long"), "rollout_length is 'long': it must be one of drawn, cycled"),
        (dict(mid_times=(1.0,)), r"max_rollout − 1 = 2 times .* got \[1.0\]"),
        (dict(mid_times=(0.5, 1.0)), r"fall between pi/2 and 0, got \[0.5, 1.0\]"),
        (dict(update_freq=1), "update_freq is 1: it must be from 2"),
        (dict(scale=0.0), "scale is 0.0: it must be above 0"),
    ],
)
def test_what_is_no_setting_is_refused_with_the_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.dmd_config(**changes)

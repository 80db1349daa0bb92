"""Rollouts: how long, at which times; settings that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.objectives import Given
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rollout_length="long"), "rollout_length 'long' is none of drawn, cycled"),
        (dict(mid_times=(1.0,)), r"max_rollout − 1 = 2 times .* got \[1.0\]"),
        (dict(mid_times=(0.5, 1.0)), r"fall between pi/2 and 0, got \[0.5, 1.0\]"),
        (dict(update_freq=1), "update_freq 1 must be at least 2"),
        (dict(scale=0.0), "scale 0.0 must be above 0"),
    ],
)
def test_what_is_no_setting_is_refused_with_the_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.dmd_config(**changes)

"""Backward simulation: one program for every length, gradient through the last step, recorded draws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.rollout import fixed_times, non_increasing, random_times, rollout
from tests.tiny import columns, relative, x64

STEPS, B, D = 4, 3, 5


def F(params, x, t, cond):
    return jnp.tanh(x @ params + t[:, None]) * cond[:, None]


@pytest.fixture
def problem():
    """(params, noise, times, cond)."""
    keys = jax.random.split(jax.random.key(0), 3)
    times = random_times(keys[2], trigflow.ShiftedUniform(5.0), STEPS, B)
    return (
        jax.random.normal(keys[0], (D, D)),
        jax.random.normal(keys[1], (STEPS, B, D)),
        times,
        jnp.array([1.0, 0.5, 2]),
    )


def by_hand(last, frozen, noise, times, n, cond):
    """The rollout as a Python loop: `frozen` makes the first n − 1 steps, `last` the last."""
    x = noise[0]
    for k in range(n - 1):
        x = trigflow.diffuse(denoiser.denoise(F, frozen, x, times[k], cond), noise[k + 1], times[k + 1])
    return denoiser.denoise(F, last, x, times[n - 1], cond)


@pytest.mark.smoke
def test_one_program_serves_every_length_and_equals_the_loop_by_hand(problem):
    params, noise, times, cond = problem
    compiled = jax.jit(lambda params, n: rollout(F, params, noise, times, n, cond))
    for n in range(1, STEPS + 1):
        expected = by_hand(params, params, noise, times, n, cond)
        np.testing.assert_allclose(compiled(params, jnp.int32(n)), expected, rtol=1e-5, atol=1e-5)  # float32
    assert compiled._cache_size() == 1


def test_gradient_passes_through_the_last_step_only(problem):
    params, noise, times, cond = problem
    gradient = jax.jit(jax.grad(lambda p, n: jnp.sum(jnp.sin(rollout(F, p, noise, times, n, cond)))))
    for n in range(1, STEPS + 1):
        expected = jax.grad(lambda p, n=n: jnp.sum(jnp.sin(by_hand(p, params, noise, times, n, cond))))(params)
        through_all = jax.grad(lambda p, n=n: jnp.sum(jnp.sin(by_hand(p, p, noise, times, n, cond))))(params)
        np.testing.assert_allclose(gradient(params, jnp.int32(n)), expected, rtol=1e-4, atol=1e-5)
        if n > 1:
            assert relative(expected, through_all) > 1e-2


def test_a_length_that_is_not_traced_works_too(problem):
    params, noise, times, cond = problem
    np.testing.assert_allclose(
        rollout(F, params, noise, times, 3, cond), by_hand(params, params, noise, times, 3, cond), rtol=1e-5, atol=1e-5
    )


def test_random_times_start_at_half_pi_and_never_rise():
    times = np.asarray(random_times(jax.random.key(1), trigflow.ShiftedUniform(5.0), 6, 100))
    assert times.shape == (6, 100)
    np.testing.assert_array_equal(times[0], np.float32(np.pi / 2))
    assert np.all(np.diff(times, axis=0) <= 0)
    assert np.any(np.diff(times, axis=0) < 0, axis=1).all()
    assert times.min() > 0


def test_one_step_needs_no_draw():
    np.testing.assert_array_equal(
        random_times(jax.random.key(1), trigflow.ShiftedUniform(5.0), 1, 4), np.full((1, 4), np.pi / 2, np.float32)
    )
    np.testing.assert_array_equal(fixed_times((), 4), np.full((1, 4), np.pi / 2, np.float32))


def test_fixed_times_are_half_pi_and_the_mid_times_for_every_sample():
    np.testing.assert_allclose(fixed_times((1.3, 0.6), 2), [[np.pi / 2] * 2, [1.3] * 2, [0.6] * 2], rtol=1e-7)


# --- recorded draws

# The reference computes these times in float64 from float32 uniforms, but starts from a float32 pi/2 (4e-8 off).
TIMES = 1e-7


def recorded_cases(data, kind):
    names = sorted({key.split("_")[1] for key in data if key.startswith(f"{kind}_n") and key.endswith("t_traj")})
    return [int(name[1:]) for name in names]


@pytest.mark.golden
@pytest.mark.smoke
def test_recorded_uniforms_give_the_recorded_times(golden):
    draws = np.load(golden / "rcm_losses/simulation_draws.npz")
    data = np.load(golden / "rcm_losses/backward_simulation.npz")
    with x64():
        u = jnp.asarray(draws["step_uniform_u"][..., 0], jnp.float64)
        shift = json.loads((golden / "rcm_losses/meta.json").read_text())["p_D"]["shift"]
        times = np.asarray(non_increasing(trigflow.ShiftedUniform(shift).from_uniform(u)))
    assert recorded_cases(data, "random")
    for n in recorded_cases(data, "random"):
        recorded = data[f"random_n{n}_t_traj"]  # [b, n + 1], with the final 0
        np.testing.assert_allclose(times[:n].T, recorded[:, :n], rtol=0, atol=TIMES)
        np.testing.assert_array_equal(recorded[:, n], 0)


@pytest.mark.golden
def test_recorded_fixed_times_are_the_mid_times(golden):
    data = np.load(golden / "rcm_losses/backward_simulation.npz")
    assert recorded_cases(data, "fixed")
    for n in recorded_cases(data, "fixed"):
        recorded = data[f"fixed_n{n}_t_traj"]
        times = fixed_times((1.5, 1.4, 1.0)[: n - 1], len(recorded))
        np.testing.assert_allclose(np.asarray(times).T, recorded[:, :n], rtol=0, atol=TIMES)


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["random", "fixed"])
def test_recorded_noise_takes_the_rollout_through_the_recorded_states(golden, kind):
    """The network is replaced by the recorded clean samples: a run of k steps ends in step k of a longer one."""
    draws = np.load(golden / "rcm_losses/simulation_draws.npz")
    data = np.load(golden / "rcm_losses/backward_simulation.npz")
    longest = max(recorded_cases(data, kind))
    with x64():
        times = jnp.asarray(data[f"{kind}_n{longest}_t_traj"][:, :longest].T)
        noise = jnp.asarray(np.concatenate([draws["init_noise"][None], draws["step_noise"]]), jnp.float64)
        clean = [jnp.asarray(data[f"{kind}_n{k}_x"], jnp.float64) for k in recorded_cases(data, kind)]
        for n in range(1, longest + 1):
            calls = []

            def lookup(params, x, t, cond, n=n, calls=calls):
                """The k-th call is answered with F of the k-th recorded sample; the last gives back its x."""
                calls.append(t)
                k = len(calls) - 1
                np.testing.assert_allclose(t, times[k], rtol=0, atol=TIMES)
                f = x if k == n - 1 else clean[k]
                t = trigflow.expand(t, x)
                return (jnp.cos(t) * x - f) / jnp.sin(t)

            with jax.disable_jit():
                state = rollout(lookup, None, noise, times, n, None)
            assert len(calls) == n
            assert relative(state, data[f"{kind}_n{longest}_x_traj"][n - 1]) < 1e-6  # the clean samples are float32
    assert columns(draws["D_uniform_u"]).shape == (state.shape[0],)

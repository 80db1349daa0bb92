"""Few-step sampling, the Euler solver and the noise they start from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax import denoiser, samplers, trigflow
from tests.tiny import relative, x64


def F(params, x, t, cond):
    return jnp.tanh(params * x + t[:, None]) + cond[:, None]


COND = jnp.array([0.1, -0.2, 0.3])


@pytest.mark.smoke
@pytest.mark.parametrize("mid_times", [(), (1.1,), (1.3, 1.0, 0.6)])
def test_few_step_is_the_loop_of_algorithm_2(mid_times):
    times = samplers.student_times(80.0, mid_times)
    noise = jax.random.normal(jax.random.key(0), (len(times), 3, 5))
    x = noise[0]
    for k, t in enumerate(times):
        x0 = denoiser.denoise(F, 0.7, x, jnp.full(3, t), COND)
        x = x0 if k == len(times) - 1 else trigflow.diffuse(x0, noise[k + 1], jnp.full(3, times[k + 1]))
    np.testing.assert_allclose(jax.jit(samplers.few_step, static_argnums=0)(F, 0.7, noise, times, COND), x, atol=1e-5)


def test_few_step_does_not_depend_on_noise_after_the_last_step():
    times = samplers.student_times(80.0, (1.1,))
    noise = jax.random.normal(jax.random.key(0), (2, 3, 5))
    assert samplers.few_step(F, 0.7, noise, times, COND).shape == (3, 5)
    twice = samplers.few_step(lambda p, x, t, c: F(p, x, t, c) + jnp.nan * (t[:, None] == 0), 0.7, noise, times, COND)
    assert np.all(np.isfinite(twice))  # and the network is never asked at t = 0


def test_student_times_fall_from_arctan_sigma_max():
    np.testing.assert_allclose(samplers.student_times(80.0, (1.5, 1.0)), [np.arctan(80.0), 1.5, 1.0], rtol=1e-7)


@pytest.mark.parametrize("mid_times", [(1.57,), (1.0, 1.1), (1.0, 0.0), (1.0, 1.0)])
def test_student_times_that_do_not_fall_are_refused_with_their_numbers(mid_times):
    with pytest.raises(ValueError, match=rf"1\.5583.*{mid_times[-1]}"):
        samplers.student_times(80.0, mid_times)


# --- Euler


def gaussian_velocity(mean, deviation):
    """F of data N(mean, deviation²): x_t ~ N(c·mean, c²·deviation² + s²)."""

    def velocity(params, x, t, cond):
        t = trigflow.expand(t, x)
        c, s = jnp.cos(t), jnp.sin(t)
        total = c**2 * deviation**2 + s**2
        x0 = mean + c * deviation**2 / total * (x - c * mean)
        return (c * x - x0) / s

    return velocity


@pytest.mark.smoke
def test_euler_on_a_gaussian_converges_to_the_exact_flow_at_first_order():
    mean, deviation, sigma_max = 0.8, 0.5, 80.0
    with x64():
        noise = jnp.linspace(-2.0, 2.0, 5)[:, None]
        t = np.arctan(sigma_max)
        start = np.sqrt(np.cos(t) ** 2 * deviation**2 + np.sin(t) ** 2)
        exact = mean + deviation * (np.asarray(noise) - np.cos(t) * mean) / start  # the PF-ODE keeps quantiles
        errors = []
        for steps in (16, 32, 64, 128):
            times = np.asarray(samplers.ode_times(steps, sigma_max, 1.0), np.float64)
            x = samplers.euler(gaussian_velocity(mean, deviation), None, noise, times, None)
            errors.append(np.max(np.abs(x - exact)))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert errors[-1] < 0.02
    np.testing.assert_allclose(orders, 1, atol=0.2)


def test_euler_is_exact_for_a_single_data_point():
    """F = (c·x − x0)/s is constant along the circle: one step of any length ends in x0."""
    noise = jax.random.normal(jax.random.key(0), (3, 5))
    for steps in (1, 7):
        times = samplers.ode_times(steps, 80.0, 3.0)
        x = samplers.euler(gaussian_velocity(0.8, 0.0), None, noise, times, None)
        np.testing.assert_allclose(x, 0.8, atol=1e-5)


def recorded_euler(data):
    """Names of the recorded Euler cases that start at a finite noise level, with (shift, steps)."""
    for key in data:
        if key.startswith("euler_sigma_max80rcm") and key.endswith("_sigmas"):
            name = key.removesuffix("_sigmas")
            shift, steps = name.split("shift")[1].split("_steps")
            yield name, float(shift), int(steps)


@pytest.mark.golden
def test_grid_of_the_ode_is_that_of_the_reference(golden):
    data = np.load(golden / "samplers/flow_samplers_analytic.npz")
    tested = 0
    for name, shift, steps in recorded_euler(data):
        with x64():  # the times are float32, the map to rectified-flow time is not
            times = samplers.ode_times(steps, 80.0, shift)
            tau = np.asarray(trigflow.rectified_flow_time(jnp.asarray(times, jnp.float64)))
        assert times.shape == (steps + 1,)
        assert times[-1] == 0
        np.testing.assert_allclose(tau[:-1], data[f"{name}_sigmas"], rtol=0, atol=1e-6, err_msg=name)
        tested += 1
    assert tested


@pytest.mark.golden
@pytest.mark.smoke
def test_euler_on_the_analytic_field_follows_the_reference(golden):
    """Euler of the rectified flow is DDIM of TrigFlow: the same states up to the scale c + s."""
    data = np.load(golden / "samplers/flow_samplers_analytic.npz")
    A, B, C = (data[name][:, None, None, None] for name in "ABC")

    def net(params, x, time, cond):  # the network's time is 0..1000
        tau = time[:, None, None, None, None] / 1000
        return A * x + B * tau + C * jnp.sin(3 * tau)

    tested = 0
    for name, shift, steps in recorded_euler(data):
        key = f"{name}_traj" if f"{name}_traj" in data else f"{name}_traj_last"
        with x64():
            times = samplers.ode_times(steps, 80.0, shift).astype(np.float64)
            start = jnp.asarray(data["x_init"]) * (np.cos(times[0]) + np.sin(times[0]))
            end = samplers.euler(denoiser.from_rectified_flow(net, 1000.0), None, start, times, None)
        assert relative(end, data[key] if key.endswith("last") else data[key][-1]) < 1e-6, name
        tested += 1
    assert tested


# --- noise


@pytest.mark.smoke
def test_noise_of_a_sample_does_not_depend_on_how_samples_are_batched():
    key, ids = jax.random.key(3), np.arange(10)
    whole = np.asarray(samplers.unit_noise(key, ids, (4, 2)))
    parts = [samplers.unit_noise(key, part, (4, 2)) for part in (ids[:1], ids[1:7], ids[7:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(samplers.unit_noise(key, ids[::-1], (4, 2))[::-1], whole)
    assert len(np.unique(whole)) == whole.size


def test_noise_is_unit_and_depends_on_the_key():
    noise = np.asarray(samplers.unit_noise(jax.random.key(0), np.arange(500), (20,)))
    # Standard errors with 10,000 numbers: 0.01 of the mean, 0.007 of the deviation.
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.04
    assert not np.any(noise == np.asarray(samplers.unit_noise(jax.random.key(1), np.arange(500), (20,))))

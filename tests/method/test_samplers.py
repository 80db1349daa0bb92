"""Few-step sampling, the solvers of the PF-ODE and the noise they start from."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method import denoiser, samplers, trigflow
from tests.tiny import relative, x64


def F(params, x, t, cond):
    return jnp.tanh(params * x + t[:, None]) + cond[:, None]


COND = jnp.array([0.1, -0.2, 0.3])
FROM_INFINITY = ("euler", "unipc")  # solvers that may begin at pi/2


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


# --- Euler and UniPC


def gaussian_velocity(mean, deviation):
    """F of data N(mean, deviation²): x_t ~ N(c·mean, c²·deviation² + s²)."""

    def velocity(params, x, t, cond):
        t = trigflow.expand(t, x)
        c, s = jnp.cos(t), jnp.sin(t)
        total = c**2 * deviation**2 + s**2
        x0 = mean + c * deviation**2 / total * (x - c * mean)
        return (c * x - x0) / s

    return velocity


def gaussian_error(solver, steps, mean=0.8, deviation=0.5, sigma_max=80.0):
    """Largest error of a solver at t = 0, in float64. The PF-ODE keeps quantiles: the exact flow is known."""
    with x64():
        noise = jnp.linspace(-2.0, 2.0, 5)[:, None]
        t = np.arctan(sigma_max)
        start = np.sqrt(np.cos(t) ** 2 * deviation**2 + np.sin(t) ** 2)
        exact = mean + deviation * (np.asarray(noise) - np.cos(t) * mean) / start
        times = np.asarray(samplers.ode_times(steps, sigma_max, 1.0), np.float64)
        return np.max(np.abs(solver(gaussian_velocity(mean, deviation), None, noise, times, None) - exact))


@pytest.mark.smoke
@pytest.mark.parametrize(("solver", "order", "bound"), [("euler", 1, 0.02), ("unipc", 2, 1e-4), ("heun", 2, 2e-4)])
def test_solver_on_a_gaussian_converges_to_the_exact_flow_at_its_order(solver, order, bound):
    errors = [gaussian_error(samplers.SOLVERS[solver], steps) for steps in (32, 64, 128, 256)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert errors[-1] < bound
    np.testing.assert_allclose(orders, order, atol=0.2)


@pytest.mark.parametrize(("steps", "factor"), [(4, 1.4), (8, 8), (16, 8)])
def test_unipc_beats_euler_at_equal_steps(steps, factor):
    assert factor * gaussian_error(samplers.unipc, steps) < gaussian_error(samplers.euler, steps)


@pytest.mark.parametrize(
    ("solver", "sigma_max"), [*((s, np.inf) for s in FROM_INFINITY), *((s, 80.0) for s in samplers.SOLVERS)]
)
def test_solver_is_exact_for_a_single_data_point(solver, sigma_max):
    """F = (c·x − x0)/s is constant along the circle: any steps end in x0."""
    noise = jax.random.normal(jax.random.key(0), (3, 5))
    for steps in (1, 2, 7):
        times = samplers.ode_times(steps, sigma_max, 3.0)
        x = samplers.SOLVERS[solver](gaussian_velocity(0.8, 0.0), None, noise, times, None)
        np.testing.assert_allclose(x, 0.8, atol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("solver", FROM_INFINITY)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_float32_from_infinite_sigma_is_float64(solver, steps):
    """pi/2 is beyond pi/2 in float32 and before it in float64; the solutions are those of one noise level."""

    def solve(dtype):
        noise = jax.random.normal(jax.random.key(0), (3, 5), jnp.float32).astype(dtype)
        times = samplers.ode_times(steps, np.inf, 3.0)
        times = times if dtype == jnp.float32 else np.append(np.pi / 2, times[1:].astype(np.float64))
        return jax.jit(lambda noise: samplers.SOLVERS[solver](F, 0.7, noise, times, COND.astype(dtype)))(noise)

    single = solve(jnp.float32)
    with x64():
        double = solve(jnp.float64)
    assert (single.dtype, double.dtype) == (jnp.float32, jnp.float64)
    assert np.all(np.isfinite(single))
    np.testing.assert_allclose(single, double, atol=1e-5)


def test_heun_is_edms_loop_in_the_noise_level_and_cannot_begin_at_half_pi():
    """EDM's algorithm 1, written with sigma and D as the paper has it, without churn."""
    with x64():
        sigmas = np.append(np.tan(np.float64(samplers.edm_times(6, 80.0, 0.004, 7.0))[:-1]), 0)
        x = np.random.default_rng(0).standard_normal((3, 5)) * sigmas[0]
        unit = x * np.cos(np.arctan(sigmas[0]))

        def D(x, sigma):
            t = jnp.full(3, np.arctan(sigma))
            return np.asarray(denoiser.denoise(F, 0.7, jnp.asarray(x * np.cos(np.arctan(sigma))), t, COND))

        for sigma, following in itertools.pairwise(sigmas):
            d = (x - D(x, sigma)) / sigma
            euler = x + (following - sigma) * d
            if following:
                d = (d + (euler - D(euler, following)) / following) / 2
            x = x + (following - sigma) * d
        found = samplers.heun(F, 0.7, jnp.asarray(unit), np.arctan(sigmas), COND)
    np.testing.assert_allclose(found, x, atol=1e-9)
    with pytest.raises(ValueError, match="below pi/2"):
        samplers.heun(F, 0.7, jnp.asarray(unit), samplers.ode_times(4, np.inf, 1.0), COND)


@pytest.mark.parametrize("bad", [(1, 80.0, 0.004, 7.0), (4, np.inf, 0.004, 7.0), (4, 80.0, 80.0, 7.0), (4, 80, 1, 0)])
def test_grids_of_edm_that_cannot_be_are_refused_with_their_numbers(bad):
    with pytest.raises(ValueError, match=re.escape(f"got steps = {bad[0]}, sigma_min = {bad[2]}")):
        samplers.edm_times(*bad)


def test_unipc_corrects_with_the_parabola_through_three_predictions():
    """Where the data prediction is a parabola in lambda, the corrector ends where the integral does."""
    times = np.array([1.5, 1.3, 0.9, 0.4])
    t, u, x = times[1], times[2], 0.7
    lam = -np.log(np.tan(times))
    prediction = np.polynomial.Polynomial([0.3, -0.8, 0.5])
    nodes = np.linspace(lam[1], lam[2], 20001)
    integral = np.trapezoid(np.exp(nodes) * prediction(nodes), nodes)
    exact = np.sin(u) * (x / np.sin(t) + integral)  # d(x/sin t) = e^lambda·m dlambda
    c, c0, c1, c2 = samplers.unipc_coefficients(times)[2, :4]
    m2, m1, m0 = prediction(lam[:3])
    np.testing.assert_allclose(c * x + c0 * m0 + c1 * m1 + c2 * m2, exact, rtol=1e-8)


def test_unipc_ends_in_the_last_data_prediction():
    table = samplers.unipc_coefficients(samplers.ode_times(4, np.inf, 3.0))
    np.testing.assert_array_equal(table[-1, 4:], [0, 1, 0])
    np.testing.assert_array_equal(table[0, :4], [1, 0, 0, 0])
    np.testing.assert_array_equal(table[1, [3, 6]], 0)  # no slope over an infinite interval


@pytest.mark.parametrize("times", [(1.0,), (1.0, 1.0), (0.5, 1.0), (1.6, 0.0), (1.0, -0.1), (1.0, np.nan)])
def test_times_of_unipc_that_do_not_fall_are_refused_with_their_numbers(times):
    with pytest.raises(ValueError, match=re.escape(f"from pi/2 or less to 0 or more, got {list(times)}")):
        samplers.unipc_coefficients(times)


def test_ode_times_from_infinite_sigma():
    times = samplers.ode_times(4, np.inf, 3.0)
    assert times.dtype == np.float32
    np.testing.assert_allclose(times, [np.pi / 2, np.arctan(9), np.arctan(3), np.arctan(1), 0], rtol=1e-7)
    np.testing.assert_allclose(times, samplers.ode_times(4, 1e9, 3.0), atol=1e-7)


@pytest.mark.parametrize(
    ("steps", "sigma_max", "shift"),
    [(0, 80.0, 3.0), (4, 0.0, 3.0), (4, -1.0, 3.0), (4, np.nan, 3.0), (4, 80.0, 0.0), (4, 80.0, np.inf)],
)
def test_ode_times_of_no_grid_are_refused_with_their_numbers(steps, sigma_max, shift):
    with pytest.raises(ValueError, match=f"got steps = {steps}, sigma_max = {sigma_max}, shift = {shift}"):
        samplers.ode_times(steps, sigma_max, shift)


LEVELS = {"sigma_max1": np.inf, "sigma_max80rcm": 80.0}  # recorded in rectified-flow time, where 1 is pure noise


def recorded(data, solver):
    """Names of the recorded cases of a solver, with the times of their grid."""
    for key in data:
        if key.startswith(f"{solver}_") and key.endswith("_sigmas"):
            name = key.removesuffix("_sigmas")
            level, shift, steps = re.fullmatch(r"[a-z]+_(\w+)_shift([\d.]+)_steps(\d+)", name).groups()
            yield name, samplers.ode_times(int(steps), LEVELS[level], float(shift))


def recorded_states(data, name):
    """(indices, states) of a recorded trajectory: all of it, or every fifth state of a long one."""
    stride = 1 if f"{name}_traj" in data else 5
    states = data[f"{name}_traj" if stride == 1 else f"{name}_traj_every5"]
    return stride * np.arange(len(states)), states


def rectified_flow_states(solver, net, x_init, times):
    """All states [steps + 1, b, ...] in the scale of the rectified flow, as the network sees them, and the last."""
    F, seen = denoiser.from_rectified_flow(net, 1000.0), []

    def record(params, x, t, cond):
        seen.append((x, t))
        return F(params, x, t, cond)

    scale = np.cos(times) + np.sin(times)
    with jax.disable_jit():  # the loop runs as Python
        end = samplers.SOLVERS[solver](record, None, jnp.asarray(x_init) * scale[0], times, None)
    np.testing.assert_array_equal([t for _, t in seen], np.tile(times[:-1, None], len(x_init)))  # one call per step
    return np.stack([*(x for x, _ in seen), end]) / scale.reshape(-1, *[1] * end.ndim)


@pytest.mark.golden
@pytest.mark.parametrize("solver", FROM_INFINITY)
def test_grid_of_the_ode_is_that_of_the_reference(golden, solver):
    data = np.load(golden / "samplers/flow_samplers_analytic.npz")
    tested = 0
    for name, times in recorded(data, solver):
        with x64():  # the times are float32, the map to rectified-flow time is not
            tau = np.asarray(trigflow.rectified_flow_time(jnp.asarray(times, jnp.float64)))
        sigmas, timesteps = data[f"{name}_sigmas"], data[f"{name}_timesteps"]
        assert len(tau) == len(timesteps) + 1
        assert times[-1] == 0
        np.testing.assert_allclose(tau[: len(sigmas)], sigmas, rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(1000 * tau[:-1], timesteps, rtol=0, atol=1e-3, err_msg=name)
        tested += 1
    assert tested


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize(("solver", "tolerance"), [("euler", 1e-6), ("unipc", 3e-6)])
def test_solver_on_the_analytic_field_follows_the_reference(golden, solver, tolerance):
    """A solver of the rectified flow is the solver of TrigFlow: the same states up to the scale c + s."""
    data = np.load(golden / "samplers/flow_samplers_analytic.npz")
    A, B, C = (data[name][:, None, None, None] for name in "ABC")

    def net(params, x, time, cond):  # the network's time is 0..1000
        tau = time[:, None, None, None, None] / 1000
        return A * x + B * tau + C * jnp.sin(3 * tau)

    tested = 0
    for name, times in recorded(data, solver):
        with x64():
            states = rectified_flow_states(solver, net, data["x_init"], times.astype(np.float64))
        indices, expected = recorded_states(data, name)
        assert indices[-1] == len(states) - 1
        for i, state in zip(indices, expected, strict=True):
            assert relative(states[i], state) < tolerance, (name, i)
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

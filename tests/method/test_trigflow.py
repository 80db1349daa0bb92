"""TrigFlow against the reference values and against its own identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.trigflow import LogNormal, ShiftedUniform
from tests.tiny import x64

# The suggested tolerances of the reference values: absolute, for numbers of order 1.
FLOAT64, FLOAT32 = 1e-12, 1e-6
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, FLOAT64), (np.float32, FLOAT32)])

times = st.floats(0, np.pi / 2)
values = st.floats(-5, 5)


def wrapped_coefficients(t):
    """(c_in, tau, c_skip, c_out) of the rectified-flow wrap, read off with probing networks: f = c_skip·x + c_out·v."""
    one = jnp.ones_like(t)
    seen = []

    def net(params, x, time, cond):
        seen.append((x, time))
        return params * jnp.ones_like(x)

    F = denoiser.from_rectified_flow(net)
    c_skip = denoiser.denoise(F, 0.0, one, t, None)
    c_out = denoiser.denoise(F, 1.0, one, t, None) - c_skip
    (c_in, tau), _ = seen
    return c_in, tau, c_skip, c_out


@pytest.mark.golden
@pytest.mark.smoke
@PRECISIONS
def test_wrap_has_the_coefficients_of_the_reference_up_to_half_pi(golden, dtype, tolerance):
    data = np.load(golden / "trigflow/coeffs.npz")
    with x64():
        c_in, tau, c_skip, c_out = wrapped_coefficients(jnp.asarray(data["t"], dtype))
    assert c_in.dtype == dtype
    np.testing.assert_allclose(c_in, data["f1_c_in"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(tau, data["f1_c_noise"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(c_skip, data["f1_c_skip"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(c_out, data["f1_c_out"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(1000 * np.asarray(tau), data["f1000_c_noise"], rtol=0, atol=1000 * tolerance)


@pytest.mark.golden
def test_tangents_of_the_coefficients_are_those_of_the_reference(golden):
    data = np.load(golden / "trigflow/coeffs.npz")
    with x64():
        t = jnp.asarray(data["t"])
        tangents = jax.jvp(wrapped_coefficients, (t,), (jnp.ones_like(t),))[1]
    for name, tangent in zip(("c_in", "c_noise", "c_skip", "c_out"), tangents, strict=True):
        np.testing.assert_allclose(tangent, data[f"f1_d{name}_dt"], rtol=0, atol=FLOAT64, err_msg=name)


@pytest.mark.golden
def test_times_rounded_to_float32_first_are_what_the_reference_class_computes(golden):
    data = np.load(golden / "trigflow/coeffs.npz")
    with x64():
        coefficients = wrapped_coefficients(jnp.asarray(data["t_float32"], jnp.float64))
    for name, value in zip(("c_in", "c_noise", "c_skip", "c_out"), coefficients, strict=True):
        np.testing.assert_allclose(value, data[f"f1_{name}_from_t_float32"], rtol=0, atol=FLOAT64, err_msg=name)


@pytest.mark.golden
@PRECISIONS
def test_sigma_and_time_convert_as_in_the_reference(golden, dtype, tolerance):
    data = np.load(golden / "trigflow/time_transforms.npz")
    with x64():
        t = jnp.arctan(jnp.asarray(data["sigma"], dtype))
        rf_of_sigma = trigflow.rectified_flow_time(t)
        rf_of_time = trigflow.rectified_flow_time(jnp.asarray(data["trig_t"], dtype))
    np.testing.assert_allclose(t, data["sigma_to_trig_time"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(rf_of_sigma, data["sigma_to_rf_time"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(rf_of_time, data["trig_to_rf_time"], rtol=0, atol=tolerance)


@pytest.mark.golden
@PRECISIONS
def test_shifted_uniform_is_the_shift_of_the_reference_and_u_1_is_half_pi(golden, dtype, tolerance):
    data = np.load(golden / "trigflow/time_transforms.npz")
    shifts = [key.removeprefix("shift_rf_time_shift") for key in data if key.startswith("shift_rf_time_shift")]
    assert shifts
    for shift in shifts:
        if float(shift) <= 0:  # the reference takes 0 for "no shift"; we have 1 for it
            continue
        with x64():
            t = ShiftedUniform(float(shift)).from_uniform(jnp.asarray(data["u"], dtype))
            rf = trigflow.rectified_flow_time(t)
        np.testing.assert_allclose(rf, data[f"shift_rf_time_shift{shift}"], rtol=0, atol=tolerance, err_msg=shift)
        assert np.all(np.asarray(t)[data["u"] == 1] == dtype(np.pi / 2))


@pytest.mark.golden
@PRECISIONS
def test_time_distributions_map_the_recorded_draws_to_the_recorded_times(golden, dtype, tolerance):
    data = np.load(golden / "trigflow/time_transforms.npz")
    tested = 0
    for key in data:
        if not key.endswith("_rf") or not key.startswith(("LogNormal_", "UniformShift_")):
            continue
        name = key.removesuffix("_rf")
        kind, *numbers = name.split("_")
        with x64():
            if kind == "LogNormal":
                mean, std = (float(n.removeprefix("mean").removeprefix("std")) for n in numbers)
                t = LogNormal(mean, std).from_normal(jnp.asarray(data["lognormal_z_float32"], dtype))
            else:
                t = ShiftedUniform(float(numbers[0])).from_uniform(jnp.asarray(data["uniform_u_float32"], dtype))
            rf = trigflow.rectified_flow_time(t)
        np.testing.assert_allclose(rf, data[key], rtol=0, atol=tolerance, err_msg=key)
        np.testing.assert_allclose(t, data[f"{name}_draw_training_time"], rtol=0, atol=tolerance, err_msg=key)
        tested += 1
    assert tested


@pytest.mark.golden
def test_conversions_of_flow_matching_hold_for_data_of_another_deviation(golden):
    """The recorded numbers have sigma_d = 0.5: dividing data by it gives ours."""
    data = np.load(golden / "scm/trigflow_conversions.npz")
    sigma_d = float(data["sigma_d"])
    with x64():
        t = jnp.arctan2(data["fm_tau"], sigma_d * (1 - data["fm_tau"]))
        x_t = jnp.asarray(data["fm_x_t"]) / sigma_d
        v = data["fm_eps_pred"] - data["fm_x0_pred"] / sigma_d
        F = trigflow.from_rectified_flow(x_t, v, t)
        f = trigflow.denoise(x_t, F, t)
        proposal = LogNormal(float(data["proposal_P_mean"]) - np.log(sigma_d), float(data["proposal_P_std"]))
        proposed = proposal.from_normal(jnp.asarray(data["proposal_normal"]))
    np.testing.assert_allclose(t, data["fm_t"], rtol=0, atol=FLOAT64)
    np.testing.assert_allclose(F, data["fm_trig_F"], rtol=0, atol=FLOAT64 * 10)  # |F| is about 5
    np.testing.assert_allclose(np.asarray(f) * sigma_d, data["fm_x0_pred"], rtol=0, atol=FLOAT64 * 10)
    np.testing.assert_allclose(proposed, data["proposal_t"], rtol=0, atol=FLOAT64)


@pytest.mark.smoke
@given(values, values, times)
@settings(deadline=None, max_examples=50)
def test_denoising_with_the_true_velocity_gives_back_the_clean_sample(x0, eps, t):
    with x64():
        x0, eps, t = (jnp.full((1,), v) for v in (x0, eps, t))
        x_t = trigflow.diffuse(x0, eps, t)
        np.testing.assert_allclose(trigflow.denoise(x_t, trigflow.target(x0, eps, t), t), x0, atol=1e-14)


@given(values, values, times)
@settings(deadline=None, max_examples=50)
def test_velocity_is_the_time_derivative_of_diffuse(x0, eps, t):
    with x64():
        x0, eps, t = (jnp.full((1,), v) for v in (x0, eps, t))
        derivative = jax.jvp(lambda t: trigflow.diffuse(x0, eps, t), (t,), (jnp.ones(1),))[1]
        np.testing.assert_allclose(trigflow.target(x0, eps, t), derivative, atol=1e-14)


@given(values, values, times, times)
@settings(deadline=None, max_examples=50)
def test_euler_stays_on_the_circle_for_any_step(x0, eps, t, u):
    """With the true velocity of one pair (x0, eps), a step of any length is exact, and u = 0 is the denoiser."""
    with x64():
        x0, eps, t, u = (jnp.full((1,), v) for v in (x0, eps, t, u))
        x_t, F = trigflow.diffuse(x0, eps, t), trigflow.target(x0, eps, t)
        np.testing.assert_allclose(trigflow.euler(x_t, F, t, u), trigflow.diffuse(x0, eps, u), atol=2e-14)
        np.testing.assert_allclose(trigflow.euler(x_t, F, t, 0 * t), trigflow.denoise(x_t, F, t), atol=1e-14)


@given(values, times, times)
@settings(deadline=None, max_examples=50)
def test_unit_gaussian_data_do_not_move(x, t, u):
    """x_t ~ N(0, 1) for every t, so F = 0 and Euler keeps x, from the exact posterior mean of N(0, 1) data."""
    with x64():
        x, t, u = (jnp.full((1,), v) for v in (x, t, u))
        posterior_mean = jnp.cos(t) * x
        F = jnp.where(jnp.sin(t) > 1e-3, (jnp.cos(t) * x - posterior_mean) / jnp.sin(t), 0.0)
        np.testing.assert_allclose(F, 0, atol=1e-12)
        np.testing.assert_allclose(trigflow.euler(x, F, t, t), x, atol=1e-14)
        np.testing.assert_allclose(trigflow.euler(x, F, t, u), jnp.cos(u - t) * x, atol=1e-14)


@given(values, values, st.floats(1e-3, np.pi / 2))
@settings(deadline=None, max_examples=50)
def test_rectified_flow_wrap_equals_the_official_division_by_sine(x, v, t):
    """(3) against F = (c·x − f)/s with f = (x − s·v)/(c + s), as the official code forms it in float64."""
    c, s = np.cos(t), np.sin(t)
    f = (x - s * v) / (c + s)
    official = (c * x - f) / s
    with x64():
        ours = trigflow.from_rectified_flow(jnp.full((1,), x), jnp.full((1,), v), jnp.full((1,), t))
    np.testing.assert_allclose(ours, official, rtol=0, atol=1e-11)  # the division by s ≥ 1e-3 costs three digits


@given(values, values, times)
@settings(deadline=None, max_examples=50)
def test_rectified_flow_sample_of_equal_noise_ratio(x0, eps, t):
    with x64():
        x0, eps, t = (jnp.full((1,), v) for v in (x0, eps, t))
        x_rf, tau = trigflow.to_rectified_flow(trigflow.diffuse(x0, eps, t), t)
        np.testing.assert_allclose(x_rf, (1 - tau) * x0 + tau * eps, atol=1e-14)


def test_wrap_is_well_conditioned_in_float32_where_the_official_form_is_not():
    t = jnp.asarray([1e-6, 1e-4, 1e-2], jnp.float32)
    x, v = jnp.asarray([1.3, -0.7, 0.4], jnp.float32), jnp.asarray([0.2, 1.1, -0.9], jnp.float32)
    ours = np.asarray(trigflow.from_rectified_flow(x, v, t), np.float64)
    c, s = np.cos(np.float64(t)), np.sin(np.float64(t))
    exact = ((c - s) * np.float64(x) + np.float64(v)) / (c + s)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("distribution", [LogNormal(-0.8, 1.6), ShiftedUniform(5.0)])
def test_samples_are_float32_times_in_range_and_follow_the_distribution(distribution):
    t = np.asarray(distribution.sample(jax.random.key(0), (4000,)))
    assert t.dtype == np.float32
    assert t.min() >= 0
    assert t.max() <= np.float32(np.pi / 2)
    tangent = np.median(np.tan(np.float64(t)))
    median = np.exp(-0.8) if isinstance(distribution, LogNormal) else 5.0
    # Standard error of a sample median of 4,000: about 2.5 % (log normal, std 1.6 × 1.25/sqrt(4000) = 3 %).
    assert abs(np.log(tangent / median)) < 0.15

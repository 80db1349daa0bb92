"""Samplers with the reference's networks: few steps, the teacher's guided ODE, two experts.

What x starts from differs: unit noise in the student's own sampler, the rectified flow's unit noise in the teacher's,
noise of deviation tau there in the inference scripts. In float64 each `NAME_f64`, the reference's own run in float64,
is met to rounding.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method import denoiser, samplers
from tests import tiny
from tests.conftest import GOLDEN
from tests.tiny import relative
from tests.wan import (
    PRECISIONS,
    channels_first,
    channels_last,
    golden_config,
    golden_distillation,
    golden_params,
    precision,
    velocity,
)

SAMPLERS = GOLDEN / "samplers"
TOLERANCE = 1e-5  # suggested in float32: text to video
TOLERANCE_I2V = 1e-4  # image to video
DOUBLE = 1e-13  # float64; reached: 1e-14
# The reference's grids of the ODE, and the coefficients of its UniPC, are float32 in its float64 run too. Reached: 6e-8
# (Euler on its very grid: 1e-15).
DOUBLE_ODE = 2e-7

pytestmark = pytest.mark.golden
each_precision = pytest.mark.parametrize("dtype", PRECISIONS)


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    yield from tiny.fast_compilation()


def each_case(file: str, pattern: str):
    """A parameter `case`, a match of the pattern, for every recorded sample of that name."""
    keys = np.load(SAMPLERS / file).files if (SAMPLERS / file).exists() else []
    matches = [match for key in keys if (match := re.fullmatch(pattern, key))]
    return pytest.mark.parametrize("case", matches, ids=lambda match: match[0])


def settings(file: str) -> dict:
    return json.loads((SAMPLERS / file).read_text())


def load(file: str, dtype, *names):
    """Arrays of a file in that dtype, videos channels last."""
    data = np.load(SAMPLERS / file)
    return [jnp.asarray(channels_last(data[name]) if data[name].ndim > 4 else data[name], dtype) for name in names]


def few_times(n, sigma_max, mid_times, dtype):
    """[n] times of the few-step sampler; those of a float64 run are not rounded to float32."""
    times = samplers.student_times(sigma_max, mid_times[: n - 1])
    return rounded(times, np.array([np.arctan(sigma_max), *mid_times[: n - 1]]), dtype)


def teacher_times(steps, sigma_max, shift, dtype):
    """[steps + 1] times of the ODE; those of a float64 run are not rounded to float32."""
    tau = np.linspace(sigma_max / (sigma_max + shift), 0, steps + 1)
    return rounded(samplers.ode_times(steps, sigma_max, shift), np.arctan2(shift * tau, 1 - tau), dtype)


def rounded(times, exact, dtype):
    np.testing.assert_allclose(times, exact, rtol=1e-7)
    return times if dtype == "float32" else exact


def assert_sample(x, data, name, dtype, tolerance=TOLERANCE, double=DOUBLE):
    """x is the recorded sample; in float64 that of the float64 run."""
    if dtype == "float64":
        assert relative(channels_first(x), data[f"{name}_f64"]) < double
    else:
        assert relative(channels_first(x), data[name]) < tolerance


# --- the model's own samplers


@functools.cache
def student_program(dtype):
    """(noise, times, cond) -> few-step sample."""
    nets = golden_distillation(dtype)
    return jax.jit(lambda noise, times, cond: samplers.few_step(nets.F, nets.student, noise, times, cond))


@each_precision
@each_case("rcm_model_sampling.npz", r"generate_n(\d+)_sigmamax([\d.]+)")
def test_few_steps_of_the_student(case, dtype):
    n, sigma_max = int(case[1]), float(case[2])
    with precision(dtype):
        initial, steps = load("rcm_model_sampling.npz", dtype, "init_noise", "step_noise")
        times = few_times(n, sigma_max, settings("rcm_model_sampling.json")["mid_t"], dtype)
        noise = jnp.concatenate([initial[None], steps[: n - 1]])
        x = student_program(dtype)(noise, times, golden_distillation(dtype).cond)
    assert_sample(x, np.load(SAMPLERS / "rcm_model_sampling.npz"), case[0], dtype)


@each_precision
@each_case("rcm_model_sampling.npz", r"teacher_(Euler|UniPC)_n(\d+)_shift([\d.]+)")
def test_guided_ode_of_the_teacher(case, dtype):
    """x_rf starts as the noise: x_t = (c + s)·noise."""
    solver, steps, shift = case[1].lower(), int(case[2]), float(case[3])
    values = settings("rcm_model_sampling.json")
    with precision(dtype):
        nets = golden_distillation(dtype)
        F = denoiser.guided(nets.F, values["teacher_guidance"])
        times = teacher_times(steps, values["teacher_sigma_max"], shift, dtype)
        solve = jax.jit(lambda x: samplers.SOLVERS[solver](F, nets.teacher, x, times, (nets.cond, nets.uncond)))
        (noise,) = load("rcm_model_sampling.npz", dtype, "init_noise")
        x = solve((np.cos(times[0]) + np.sin(times[0])) * noise)
    assert_sample(x, np.load(SAMPLERS / "rcm_model_sampling.npz"), case[0], dtype, double=DOUBLE_ODE)


# --- the inference scripts


def script_noise(file, dtype, times):
    """[n, b, ...]: what a script starts from (x_rf = tau·noise is x_t = sin t·noise), and what it adds."""
    initial, steps = load(file, dtype, "init_noise", "step_noise")
    return jnp.concatenate([np.sin(times[0]) * initial[None], steps[: len(times) - 1]])


@each_precision
@each_case("rcm_infer_t2v.npz", r"t2v_n(\d+)_sigmamax([\d.]+)")
def test_text_to_video(case, dtype):
    file, n, sigma_max = "rcm_infer_t2v.npz", int(case[1]), float(case[2])
    data = np.load(SAMPLERS / file)
    with precision(dtype):
        (text,) = load(file, dtype, "crossattn_emb")
        times = few_times(n, sigma_max, settings("rcm_infer.json")["mid_t"], dtype)
        noise = script_noise(file, dtype, times)
        cond = {"text": jnp.broadcast_to(text, (noise.shape[1], *text.shape[1:]))}
        assert_sample(student_program(dtype)(noise, times, cond), data, case[0], dtype)
        assert_script_steps(case[0], data, dtype, noise, times, cond)


def assert_script_steps(name, data, dtype, noise, times, cond):
    """Times and velocities along the way, at states of the rectified flow: the first k steps end in x_rf − tau·v."""
    tau = np.append(np.sin(times) / (np.cos(times) + np.sin(times)), 0)
    np.testing.assert_allclose(tau, data[f"{name}_t_steps"], rtol=1e-6)
    (v_recorded,) = load("rcm_infer_t2v.npz", dtype, f"{name}_v_pred")
    x_rf = noise[0] / (np.cos(times[0]) + np.sin(times[0]))
    for k in range(len(times)):
        np.testing.assert_allclose(1000 * tau[k], data[f"{name}_timesteps_fed"][k], rtol=1e-6)
        x0 = student_program(dtype)(noise[: k + 1], times[: k + 1], cond)
        assert relative((x_rf - x0) / tau[k], v_recorded[k]) < TOLERANCE
        if k + 1 < len(times):
            x_rf = (1 - tau[k + 1]) * x0 + tau[k + 1] * noise[k + 1]


@functools.cache
def experts(dtype):
    """(F, (high-noise parameters, low-noise parameters))."""
    names = settings("rcm_infer.json")
    high, low = (GOLDEN / names[f"i2v_{level}_noise_weights"] for level in ("high", "low"))
    config = golden_config(high.with_name(f"{high.stem}.config.json"), dtype=dtype, time_dtype=dtype)
    params = tuple(golden_params(path, config, dtype) for path in (high, low))
    return velocity(config), jax.tree.map(jnp.asarray, params)


@functools.cache
def experts_program(dtype, kind):
    """(noise, times, cond, boundary) -> sample."""
    F, params = experts(dtype)

    @jax.jit
    def program(noise, times, cond, boundary):
        either = denoiser.by_noise_level(F, F, boundary)
        if kind == "sde":
            return samplers.few_step(either, params, noise, times, cond)
        return samplers.euler(either, params, noise[0], jnp.append(times, 0), cond)

    return program


def image_condition(dtype, noise):
    """Text and image of one video for every sample: 4 channels that mark the first frame, then the image's latents."""
    text, latents = load("rcm_infer_i2v_wan2pt2.npz", dtype, "crossattn_emb", "encoded_latents")
    mask = jnp.zeros((*latents.shape[:-1], 4), dtype).at[:, 0].set(1)
    cond = {"text": text, "y": jnp.concatenate([mask, latents], axis=-1)}
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (noise.shape[1], *a.shape[1:])), cond)


@each_precision
@each_case("rcm_infer_i2v_wan2pt2.npz", r"i2v_n(\d+)_(sde|ode)_boundary([\d.]+)")
def test_image_to_video_with_two_experts(case, dtype):
    file, values = "rcm_infer_i2v_wan2pt2.npz", settings("rcm_infer.json")
    with precision(dtype):
        times = few_times(int(case[1]), values["i2v_sigma_max"], values["mid_t"], dtype)
        noise = script_noise(file, dtype, times)
        cond = image_condition(dtype, noise)
        x = experts_program(dtype, case[2])(noise, times, cond, float(case[3]))
    assert_sample(x, np.load(SAMPLERS / file), case[0], dtype, TOLERANCE_I2V)


@pytest.mark.smoke
@pytest.mark.parametrize(("t", "boundary", "expected"), [(1.5, 0.9, 1.0), (1.4, 0.9, -1.0), (0.0, 0.0, 1.0)])
def test_expert_is_that_of_the_noise_level_and_runs_alone(t, boundary, expected):
    """tan t = 14, 5.8 and 0: tau = 0.93, 0.85 and 0, which is its own boundary."""

    def F(params, x, t, cond):
        return params * x

    def call(t):
        return denoiser.by_noise_level(F, F, boundary)((1.0, -1.0), jnp.ones((2, 3)), jnp.full(2, t), None)

    np.testing.assert_array_equal(jax.jit(call)(t), np.full((2, 3), expected))
    calls = [path for path, eqn in tiny.equations(jax.make_jaxpr(call)(t).jaxpr) if eqn.outvars[0].aval.shape == (2, 3)]
    assert [path[-1:] for path in calls if path] == [("cond",), ("cond",)]  # each product in its own branch

"""The losses and the rollout with the reference's networks: recorded values, and the gradient of every parameter.

In float32 the recorded numbers are met within the suggested tolerances. In float64 they are met to rounding: each
`NAME_f64` is the reference's own run in float64. Gradients were recorded in float32 only, together with their distance
from a float64 run: ours in float64 must be at that very distance.
"""

import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.objectives import DcmConfig, dcm, diffusion, dmd, scm
from rcm_jax.method.objectives.common import sum_squares
from rcm_jax.method.rollout import non_increasing, rollout
from rcm_jax.train.optimizer import OptimizerConfig, make_optimizer
from rcm_jax.train.state import make_learner
from tests import tiny
from tests.conftest import GOLDEN
from tests.tiny import cases, relative, stem
from tests.wan import PRECISIONS, channels_first, channels_last, golden_distillation, precision

pytestmark = pytest.mark.golden

TOLERANCE = 1e-5  # suggested for F, x0, DMD and critic losses in float32
TANGENT = 3e-5  # suggested in float32 for the following
TANGENTS = ("t_F_theta", "g_raw", "g_normalised")
DOUBLE = 1e-13  # float64; reached: 6e-15
DIFFERENCE = 1e-2  # suggested in float32 for TANGENTS made of finite differences, of the float64 run
DIFFERENCE_DOUBLE = 4e-11  # in float64: rounding divided by the step of 1e-4; reached: 4e-12
# Suggested: all together, worst tensor.
GRADIENTS = {"scm": (5e-5, 2e-4), "dcm": (1e-4, 5e-4), "dmd": (1e-4, 5e-4), "critic": (1e-4, 5e-4)}
GRADIENTS_OF_DIFFERENCE = (1e-2, 3e-2)
DERIVATIVES = {"fd0": "jvp", "fd1": "semi", "fd2": "discrete"}

each_precision = pytest.mark.parametrize("dtype", PRECISIONS)


@pytest.fixture(scope="module")
def meta():
    """Constants, cases and measured errors."""
    path = GOLDEN / "rcm_losses/meta.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text())


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    yield from tiny.fast_compilation()


@functools.cache
def load(name: str, dtype: str) -> dict:
    """The arrays of rcm_losses/NAME.npz in that dtype, channels last; times [b, 1] as [b]."""
    arrays = np.load(GOLDEN / f"rcm_losses/{name}.npz")
    return {key: jnp.asarray(ours(arrays[key]), dtype) for key in arrays}


def ours(a):
    """An array of the reference in our layout."""
    if a.ndim > 4:
        return channels_last(a)
    return a[..., 0] if a.ndim > 1 and a.shape[-1] == 1 else a


def assert_recorded(values, data, dtype, case):
    """values {name: [b, ..., c]} are the recorded ones; in float64 they have the float64 run's distance from those."""
    for name, value in values.items():
        value = channels_first(value) if value.ndim > 4 else np.asarray(value)
        if dtype == "float32":
            bound = TANGENT if name in TANGENTS else TOLERANCE
            assert relative(value, data[name].reshape(value.shape)) < bound, name
            continue
        if f"{name}_f64" in data:
            assert relative(value, data[f"{name}_f64"]) < DOUBLE, name
        distance = relative(value, data[name].reshape(value.shape))
        np.testing.assert_allclose(distance, case["measured_fp32_vs_fp64"][name], rtol=1e-4, atol=DOUBLE, err_msg=name)


def distances(grads, recorded, config):
    """(gradient of all parameters together, its distance from the recorded one, that of the worst tensor)."""
    grads = convert.to_reference("wan", jax.tree.map(np.asarray, grads), config, "rcm")
    assert grads.keys() == recorded.keys()
    whole, recorded_whole = (np.concatenate([g[name].ravel() for name in recorded]) for g in (grads, recorded))
    together = relative(recorded_whole, whole)
    return whole, together, max(relative(recorded[name], grads[name]) for name in recorded)


def assert_close_gradients(grads, recorded, config, bounds):
    """grads are the recorded ones: all parameters together, and the worst tensor, within bounds."""
    _, *found = distances(grads, recorded, config)
    assert np.all(np.array(found) < bounds), found


def assert_gradients(grads, path, dtype, config, case):
    """grads are those recorded beside path; in float64 they have the float64 run's distance from those."""
    recorded = load_file(path.with_name(f"{path.stem}.grads.safetensors"))
    if dtype == "float32":
        assert_close_gradients(grads, recorded, config, GRADIENTS[path.stem.split("_")[0]])
    else:
        whole, together, worst = distances(grads, recorded, config)
        measured = case["measured_fp32_vs_fp64"]
        np.testing.assert_allclose(np.linalg.norm(whole), case["grad_global_norm_f64"], rtol=1e-12)
        np.testing.assert_allclose(together, measured["grad_rel_l2"], rtol=1e-4)
        np.testing.assert_allclose(worst, measured["grad_worst_tensor_rel_l2"], rtol=1e-4)


@functools.cache
def velocity_program(dtype):
    """(params, x, t, cond) -> F."""
    return jax.jit(golden_distillation(dtype).F)


@functools.cache
def teacher_program(dtype, guidance):
    """(x, t) -> the teacher's guided F."""
    nets = golden_distillation(dtype)
    F = denoiser.guided(nets.F, guidance)
    return jax.jit(lambda x, t: F(nets.teacher, x, t, (nets.cond, nets.uncond)))


# --- sCM


@functools.cache
def scm_program(dtype, derivative):
    """(x_t, t, F_teacher, r) -> (arrays under the reference's names, metrics, gradients of 100·sum(loss)).

    F and its derivative are those that scm.loss itself computes.
    """
    nets = golden_distillation(dtype)
    form = dict(warmup_form="code", derivative=derivative)

    @jax.jit
    def program(x_t, t, F_T, r):
        def total(params):
            with mock.patch.object(scm, "tangent", wraps=scm.tangent) as tangent:
                loss, metrics = scm.loss(nets.F, params, x_t, t, nets.cond, F_T, r=r, **form)
            _, _, F, dF, _ = tangent.call_args.args
            arrays = {"F_theta": F, "t_F_theta": dF, "loss_per_sample": 100 * loss}
            return 100 * jnp.sum(loss), (arrays, metrics)

        grads, (arrays, metrics) = jax.grad(total, has_aux=True)(nets.student)
        F, dF = arrays["F_theta"], arrays["t_F_theta"]
        g = scm.tangent(x_t, t, F, dF, F_T, r=r, warmup_form="code")
        arrays |= {
            "x0_theta": trigflow.denoise(x_t, F, t),
            "g_raw": g,
            "g_normalised": g / trigflow.expand(jnp.sqrt(sum_squares(g)) + 0.1, g),
        }
        return arrays, metrics, grads

    return program


def scm_inputs(meta, dtype):
    """(x_t, t) of the recorded draws."""
    inputs = load("inputs", dtype)
    distribution = trigflow.LogNormal(meta["p_G"]["p_mean"], meta["p_G"]["p_std"])
    t = distribution.from_normal(inputs["scm_time_normal_z"])
    return trigflow.diffuse(inputs["x0"], inputs["scm_epsilon"], t), t


def run_scm(path, dtype, meta):
    """(arrays under the reference's names, metrics, gradients) of the case that was recorded there."""
    case, derivative = meta["cases"][path.stem], DERIVATIVES[path.stem.split("_")[-1]]
    nets = golden_distillation(dtype)
    x_t, t = scm_inputs(meta, dtype)
    F_T = teacher_program(dtype, meta["teacher_guidance"])(x_t, t)
    arrays, metrics, grads = scm_program(dtype, derivative)(x_t, t, F_T, case["warmup_ratio"])
    arrays |= {
        "time": t,
        "xt": x_t,
        "F_teacher": F_T,
        "F_teacher_cond": velocity_program(dtype)(nets.teacher, x_t, t, nets.cond),
        "F_teacher_uncond": velocity_program(dtype)(nets.teacher, x_t, t, nets.uncond),
        "x0_teacher": trigflow.denoise(x_t, F_T, t),
    }
    return arrays, metrics, grads


@each_precision
@pytest.mark.parametrize("path", cases("rcm_losses/scm_*_fd0.npz"), ids=stem)
def test_scm_step_is_that_of_the_reference(path, dtype, meta):
    data, case = np.load(path), meta["cases"][path.stem]
    with precision(dtype):
        arrays, metrics, grads = run_scm(path, dtype, meta)
        assert_recorded(arrays, data, dtype, case)
        assert_gradients(grads, path, dtype, golden_distillation(dtype).config, case)
    np.testing.assert_array_equal(metrics["nonfinite"], 0)


@each_precision
@pytest.mark.parametrize("path", cases("rcm_losses/scm_*_fd[12].npz"), ids=stem)
def test_scm_step_with_finite_differences_is_that_of_the_reference(path, dtype, meta):
    """Whose float32 run lost half its digits to cancellation: its float64 run is the judge."""
    data = np.load(path)
    with precision(dtype):
        arrays, _, grads = run_scm(path, dtype, meta)
    for name, value in arrays.items():
        if f"{name}_f64" not in data:
            continue
        value = channels_first(value) if value.ndim > 4 else value
        differences = name in (*TANGENTS, "loss_per_sample")
        if dtype == "float64":
            bound = DIFFERENCE_DOUBLE if differences else DOUBLE
        else:
            bound = DIFFERENCE if differences else TOLERANCE
        assert relative(value, data[f"{name}_f64"]) < bound, name
    recorded = load_file(path.with_name(f"{path.stem}.grads_f64run.safetensors"))  # rounded to float32
    bounds = GRADIENTS_OF_DIFFERENCE if dtype == "float32" else (1e-7, 1e-7)
    assert_close_gradients(grads, recorded, golden_distillation(dtype).config, bounds)


@each_precision
def test_a_sample_with_nan_counts_nothing_and_its_update_is_skipped(dtype, meta):
    """The others keep their recorded losses. NaN reaches the gradients, as it did the reference's: 0·NaN is NaN."""
    if "scm_nan_sample" not in meta["cases"]:
        pytest.skip("no NaN sample was recorded")
    case = meta["cases"]["scm_nan_sample"]
    sample, channel, *place = case["nan_position"]
    with precision(dtype):
        nets = golden_distillation(dtype)
        x_t, t = scm_inputs(meta, dtype)
        x_t = x_t.at[sample, *place, channel].set(jnp.nan)
        F_T = teacher_program(dtype, meta["teacher_guidance"])(x_t, t)
        arrays, metrics, grads = scm_program(dtype, "jvp")(x_t, t, F_T, 1.0)  # recorded without a warm-up
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3))
        learner = make_learner(nets.student, optimizer)
        after, _, applied = jax.jit(lambda learner, grads: learner.update(grads, optimizer))(learner, grads)
        assert not applied
        tiny.assert_trees_equal(after, learner)
    np.testing.assert_allclose(arrays["loss_per_sample"], case["loss_per_sample"], rtol=TOLERANCE)  # 0 for this one
    np.testing.assert_array_equal(metrics["nonfinite"], case["nan_mask_g"])


# --- dCM


@functools.cache
def dcm_program(dtype, guidance):
    """(x_t, times) -> (100·loss [b], states that the loss saw, gradients of 100·sum(loss))."""
    nets = golden_distillation(dtype)
    guided, conds = denoiser.guided(nets.F, guidance), (nets.cond, nets.uncond)

    @jax.jit
    def program(x_t, times):
        def total(params):
            x, x0 = [], []  # the teacher's way; what the student makes of its end and of its beginning

            def F(params, state, t, cond):
                velocity = nets.F(params, state, t, cond)
                if not x0:
                    x.append(state)
                x0.append(trigflow.denoise(state, velocity, t))
                return velocity

            def teacher(state, t):
                x.append(state)
                return guided(nets.teacher, state, t, conds)

            loss, _ = dcm.loss(F, params, x_t, times, nets.cond, teacher)
            return 100 * jnp.sum(loss), (100 * loss, {"x": jnp.stack(x), "x0": jnp.stack(x0[::-1])})

        grads, (loss, states) = jax.grad(total, has_aux=True)(nets.student)
        return loss, states, grads

    return program


@each_precision
@pytest.mark.parametrize("path", cases("rcm_losses/dcm_*.npz"), ids=stem)
def test_dcm_step_is_that_of_the_reference(path, dtype, meta):
    data, case = np.load(path), meta["cases"][path.stem]
    steps, skip = case["dcm_total_steps"], case["dcm_skipping_interval_steps"]
    with precision(dtype):
        nets, inputs = golden_distillation(dtype), load("inputs", dtype)
        draws = load(path.stem, dtype)
        times = DcmConfig(steps=steps, skip=skip, shift=meta["dcm_timestep_shift"]).times(draws["dcm_uniform_u"])
        x_t = trigflow.diffuse(inputs["x0"], draws["dcm_epsilon"], times[0])
        loss, states, grads = dcm_program(dtype, meta["teacher_guidance"])(x_t, times)
        arrays = {
            "xt": x_t,
            "x0_pred": states["x0"][0],
            "x0_target": states["x0"][-1],
            "loss_per_sample": loss,
        }
        assert_recorded(arrays, data, dtype, case)
        assert_gradients(grads, path, dtype, nets.config, case)
    np.testing.assert_allclose(times, data["trig_t"].T, rtol=1e-6)
    assert relative(channels_first(states["x"]), data["xk_traj"]) < TOLERANCE


# --- rollout


@functools.cache
def rollout_program(dtype):
    """(noise, times, n) -> the student's sample after n steps; one program for every n."""
    nets = golden_distillation(dtype)
    return jax.jit(lambda noise, times, n: rollout(nets.F, nets.student, noise, times, n, nets.cond))


def simulation(kind, dtype, meta):
    """(noise [steps, b, ...], times [steps, b]) of the recorded draws, or of the fixed times."""
    draws = load("simulation_draws", dtype)
    noise = jnp.concatenate([draws["init_noise"][None], draws["step_noise"]])
    if kind == "random":
        return noise, non_increasing(shifted(meta).from_uniform(draws["step_uniform_u"]))
    middle = jnp.asarray(FIXED, dtype)[:, None]
    return noise, non_increasing(jnp.broadcast_to(middle, (len(FIXED), noise.shape[1])))


FIXED = (1.5, 1.4, 1.0)  # the reference's default mid times


def shifted(meta):
    """p_D."""
    return trigflow.ShiftedUniform(meta["p_D"]["shift"])


def simulated():
    """Names of the recorded rollouts: kind_nK."""
    return sorted(
        key.removesuffix("_t_traj")
        for path in cases("rcm_losses/backward_simulation.npz")
        for key in np.load(path)
        if key.endswith("_t_traj")
    )


@pytest.mark.smoke
@each_precision
@pytest.mark.parametrize("name", simulated())
def test_rollout_passes_through_the_recorded_states(name, dtype, meta):
    """States [n + 1]: the noise, what each step but the last leaves noised again, and the last step's sample."""
    data = np.load(GOLDEN / "rcm_losses/backward_simulation.npz")
    kind, n = name.split("_n")
    n = int(n)
    with precision(dtype):
        noise, times = simulation(kind, dtype, meta)
        clean = [rollout_program(dtype)(noise, times, k) for k in range(1, n + 1)]
        noised = [trigflow.diffuse(clean[k - 1], noise[k], times[k]) for k in range(1, n)]
        states = channels_first(jnp.stack([noise[0], *noised, clean[-1]]))
        if dtype == "float64":
            assert relative(channels_first(clean[-1]), data[f"{name}_x_f64"]) < DOUBLE
    assert relative(channels_first(clean[-1]), data[f"{name}_x"]) < TOLERANCE
    assert relative(states, data[f"{name}_x_traj"]) < TOLERANCE
    # The reference's float32 run starts at a float32 pi/2, 4e-8 off.
    times = np.append(np.asarray(times[:n]).T, np.zeros((len(clean[0]), 1)), axis=1)
    np.testing.assert_allclose(times, data[f"{name}_t_traj"], rtol=0, atol=1e-6 if dtype == "float32" else 5e-8)


# --- DMD and critic


@functools.cache
def dmd_program(dtype):
    """(noise, times, n, x_t, t, F_teacher, F_fake) -> (arrays, gradients of the sum over the batch)."""
    nets = golden_distillation(dtype)

    @jax.jit
    def program(noise, times, n, x_t, t, F_T, F_fake):
        def total(params):
            x0 = rollout(nets.F, params, noise, times, n, nets.cond)
            loss, metrics = dmd.loss(x0, x_t, t, F_T, F_fake)
            return jnp.sum(loss), {"G_x0": x0, "loss_per_sample": loss, "weight_factor": metrics["weight"]}

        grads, arrays = jax.grad(total, has_aux=True)(nets.student)
        return arrays, grads

    return program


@functools.cache
def critic_program(dtype):
    """(x0, x_t, t, eps) -> (loss [b], gradients of its sum)."""
    nets = golden_distillation(dtype)

    @jax.jit
    def program(x0, x_t, t, eps):
        def total(params):
            loss = diffusion.loss(nets.F(params, x_t, t, nets.cond), x0, eps, t)
            return jnp.sum(loss), loss

        grads, loss = jax.grad(total, has_aux=True)(nets.fake_score)
        return loss, grads

    return program


def judged(dtype, meta, n):
    """(arrays under the reference's names, F_fake, eps): a sample of n steps, noised and judged by the fake score."""
    draws, nets = load("simulation_draws", dtype), golden_distillation(dtype)
    x0 = rollout_program(dtype)(*simulation("random", dtype, meta), n)
    t, eps = shifted(meta).from_uniform(draws["D_uniform_u"]), draws["D_epsilon"]
    x_t = trigflow.diffuse(x0, eps, t)
    F_fake = velocity_program(dtype)(nets.fake_score, x_t, t, nets.cond)
    arrays = {"G_x0": x0, "D_time": t, "D_xt": x_t, "x0_theta_fake": trigflow.denoise(x_t, F_fake, t)}
    return arrays, F_fake, eps


@each_precision
@pytest.mark.parametrize("path", cases("rcm_losses/dmd_n*.npz"), ids=stem)
def test_dmd_step_is_that_of_the_reference(path, dtype, meta):
    data, case = np.load(path), meta["cases"][path.stem]
    n = case["num_simulation_steps"]
    with precision(dtype):
        arrays, F_fake, _ = judged(dtype, meta, n)
        x_t, t = arrays["D_xt"], arrays["D_time"]
        F_T = teacher_program(dtype, meta["teacher_guidance"])(x_t, t)
        noise, times = simulation("random", dtype, meta)
        of_loss, grads = dmd_program(dtype)(noise, times, n, x_t, t, F_T, F_fake)
        arrays |= of_loss | {"x0_theta_teacher": trigflow.denoise(x_t, F_T, t)}
        gap = arrays["x0_theta_fake"] - arrays["x0_theta_teacher"]
        arrays["grad"] = gap / trigflow.expand(arrays["weight_factor"], gap)
        assert_recorded(arrays, data, dtype, case)
        assert_gradients(grads, path, dtype, golden_distillation(dtype).config, case)


@each_precision
@pytest.mark.parametrize("path", cases("rcm_losses/critic_n*.npz"), ids=stem)
def test_critic_step_is_that_of_the_reference(path, dtype, meta):
    """Whose loss is ‖x0 − f_fake‖²/s², the same number."""
    data, case = np.load(path), meta["cases"][path.stem]
    with precision(dtype):
        arrays, _, eps = judged(dtype, meta, case["num_simulation_steps"])
        loss, grads = critic_program(dtype)(arrays["G_x0"], arrays["D_xt"], arrays["D_time"], eps)
        assert_recorded(arrays | {"loss_per_sample": loss}, data, dtype, case)
        assert_gradients(grads, path, dtype, golden_distillation(dtype).config, case)

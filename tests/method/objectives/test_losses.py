"""The losses: recorded values of the reference without its networks, and float64 oracles."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method import trigflow
from rcm_jax.method.objectives import diffusion, dmd, scm
from rcm_jax.method.objectives.common import sum_squares
from tests import tiny
from tests.tiny import cases, columns, relative, stem, x64

# The recorded arithmetic around the networks is float64: without the networks we should agree far better than the
# tolerance suggested for an implementation with its own float32 networks (3e-5 for g, 1e-5 for DMD and critic).
FORMULA = 1e-12
# One float32 rounding of G_x0 (the only float32 array in the DMD and critic cases) is 6e-8.
STORED_FLOAT32 = 1e-6


def test_losses_return_one_number_a_sample():
    F, params = tiny.dit()
    x, t, cond = tiny.inputs()
    assert diffusion.loss(x, x, 2 * x, t).shape == (tiny.BATCH,)
    for loss, metrics in (
        jax.eval_shape(lambda: scm.loss(F, params, x, t, cond, 0.5 * x, r=1.0)),
        dmd.loss(x, x, t, 0.5 * x, 0.3 * x),
    ):
        assert loss.shape == (tiny.BATCH,)
        assert {m.shape for m in metrics.values()} == {(tiny.BATCH,)}


# --- sCM, recorded


def forms(path):
    """The warm-up forms that a case shows: both at r = 1, the official HEAD's below."""
    return ("paper", "code") if warmup_of(path) == 1.0 else ("code",)


def recorded_settings(golden) -> dict:
    """The constants of the recorded runs."""
    return json.loads((golden / "rcm_losses/meta.json").read_text())


def warmup_of(path) -> float:
    return float(path.stem.split("warmup")[1].split("_")[0])


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize("path", cases("rcm_losses/scm_*.npz"), ids=stem)
def test_scm_tangent_is_that_of_the_reference_before_and_after_normalisation(path):
    data = np.load(path)
    with x64():
        for form in forms(path):
            g = scm.tangent(
                jnp.asarray(data["xt"]),
                columns(data["time"]),
                jnp.asarray(data["F_theta"]),
                jnp.asarray(data["t_F_theta"]),  # along (c·s·F_T, c·s): the factor c·s is in it, as in ours
                jnp.asarray(data["F_teacher"]),
                r=warmup_of(path),
                warmup_form=form,
            )
            norm = jnp.sqrt(sum_squares(g))
            assert relative(g, data["g_raw"]) < FORMULA
            assert relative(g / (trigflow.expand(norm, g) + 0.1), data["g_normalised"]) < FORMULA


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("rcm_losses/scm_*.npz"), ids=stem)
def test_scm_loss_of_a_network_with_the_recorded_value_and_derivative_is_the_recorded_loss(path):
    """A velocity that is linear in time around the recorded point, so that its jvp is the recorded one."""
    data = np.load(path)
    with x64():
        t = columns(data["time"])
        cs = jnp.cos(t) * jnp.sin(t)
        dF_dt = data["t_F_theta"] / trigflow.expand(cs, data["t_F_theta"])

        def F(params, x, time, cond):
            return params + dF_dt * trigflow.expand(time - t, x)

        args = jnp.asarray(data["xt"]), t, None, jnp.asarray(data["F_teacher"])

        def total(params):
            loss, _ = scm.loss(F, params, *args, r=warmup_of(path), warmup_form="code")
            return jnp.sum(loss), loss

        gradient, loss = jax.grad(total, has_aux=True)(jnp.asarray(data["F_theta"]))
    assert relative(loss, data["loss_scm_per_sample"]) < FORMULA
    assert relative(100 * np.asarray(loss), data["loss_per_sample"]) < FORMULA
    assert relative(gradient, -2 * data["g_normalised"]) < 1e-11  # F − sg F cancels to −g: one digit


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("rcm_losses/scm_*.npz"), ids=stem)
def test_recorded_scm_times_are_the_log_normal_of_the_recorded_draws(path, golden):
    draws = np.load(golden / "rcm_losses/inputs.npz")
    data = np.load(path)
    with x64():
        p_G = trigflow.LogNormal(*recorded_settings(golden)["p_G"].values())
        t = p_G.from_normal(jnp.asarray(draws["scm_time_normal_z"], jnp.float64))
        x_t = trigflow.diffuse(jnp.asarray(draws["x0"], jnp.float64), jnp.asarray(draws["scm_epsilon"]), t[:, 0])
    np.testing.assert_allclose(t, data["time"], rtol=0, atol=FORMULA)
    assert relative(x_t, data["xt"]) < FORMULA


def test_warmup_forms_differ_below_r_1_and_an_unknown_one_is_named():
    x, t, _ = tiny.inputs()
    args = x, t, 0.5 * x, 0.3 * x, 0.1 * x
    paper, code = (scm.tangent(*args, r=0.3, warmup_form=form) for form in ("paper", "code"))
    np.testing.assert_allclose(code - paper, -0.7 * 0.3 * x, rtol=1e-4, atol=1e-5)  # float32 cancellation
    with pytest.raises(ValueError, match="'mine' is none of paper, code"):
        scm.tangent(*args, r=0.3, warmup_form="mine")


# --- sCM, oracle


def analytic(params, x, t, cond):
    """A small non-linear velocity in x [b, 2] and t [b] that has no symmetry."""
    a, b = params
    return jnp.tanh(x @ a + jnp.sin(3 * t)[:, None] * b) + cond[:, None] * x[:, ::-1] ** 2 * jnp.cos(t)[:, None]


def numpy_analytic(params, x, t, cond):
    a, b = (np.asarray(p) for p in params)
    return np.tanh(x @ a + np.sin(3 * t)[:, None] * b) + cond[:, None] * x[:, ::-1] ** 2 * np.cos(t)[:, None]


@pytest.fixture
def problem():
    """(params, x_t, t, cond, F_teacher) in float64."""
    rng = np.random.default_rng(1)
    params = (rng.normal(size=(2, 2)), rng.normal(size=2))
    t = np.array([0.05, 0.5, 1.0, 1.4, np.pi / 2])
    return params, rng.normal(size=(5, 2)), t, rng.normal(size=5), rng.normal(size=(5, 2))


def numpy_target(problem, r, form, h=1e-5):
    """F + g/(‖g‖ + 0.1) and ‖g‖ from equations (4)–(6), the derivative by central differences along the path."""
    params, x, t, cond, F_T = problem
    c, s = np.cos(t)[:, None], np.sin(t)[:, None]
    forward = numpy_analytic(params, x + h * c * s * F_T, t + h * (c * s)[:, 0], cond)
    backward = numpy_analytic(params, x - h * c * s * F_T, t - h * (c * s)[:, 0], cond)
    dF = (forward - backward) / (2 * h)
    F = numpy_analytic(params, x, t, cond)
    r_jvp = 1.0 if form == "code" else r
    root = c if form == "scm" else np.sqrt(1 - r**2 * s**2)
    g = -c * root * (F - F_T) - (r * c * s * x + r_jvp * dF)
    norm = np.linalg.norm(g, axis=1, keepdims=True)
    return F + g / (norm + 0.1), norm[:, 0]


# Central differences with h = 1e-5 in float64: truncation h² ~ 1e-10 and rounding 1e-16/h ~ 1e-11.
DIFFERENCES = 1e-8


@pytest.mark.smoke
@pytest.mark.parametrize("form", scm.WARMUP_FORMS)
@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_scm_agrees_with_equations_4_to_6_by_finite_differences(problem, r, form):
    target, norm = numpy_target(problem, r, form)
    with x64():
        loss, metrics = scm.loss(analytic, *map(as_jax, problem), r=r, warmup_form=form)
    np.testing.assert_allclose(loss, np.sum((numpy_analytic(*problem[:4]) - target) ** 2, 1), atol=DIFFERENCES)
    np.testing.assert_allclose(metrics["tangent_norm"], norm, atol=DIFFERENCES)
    gap = np.linalg.norm(numpy_analytic(*problem[:4]) - problem[4], axis=1)
    np.testing.assert_allclose(metrics["teacher_gap"], gap, atol=1e-12)
    c_df_dt = numpy_target(problem, 1.0, form)[1] / np.sqrt(2)  # whatever the warm-up
    np.testing.assert_allclose(metrics["residual"], c_df_dt, atol=DIFFERENCES)
    np.testing.assert_array_equal(metrics["nonfinite"], 0)


@pytest.mark.parametrize("form", scm.WARMUP_FORMS)
@pytest.mark.parametrize("r", [0.3, 1.0])
def test_scm_gradient_is_that_of_the_loss_with_a_frozen_target(problem, r, form):
    target, _ = numpy_target(problem, r, form)
    with x64():
        params, *rest = map(as_jax, problem)
        ours = jax.grad(lambda p: jnp.sum(scm.loss(analytic, p, *rest, r=r, warmup_form=form)[0]))(params)
        x, t, cond, _ = rest
        frozen = jax.grad(lambda p: jnp.sum((analytic(p, x, t, cond) - target) ** 2))(params)
    for a, b in zip(ours, frozen, strict=True):
        np.testing.assert_allclose(a, b, atol=10 * DIFFERENCES)


def as_jax(x):
    return jax.tree.map(jnp.asarray, x)


def test_scm_warmup_ratio_may_be_traced(problem):
    with x64():
        args = list(map(as_jax, problem))
        traced = jax.jit(lambda r: scm.loss(analytic, *args, r=r)[0])(0.3)
        np.testing.assert_allclose(traced, scm.loss(analytic, *args, r=0.3)[0], rtol=1e-12)


def test_scm_is_finite_in_float32_at_both_ends_of_time():
    F, params = tiny.dit()
    x, _, cond = tiny.inputs(batch=3)
    t = jnp.asarray([0.0, 1e-7, np.pi / 2], jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def total(params):
        return jnp.sum(scm.loss(F, params, x, t, cond, 0.1 * x, r=1.0)[0])

    value, gradient = total(params)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.smoke
def test_a_sample_with_a_nan_tangent_contributes_nothing_to_loss_or_gradient(problem):
    """F_teacher of one sample is NaN: its F is finite, its tangent is not."""
    with x64():
        params, x, t, cond, F_T = map(as_jax, problem)
        broken = F_T.at[2, 0].set(jnp.nan)

        def total(params, F_T, keep):
            loss, metrics = scm.loss(analytic, params, x, t, cond, F_T, r=1.0)
            return jnp.sum(jnp.where(keep, loss, 0.0)), (loss, metrics)

        others = jnp.arange(5) != 2
        gradient, (loss, metrics) = jax.grad(total, has_aux=True)(params, broken, True)
        expected, (clean, _) = jax.grad(total, has_aux=True)(params, F_T, others)
        loss, clean = np.asarray(loss), np.asarray(clean)
    np.testing.assert_array_equal(metrics["nonfinite"], ~np.asarray(others))
    assert loss[2] == 0
    np.testing.assert_allclose(np.delete(loss, 2), np.delete(clean, 2), rtol=1e-12)
    assert all(np.all(np.isfinite(m)) for m in metrics.values())
    for a, b in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_sample_whose_velocity_is_nan_has_loss_0_and_is_counted(problem):
    with x64():
        params, x, t, cond, F_T = map(as_jax, problem)
        loss, metrics = scm.loss(analytic, params, x.at[1].set(jnp.nan), t, cond, F_T, r=1.0)
    np.testing.assert_array_equal(metrics["nonfinite"], [0, 1, 0, 0, 0])
    loss = np.asarray(loss)
    assert loss[1] == 0
    assert np.all(np.isfinite(loss))


# --- one forward


def test_scm_gradient_computes_attention_once_per_block(monkeypatch):
    """Forward kernel, tangent kernel and backward kernel each run once in a block: there is no second forward."""
    counts = kernel_calls(monkeypatch, scm_gradient)
    assert counts == {"forward": 1, "tangent": 1, "backward": 1}


def test_plain_gradient_computes_attention_once_per_block(monkeypatch):
    assert kernel_calls(monkeypatch, plain_gradient) == {"forward": 1, "tangent": 0, "backward": 1}


def kernel_calls(monkeypatch, function):
    """How often each attention kernel stands in the jaxpr of function(), once per scan over blocks."""
    tiny.mark_attention_kernels(monkeypatch)
    return tiny.count_attention_kernels(jax.make_jaxpr(function)())


def scm_gradient():
    F, params = tiny.dit()
    x, t, cond = tiny.inputs()
    return jax.grad(lambda p: jnp.sum(scm.loss(F, p, x, t, cond, 0.1 * x, r=0.5)[0]))(params)


def plain_gradient():
    F, params = tiny.dit()
    x, t, cond = tiny.inputs()
    return jax.grad(lambda p: jnp.sum(F(p, x, t, cond)))(params)


# --- DMD and critic, recorded


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize("path", cases("rcm_losses/dmd_n*.npz"), ids=stem)
def test_dmd_weight_gradient_and_loss_are_those_of_the_reference(path):
    data = np.load(path)
    with x64():
        t, x0 = columns(data["D_time"]), jnp.asarray(data["G_x0"], jnp.float64)
        x_t = jnp.asarray(data["D_xt"])
        teacher, fake = (to_velocity(x_t, data[f"x0_theta_{name}"], t) for name in ("teacher", "fake"))

        def total(x0):
            loss, metrics = dmd.loss(x0, x_t, t, teacher, fake)
            return jnp.sum(loss), (loss, metrics)

        gradient, (loss, metrics) = jax.grad(total, has_aux=True)(x0)
    assert relative(metrics["weight"], data["weight_factor"].ravel()) < STORED_FLOAT32
    assert relative(gradient, 2 * data["grad"]) < STORED_FLOAT32
    assert relative(loss, data["loss_per_sample"]) < STORED_FLOAT32


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("rcm_losses/critic_n*.npz"), ids=stem)
def test_critic_loss_is_that_of_the_reference(path, golden):
    data, draws = np.load(path), np.load(golden / "rcm_losses/simulation_draws.npz")
    with x64():
        t, x0, eps = columns(data["D_time"]), *(jnp.asarray(a, jnp.float64) for a in (data["G_x0"], draws["D_epsilon"]))
        x_t = jnp.asarray(data["D_xt"])
        diffused = trigflow.diffuse(x0, eps, t)
        loss = diffusion.loss(to_velocity(x_t, data["x0_theta_fake"], t), x0, eps, t)
        p_D = trigflow.ShiftedUniform(recorded_settings(golden)["p_D"]["shift"])
        drawn = p_D.from_uniform(jnp.asarray(draws["D_uniform_u"][:, 0], jnp.float64))
    assert relative(diffused, data["D_xt"]) < STORED_FLOAT32
    assert relative(drawn, t) < FORMULA
    # ‖F − v‖² = ‖x0 − f‖²/s²: at the smallest time, s = 0.19, roundings of x0 grow by 1/s.
    assert relative(loss, data["loss_per_sample"]) < 10 * STORED_FLOAT32


def to_velocity(x_t, x0, t):
    """F = (c·x − x0)/s, in float64."""
    t = trigflow.expand(t, x_t)
    return (jnp.cos(t) * x_t - x0) / jnp.sin(t)


def test_dmd_weight_has_a_floor_and_carries_no_gradient():
    x = jnp.ones((2, 3))
    t = jnp.asarray([0.3, 1.2])
    F_T = jnp.stack([(jnp.cos(s) * x[0] - x[0]) / jnp.sin(s) for s in t])  # f_T = x exactly, up to rounding
    loss, metrics = dmd.loss(x, x, t, F_T, F_T)
    np.testing.assert_allclose(metrics["weight"], 1e-5, rtol=1e-5)
    np.testing.assert_array_equal(loss, 0)
    F_fake = F_T + 0.1
    gradient = jax.grad(lambda x0: jnp.sum(dmd.loss(x0, x, t, F_T, F_fake)[0]))(2 * x)
    f_gap = -jnp.sin(t)[:, None] * 0.1 * x  # f_fake − f_T
    np.testing.assert_allclose(gradient, 2 * f_gap / 1.0, rtol=1e-4)  # w = mean|2x − x| = 1


def test_diffusion_loss_is_the_division_by_sine_of_the_official_critic():
    x, t, _ = tiny.inputs()
    with x64():
        x0, eps, t = (jnp.asarray(a, jnp.float64) for a in (x, 0.3 * x[::-1], t))
        x_t = trigflow.diffuse(x0, eps, t)
        F = 0.7 * x_t
        official = sum_squares(x0 - trigflow.denoise(x_t, F, t)) / jnp.sin(t) ** 2
        np.testing.assert_allclose(diffusion.loss(F, x0, eps, t), official, rtol=1e-11)

"""Consistency losses against each other and against the exact velocity of a mixture, in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.data import mixture
from rcm_jax.method import denoiser, trigflow, weighting
from rcm_jax.method.objectives import DcmConfig, ScmConfig, dcm, rf_scm, scm
from rcm_jax.method.objectives.common import sum_squares
from rcm_jax.models.mlp import MLP, MLPConfig
from tests import tiny
from tests.tiny import relative

BATCH = 16
MODES = mixture.standardise(
    mixture.MixtureConfig(
        weights=(1.0, 2.0, 3.0), means=((0.0, 1.0), (1.0, 0.0), (-1.0, -0.5)), stds=(0.2, 0.1, 0.3), labels=(0, 1, 0)
    )
)


@functools.cache
def problem():
    """(F, params, x_t, t, cond, F_T): a small network, and the exact velocity of the mixture."""
    module = MLP(MLPConfig(num_classes=2, dim=16, num_layers=2, freq_dim=8, dtype="float64"))
    rng = np.random.default_rng(0)
    x0, label, _ = mixture.sample(MODES, rng, BATCH)
    t = jnp.asarray(rng.uniform(0.2, 1.4, BATCH))
    x_t = trigflow.diffuse(jnp.asarray(x0, jnp.float64), jnp.asarray(rng.normal(size=x0.shape)), t)
    cond = {"label": jnp.asarray(label)}
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x_t, t, **cond)["params"])
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), shapes)
    F = denoiser.from_trigflow(lambda params, x, t, cond: module.apply({"params": params}, x, t, **cond))
    return F, params, x_t, t, cond, mixture.velocity(MODES, x_t, t, cond["label"])


def teacher_F(x, t):
    return mixture.velocity(MODES, x, t, problem()[4]["label"])


@functools.cache
def scm_gradient(derivative):
    F, params, x_t, t, cond, F_T = problem()

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.sum(scm.loss(F, p, x_t, t, cond, F_T, r=1.0, derivative=derivative)[0]))(params)

    return flat(gradient(params))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("derivative", ["semi", "discrete"])
def test_finite_differences_give_the_gradient_of_the_jvp_to_their_own_error(derivative, monkeypatch):
    """The error is of first order in the step: a hundredth of the step has a hundredth of the error."""
    with tiny.x64():
        found = relative(scm_gradient(derivative), scm_gradient("jvp"))
        monkeypatch.setattr(scm, "STEP", scm.STEP / 100)
        finer = relative(scm_gradient.__wrapped__(derivative), scm_gradient("jvp"))
    assert finer < found < 3e-3
    np.testing.assert_allclose(finer, found / 100, rtol=0.05)


def test_dcm_converges_to_the_gradient_of_scm_as_its_steps_shrink():
    """With df/dt along the teacher's ODE, grad dCM/(h·s) and grad sCM/c, g not limited, become −2·df/dt·∂F/∂params."""
    with tiny.x64():
        F, params, x_t, t, cond, F_T = problem()
        c, s = jnp.cos(t), jnp.sin(t)
        F_fixed, dF = scm.jvp_derivative(F, params, x_t, t, cond, F_T)
        g = scm.tangent(x_t, t, F_fixed, dF, F_T, r=1.0, warmup_form="paper")

        @jax.jit
        def scm_limit(params):
            return jax.grad(lambda p: jnp.sum(sum_squares(F(p, x_t, t, cond) - F_fixed - g) / c))(params)

        @jax.jit
        def dcm_gradient(params, h):
            def total(p):
                return jnp.sum(dcm.loss(F, p, x_t, jnp.stack([t, t - h]), cond, teacher_F)[0] / (h * s))

            return jax.grad(total)(params)

        limit = flat(scm_limit(params))
        errors = [relative(flat(dcm_gradient(params, h)), limit) for h in (1e-2, 1e-3, 1e-4)]
    assert errors[0] < 0.2
    np.testing.assert_allclose(np.divide(errors[1:], errors[:-1]), 0.1, rtol=0.1)


def test_dcm_walks_the_teachers_ode():
    """Where the walk ends, seen through a student that returns what it is asked about; exact for a single Gaussian."""

    def F(params, x, t, cond):
        return (jnp.cos(t)[:, None] * x - x) / jnp.sin(t)[:, None]  # f(x, t) = x

    one = mixture.Mixture(np.ones(1), np.array([[0.3, -0.2]]), np.array([0.4]), np.zeros(1, int))

    def deviation(t):
        return np.sqrt(np.cos(t) ** 2 * 0.4**2 + np.sin(t) ** 2)[:, None]

    with tiny.x64():
        x_t, t = problem()[2:4]
        u, c = t / 2, lambda t: np.cos(t)[:, None]
        exact = c(u) * one.means + deviation(u) / deviation(t) * (x_t - c(t) * one.means)
        errors = []
        for steps in (8, 80):
            times = jnp.linspace(t, u, steps + 1)
            velocity = jax.jit(lambda x, t: mixture.velocity(one, x, t, jnp.zeros(BATCH, int)))
            loss, _ = dcm.loss(F, None, x_t, times, None, velocity)
            gap = jnp.sqrt(sum_squares(x_t - exact))  # f(x_t) = x_t against the walk's end
            errors.append(np.max(np.abs(jnp.sqrt(loss) - gap)))
    assert errors[0] < 0.05
    np.testing.assert_allclose(errors[1], errors[0] / 10, rtol=0.2)  # Euler: first order


def test_the_grid_of_dcm_is_that_many_steps_of_shifted_time():
    config = DcmConfig(steps=10, skip=2, shift=5.0)
    with tiny.x64():
        times = config.times(jnp.array([0.0, 0.999]))
    assert times.shape == (3, 2)
    tau = np.tan(times) / (1 + np.tan(times))
    u = tau / (5 - 4 * tau)  # the shift undone
    np.testing.assert_allclose(u[:, 0], [1.0, 0.9, 0.8], atol=1e-6)
    np.testing.assert_allclose(u[:, 1], np.array([1.0, 0.9, 0.8]) - 0.999 * 0.8, atol=1e-6)


def test_clipping_limits_each_number_and_normalising_the_whole():
    g = jnp.array([[3.0, -4.0], [0.03, 0.04]])
    norm = jnp.array([[5.0], [0.05]])
    np.testing.assert_allclose(scm.LIMITS["clip"](g, norm, 0.1), [[1.0, -1.0], [0.03, 0.04]])
    np.testing.assert_allclose(scm.LIMITS["norm"](g, norm, 0.1), [[3 / 5.1, -4 / 5.1], [0.2, 0.04 / 0.15]], rtol=1e-6)


def test_adaptive_weighting_is_least_where_the_weighted_loss_is_the_dimension():
    """d/dw (e^w/D·L − w) = 0 at e^w = D/L: there every time counts alike."""
    loss = jnp.array([0.1, 1.0, 30.0])
    w = jnp.log(4 / loss)
    slope = jax.grad(lambda w: jnp.sum(weighting.adaptive(loss, w, 4)))(w)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    np.testing.assert_allclose(weighting.adaptive(loss, jnp.zeros(3), 4), loss / 4)


def test_the_adaptive_weight_starts_where_the_loss_is_the_plain_one_and_can_tell_times_apart():
    t = jnp.linspace(0.05, 1.55, 7)
    np.testing.assert_allclose(weighting.log_weight(weighting.init(), t, 64), np.log(64), rtol=1e-6)
    jacobian = jax.jacobian(lambda p: weighting.log_weight(p, t, 64))(weighting.init())
    rows = np.concatenate([jacobian["kernel"], jacobian["bias"][:, None]], axis=1)
    assert np.linalg.matrix_rank(rows) == len(t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ScmConfig(trigflow.LogNormal(0, 1), derivative="jpv"),
            "derivative is 'jpv': it must be one of jvp, semi, discrete",
        ),
        (lambda: ScmConfig(trigflow.LogNormal(0, 1), follows="none"), "follows is 'none': .* teacher, data"),
        (lambda: ScmConfig(trigflow.LogNormal(0, 1), limit="cut"), "limit is 'cut': .* norm, clip, none"),
        (lambda: ScmConfig(trigflow.LogNormal(0, 1), scale=0.0), "scale is 0.0: it must be above 0"),
        (lambda: DcmConfig(steps=4, skip=5), "skip 5 must be below steps, 4"),
    ],
)
def test_what_no_method_has_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rf_scm_is_the_direct_tangent_in_rectified_flow_time():
    """Against its own definition in (x_rf, tau) with a network of that convention, in float64: (5') and (6)."""
    with tiny.x64():
        F, params, x_t, t, cond, F_T = problem()
        x_rf, tau = trigflow.to_rectified_flow(x_t, t)

        def v(x_rf, tau):
            t = jnp.arctan2(tau, 1 - tau)
            x = x_rf * trigflow.expand(jnp.cos(t) + jnp.sin(t), x_rf)
            return trigflow.rectified_flow_velocity(x, F(params, x, t, cond), t)

        v_T = trigflow.rectified_flow_velocity(x_t, F_T, t)
        np.testing.assert_allclose(trigflow.from_rectified_flow(x_t, v_T, t), F_T, rtol=1e-12)
        v_theta, dv = jax.jvp(v, (x_rf, tau), (v_T, jnp.ones_like(tau)))
        for r in (0.0, 0.3, 1.0):
            g = -(v_theta - v_T) - r * trigflow.expand(tau, dv) * dv
            norm = jnp.sqrt(sum_squares(g))
            expected = sum_squares(g / trigflow.expand(norm + 0.1, g))
            values, metrics = rf_scm.loss(F, params, x_t, t, cond, F_T, r=r)
            np.testing.assert_allclose(values, expected, rtol=1e-9)
            np.testing.assert_allclose(metrics["tangent_norm"], norm, rtol=1e-9)


def test_rf_scm_of_a_perfect_consistency_function_has_neither_a_residual_nor_a_loss():
    with tiny.x64():
        F, params, x_t, t, cond, F_T = problem()
        values, _ = rf_scm.loss(F, params, x_t, t, cond, F_T, r=1.0)
        gradient = jax.grad(lambda p: jnp.sum(rf_scm.loss(F, p, x_t, t, cond, F_T, r=1.0)[0]))(params)
        assert np.isfinite(flat(gradient)).all() and np.all(values > 0)
        # f = x0 everywhere: F = (c·x − x0)/s, for a teacher whose data are that one point.
        x0 = jnp.ones_like(x_t)
        point = lambda params, x, t, cond: (jnp.cos(t)[:, None] * x - x0) / jnp.sin(t)[:, None]  # noqa: E731
        values, metrics = rf_scm.loss(point, params, x_t, t, cond, point(params, x_t, t, cond), r=1.0)
        np.testing.assert_allclose(metrics["residual"], 0, atol=1e-12)
        np.testing.assert_allclose(values, 0, atol=1e-20)

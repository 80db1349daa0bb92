"""The Gaussian mixture: its exact velocity against quadrature and the score, its samples, its errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.data.mixture import MixtureConfig, load, log_density, mode_of, sample, standardise, velocity
from tests.tiny import x64

CONFIG = MixtureConfig(
    weights=(3.0, 1.0, 2.0, 0.5),
    means=((2.0, 0.0), (-1.0, 0.5), (-1.5, -2.0), (0.0, 3.0)),
    stds=(0.4, 0.2, 0.3, 0.1),
    labels=(0, 0, 1, 2),
    examples=20_000,
)
MIXTURE = standardise(CONFIG)
NULL = 3


def of_class(label):
    """Normalised weights, means and stds of a class."""
    mask = (MIXTURE.labels == label) | (label == NULL)
    weights = MIXTURE.weights * mask
    return weights / weights.sum(), MIXTURE.means, MIXTURE.stds


def exact(x, t, label):
    """The velocity at float64 inputs."""
    with x64():
        return np.asarray(jax.jit(functools.partial(velocity, MIXTURE))(x, t, label))


def log_marginal(x, t, label):
    """log p_t(x | label) for one x [2], written out."""
    weights, means, stds = of_class(label)
    v = np.cos(t) ** 2 * stds**2 + np.sin(t) ** 2
    return np.log(np.sum(weights / v * np.exp(-np.sum((x - np.cos(t) * means) ** 2, axis=1) / (2 * v))))


@pytest.mark.parametrize("label", [0, 1, NULL])
def test_velocity_is_that_of_the_score(label):
    """Tweedie: E[x0 | x] = (x + s²·score)/c, E[eps | x] = −s·score, the score by central differences."""
    rng = np.random.default_rng(0)
    x, times, h = rng.normal(size=(20, 2)), np.linspace(0.2, 1.4, 20), 1e-5
    F = exact(x, times, np.full(20, label))
    for x_i, t, F_i in zip(x, times, F, strict=True):
        score = [(log_marginal(x_i + d, t, label) - log_marginal(x_i - d, t, label)) / (2 * h) for d in h * np.eye(2)]
        c, s = np.cos(t), np.sin(t)
        x0 = (x_i + s**2 * np.array(score)) / c
        np.testing.assert_allclose(F_i, -c * s * np.array(score) - s * x0, atol=1e-8)


def test_velocity_is_the_mean_of_the_regression_target():
    """E[c·eps − s·x0 | x] by quadrature over x0 on a grid."""
    t, x = 0.7, np.array([0.3, -0.4])
    c, s = np.cos(t), np.sin(t)
    axis = np.linspace(-4, 4, 801)
    x0 = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    eps = (x - c * x0) / s
    log_joint = log_density(MIXTURE, x0) - np.sum(eps**2, axis=1) / 2
    shares = np.exp(log_joint - log_joint.max())
    expected = shares @ (c * eps - s * x0) / shares.sum()
    np.testing.assert_allclose(exact(x[None], np.array([t]), np.array([NULL]))[0], expected, atol=1e-9)


def test_both_ends_are_exact_and_finite_in_float32():
    """At t = 0 F = E[eps] = 0; at pi/2 x says nothing of x0, and F = −E[x0], the mean of the class."""
    x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    F = jax.jit(functools.partial(velocity, MIXTURE))
    for label in range(NULL + 1):
        labels = np.full(8, label)
        np.testing.assert_array_equal(F(x, np.zeros(8, np.float32), labels), 0)
        weights, means, _ = of_class(label)
        end = F(x, np.full(8, np.pi / 2, np.float32), labels)
        np.testing.assert_allclose(end, np.tile(-weights @ means, (8, 1)), atol=1e-6)


def test_float32_is_near_float64_at_every_time_tangents_included():
    rng = np.random.default_rng(0)
    x0, label, _ = sample(MIXTURE, rng, 400)
    t = np.geomspace(1e-5, np.pi / 2, 400).astype(np.float32)
    x = (np.cos(t)[:, None] * x0 + np.sin(t)[:, None] * rng.normal(size=(400, 2))).astype(np.float32)

    def both(dtype):
        inputs = jnp.asarray(x, dtype), jnp.asarray(t, dtype)
        tangents = jax.tree.map(jnp.ones_like, inputs)
        outputs = jax.jit(lambda *at: jax.jvp(lambda x, t: velocity(MIXTURE, x, t, label), *at))(inputs, tangents)
        return [np.asarray(output) for output in outputs]

    low = both(jnp.float32)
    with x64():
        high = both(jnp.float64)
    assert low[0].dtype == jnp.float32
    np.testing.assert_allclose(low[0], high[0], atol=2e-5)
    assert np.all(np.isfinite(low[1]))
    assert np.linalg.norm(low[1] - high[1]) < 1e-4 * np.linalg.norm(high[1])


def test_data_have_mean_0_and_variance_1_and_modes_come_in_their_shares():
    dataset = load(CONFIG)
    x0, label = dataset.train["x0"], dataset.train["cond"]["label"]
    assert (x0.shape, x0.dtype, label.dtype) == ((20_000, 2), np.float32, np.int32)
    np.testing.assert_allclose(x0.mean(axis=0), 0, atol=0.03)  # 4 standard errors
    assert x0.var(axis=0).mean() == pytest.approx(1, abs=0.03)
    assert MIXTURE.weights @ MIXTURE.stds**2 + np.mean(MIXTURE.weights @ MIXTURE.means**2) == pytest.approx(1)
    np.testing.assert_allclose(np.bincount(label) / 20_000, np.array([4, 2, 0.5]) / 6.5, atol=0.015)
    assert (dataset.num_classes, dataset.uncond["label"]) == (3, NULL)
    assert not np.array_equal(dataset.test["x0"][:8], x0[:8])
    np.testing.assert_array_equal(load(CONFIG).train["x0"], x0)


def test_modes_of_samples():
    x0, label, mode = sample(MIXTURE, np.random.default_rng(1), 20_000)
    np.testing.assert_array_equal(MIXTURE.labels[mode], label)
    for k, std in enumerate(MIXTURE.stds):
        group = x0[mode == k] - MIXTURE.means[k]
        assert group.std() == pytest.approx(std, rel=4 / np.sqrt(2 * group.size))
        assert len(group) / 20_000 == pytest.approx(MIXTURE.weights[k], abs=0.015)
    np.testing.assert_array_equal(mode_of(MIXTURE, x0, label), mode)  # they are far apart
    # A point on a mode of another class goes to the nearest of its own.
    assert mode_of(MIXTURE, MIXTURE.means[[0, 0]], np.array([1, NULL])).tolist() == [2, 0]


@pytest.mark.parametrize("label", [None, 0, 2])
def test_densities_integrate_to_1(label):
    axis = np.arange(-3, 3, 0.01)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    assert np.exp(log_density(MIXTURE, points, label)).sum() * 1e-4 == pytest.approx(1, abs=1e-6)


def test_a_data_set_knows_its_velocity():
    x, t, label = jnp.ones((4, 2)), jnp.linspace(0, 1, 4), jnp.arange(4)
    F = load(dataclasses.replace(CONFIG, examples=8)).velocity(None, x, t, {"label": label})
    np.testing.assert_array_equal(F, velocity(MIXTURE, x, t, label))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (1.0, 1.0)}, "one weight, mean, std and label .*'weights': 2, 'means': 4"),
        ({"weights": (1.0, 0.0, 1.0, -2.0)}, r"weights\[1\] is 0.0: it must be above 0"),
        ({"stds": (1.0, 1.0, 1.0, float("nan"))}, r"stds\[3\] is nan: it must be above 0"),
        ({"means": ((0.0, 0.0, 0.0),) * 4}, r"means\[0\] must be tuple\[float, float\]"),
        ({"labels": (0, 0, 1, 3)}, r"0 to C − 1, each class with a mode, got \[0, 0, 1, 3\]"),
        ({"examples": 0}, "examples is 0: it must be from 1"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)

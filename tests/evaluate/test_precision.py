"""What narrow precision costs: the study on a tiny network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.evaluate import precision
from rcm_jax.evaluate.precision import MISMATCH
from rcm_jax.method import trigflow
from rcm_jax.models.wan import Wan
from tests import cosmos, tiny, wan
from tests.tiny import relative

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

SIZES = dict(times=5, repeats=2, grid=(2, 4, 4), tokens=4)
A, B, C = precision.VARIANTS


@pytest.fixture(scope="module")
def result():
    return precision.study(wan.TINY, **SIZES)


def test_errors_have_the_size_of_bfloat16(result):
    tau = result["tau"]
    np.testing.assert_allclose(np.diff(np.log(tau / (1 - tau))), np.log(999 * 49) / 5, rtol=1e-9)
    for errors in (result["rms"], *result["errors"].values()):
        assert list(errors)[:4] == ["F", "dF", "dF in t", "dF in x"]
        for name, values in errors.items():
            assert values.shape == (2, 5) and np.isfinite(values).all() and (name == MISMATCH or (values > 0).all())
    errors = np.array([list(result["errors"][name].values())[:4] for name in (A, B)])
    assert 2**-11 < np.median(errors) < 2**-5  # a bfloat16 is off by up to 2⁻⁹


def test_the_mismatch_is_taken_from_the_first_variant(result):
    errors = result["errors"]
    assert (errors[A][MISMATCH] == 0).all() and (errors[B][MISMATCH] > 0).all()
    bound = (errors[A]["F"] + errors[B]["F"]) * 1.05  # relative to F, and F in bfloat16 is another by a little
    assert (errors[B][MISMATCH] < bound).all()


def test_the_time_embedding_matters_most_in_the_tangent_along_t(result):
    rows = precision.summary(result)
    assert rows[B]["dF in t"] > 1.2 * rows[A]["dF in t"] and rows[B]["dF"] > 1.2 * rows[A]["dF"]
    assert rows[C]["dF in t"] > rows[B]["dF in t"]
    assert rows[A + ", worst"]["F"] == 100 * result["errors"][A]["F"].max() >= rows[A]["F"]


def test_float32_against_itself_has_no_error(monkeypatch):
    monkeypatch.setattr(precision, "VARIANTS", {"float32": ({}, False)})
    errors = precision.study(wan.TINY, **SIZES)["errors"]
    assert list(errors) == ["float32"] and all((values == 0).all() for values in errors["float32"].values())


def test_cosmos_is_studied_with_all_its_layers_at_work():
    result = precision.study(cosmos.TINY, **SIZES)
    errors = result["errors"]
    assert all((values > 0).all() for name in (B, C) for values in errors[name].values())
    assert 2**-11 < np.median(errors[B]["F"]) < 2**-4
    params = precision.weights(cosmos.TINY, jax.random.key(0), 30.0, 8.0)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(params))
    plain = precision.weights(cosmos.TINY, jax.random.key(0), 0.0, 1.0)
    assert relative(params["time_out"]["kernel"], 8 * plain["time_out"]["kernel"]) == 0
    assert relative(params["time_norm"]["scale"], plain["time_norm"]["scale"]) < 1e-3  # slow sinusoids stay


def test_the_tangent_is_the_derivative_along_the_trajectory():
    config = dataclasses.replace(wan.TINY, dtype="float64", time_dtype="float64")
    params, (x, _, cond) = wan.random_params(), wan.inputs(batch=2)
    with wan.precision("float64"):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        x, t, F_teacher = jnp.asarray(x, jnp.float64), jnp.array([0.5, 1.3], jnp.float64), jnp.sin(3.0 * x)
        value, dF, in_t, in_x = precision.measured(config, False, params, x, t, cond, F_teacher)
        F, cs, h = jax.jit(wan.velocity(config)), jnp.cos(t) * jnp.sin(t), 1e-6

        assert relative(value, F(params, x, t, cond)) < 1e-12

        def difference(in_x, in_t):
            step = h * in_x * trigflow.expand(cs, x) * F_teacher, h * in_t * cs
            return (F(params, x + step[0], t + step[1], cond) - F(params, x - step[0], t - step[1], cond)) / (2 * h)

        for tangent, along in ((dF, (1, 1)), (in_t, (0, 1)), (in_x, (1, 0))):
            assert relative(tangent, difference(*along)) < 1e-6


def test_a_rounded_time_is_the_nearest_bfloat16():
    params, (x, _, cond) = wan.random_params(), wan.inputs(batch=2)
    tau = jnp.array([0.98765, 0.9338])
    t = jnp.arctan2(tau, 1 - tau)
    x_rf, _ = trigflow.to_rectified_flow(x, t)
    v = jax.jit(Wan(wan.TINY).apply)({"params": params}, x_rf, jnp.array([988.0, 932.0]), **cond)
    F, *_ = precision.measured(wan.TINY, True, params, x, t, cond, x)
    assert relative(F, trigflow.from_rectified_flow(x, v, t)) < 1e-6


def test_weights_are_initial_values_with_another_time_embedding():
    key = jax.random.key(1)
    before, after = (precision.weights(wan.TINY, key, *factors) for factors in ((0.0, 1.0), (2.0, 8.0)))
    ratio = np.asarray(after["time_in"]["kernel"] / before["time_in"]["kernel"])
    assert relative(ratio[[0, 8]], np.full((2, 24), np.exp(-2.0))) < 1e-6  # frequency 1 of cosines and of sines
    assert relative(ratio[[7, 15]], np.ones((2, 24))) < 1e-6  # the lowest frequencies
    assert relative(after["time_projection"]["kernel"], 8 * before["time_projection"]["kernel"]) == 0
    assert relative(after["patch_in"]["kernel"], before["patch_in"]["kernel"]) == 0


def test_the_picture_shows_both_quantities_of_every_variant(result):
    left, right = precision.draw(result, "title").axes
    assert [line.get_label() for line in left.lines] == [line.get_label() for line in right.lines] == [A, B, C]
    np.testing.assert_allclose(right.lines[1].get_ydata(), precision.mean_square(result["errors"][B]["dF"], 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(smooth=-1.0), "smooth -1.0 must be at least 0 and modulation 8.0 above 0, both finite"),
        (dict(modulation=np.nan), "smooth 30.0 must be at least 0 and modulation nan above 0, both finite"),
        (dict(grid=(1, 3, 4)), "patch 1×2×2 does not divide the 1×3×4 frames, rows and columns"),
        (dict(times=0), r"times 0, repeats 2, grid \(2, 8, 8\) and tokens 4 must be at least 1"),
        (dict(tokens=7), "tokens 7 must be at least 1, and tokens at most the network's 6"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        precision.study(wan.TINY, **dict(tokens=4) | settings)


def test_image_to_video_is_refused():
    with pytest.raises(ValueError, match="takes text-to-video networks, not model_type 'i2v'"):
        precision.study(wan.I2V)

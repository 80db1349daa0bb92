"""What a method may give its networks besides the data: guidance, dropout, normalised parameters, learned weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives import scm
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.steps import DiffusionMethod, diffusion_method, rcm_method
from tests import tiny
from tests.tiny import assert_trees_equal

PARAMS = {"a": jnp.float32(0.3), "b": jnp.float32(-0.2)}
X0 = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)), jnp.float32)
BATCH = {"x0": X0, "cond": {"label": jnp.arange(6) % 3}}
TEACHER = tiny.Teacher({"a": jnp.float32(0.5), "b": jnp.float32(0.1)}, {"label": np.int32(3)})


def student(params, x, t, cond):
    """Sees its guidance and its dropout, where they are given."""
    scale = params["a"] + 0.1 * cond.get("guidance", jnp.zeros(len(x)))
    if "dropout" in cond:
        scale = scale * (cond["dropout"]["key"][:, 0] % 2) / (1 - cond["dropout"]["rate"])
    return scale[:, None] * jnp.sin(x) + params["b"] * t[:, None]


def teacher(params, x, t, cond):
    """Is given neither."""
    assert set(cond) == {"label"}
    return params["a"] * x + (params["b"] * cond["label"] * t)[:, None]


def distillation(normalised=None, **changes):
    config = dataclasses.replace(tiny.rcm_config(), dmd=None, fake_score=None, warmup=0, guidance=1.0, **changes)
    guidance = None if config.guidance_max else config.guidance
    return rcm_method(config, Velocities(student, denoiser.guided(teacher, guidance), student), 1, normalised)


def run(method, params=PARAMS, key=3):
    return jax.jit(method.steps["student"])(method.init(params), TEACHER, BATCH, jax.random.key(key))


def test_guidance_is_drawn_for_each_sample_and_given_to_teacher_and_student():
    method, key = distillation(guidance_max=2.0), jax.random.key(3)
    _, metrics = run(method)
    w = jax.random.uniform(jax.random.fold_in(key, 1001), (6,), minval=1.0, maxval=2.0)
    assert len(set(w.tolist())) == 6
    keys = named_keys(key, "time", "noise")
    t = tiny.rcm_config().consistency.time.sample(keys["time"], (6,))
    x_t = trigflow.diffuse(X0, jax.random.normal(keys["noise"], X0.shape), t)
    F_c, F_u = (teacher(TEACHER.params, x_t, t, {"label": c}) for c in (BATCH["cond"]["label"], jnp.full(6, 3)))
    F_T = F_u + w[:, None] * (F_c - F_u)
    cond = BATCH["cond"] | {"guidance": w}
    _, expected = scm.loss(student, PARAMS, x_t, t, cond, F_T, r=1.0)
    np.testing.assert_allclose(metrics["scm/teacher_gap"], np.mean(expected["teacher_gap"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["scm/tangent_norm"], np.mean(expected["tangent_norm"]), rtol=1e-5)


def test_dropout_is_the_students_alone_and_differs_between_steps_and_samples():
    plain, dropping = distillation(), distillation(dropout=0.5)
    gaps = [float(run(dropping, key=key)[1]["scm/teacher_gap"]) for key in (3, 3, 4)]
    assert gaps[0] == gaps[1] != gaps[2]
    assert gaps[0] != float(run(plain)[1]["scm/teacher_gap"])


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_of_dropout_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match=f"dropout is {rate}: it must be at least 0 and below 1"):
        DiffusionMethod(dropout=rate)


def test_a_step_starts_from_normalised_parameters():
    doubled = jax.tree.map(lambda p: 2 * p, PARAMS)
    state, _ = run(distillation(normalised=lambda params: jax.tree.map(lambda p: 2 * p, params)))
    expected, _ = run(distillation(), doubled)
    assert_trees_equal(state.student, expected.student)


def test_a_teacher_learns_the_weights_of_its_times_from_the_plain_loss_on():
    config = DiffusionMethod(weighting=OptimizerConfig(1e-2, weight_decay=0.0))
    method, plain = diffusion_method(config, student), diffusion_method(DiffusionMethod(), student)
    step = jax.jit(method.steps["diffusion"])
    state, metrics = step(method.init(PARAMS), TEACHER, BATCH, jax.random.key(0))
    assert float(metrics["diffusion/log_weight"]) == 0  # e^0 of a loss that is a mean
    first, _ = jax.jit(plain.steps["diffusion"])(plain.init(PARAMS), TEACHER, BATCH, jax.random.key(0))
    tiny.assert_trees_close(state.student.params, first.student.params, rtol=1e-6, atol=1e-7)
    for key in range(1, 60):
        state, metrics = step(state, TEACHER, BATCH, jax.random.key(key))
    # The weighted loss e^w·L is about 1 at the end: w grows where L is below it.
    loss, weight = float(metrics["diffusion/loss"]) / 5, float(metrics["diffusion/log_weight"])
    assert np.sign(weight) == np.sign(-np.log(loss)) and abs(weight) > 0.02

"""The steps: which network moves when, one forward each, and updates that are skipped whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method import trigflow
from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives import DiffusionConfig, Given, dmd, scm
from rcm_jax.method.trigflow import LogNormal
from rcm_jax.train import steps
from rcm_jax.train.averages import power_ema_beta, power_ema_exponent
from tests import tiny
from tests.tiny import assert_trees_close, assert_trees_equal, rcm_config

# The claims do not depend on XLA's optimisations, and compiling takes half the time without them.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)


def batch(sample=None):
    """sample: what the second one is instead."""
    values = {k: jax.tree.map(lambda a: jnp.asarray(a[: tiny.BATCH]), v) for k, v in tiny.arrays().items()}
    return values if sample is None else values | {"x0": values["x0"].at[1].set(sample)}


@functools.cache
def method():
    F, _ = tiny.dit()
    return tiny.distillation(F)


@functools.cache
def compiled(phase):
    if phase == "diffusion":
        return jax.jit(tiny.pretraining(tiny.dit()[0]).steps[phase])
    return jax.jit(method().steps[phase])


def start(step=7, phase="student"):
    """A state whose networks differ from each other."""
    F, params = tiny.dit()
    chosen = tiny.pretraining(F) if phase == "diffusion" else method()
    state = chosen.init(params)
    state = state.replace(step=jnp.int32(step), ema=tiny.perturbed(params, 4, 0.02))
    if state.fake_score is not None:
        fake = state.fake_score.replace(params=tiny.perturbed(params, 5, 0.02))
        state = state.replace(fake_score=fake)
    return state


def teacher():
    return tiny.teacher(tiny.perturbed(tiny.dit()[1], 6, 0.02))


def step(phase, state=None, data=None):
    state = start(phase=phase) if state is None else state
    return compiled(phase)(state, teacher(), batch() if data is None else data, jax.random.key(0))


def differs(a, b):
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_every_network_starts_from_the_same_parameters_in_buffers_of_its_own():
    _, params = tiny.dit()
    state = method().init(params)
    for tree in (state.student.params, state.ema, state.fake_score.params):
        assert_trees_equal(tree, params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size > 1]
    assert len(pointers) == len(set(pointers))


@pytest.mark.smoke
def test_student_phase_moves_student_and_average_and_leaves_the_fake_score():
    before = start()
    after, metrics = step("student", before)
    assert after.step == 8
    assert after.student.updates == 1
    assert differs(after.student.params, before.student.params)
    assert_trees_equal(after.fake_score, before.fake_score)
    assert metrics["student/skipped"] == 0
    assert {"scm/loss", "scm/tangent_norm", "dmd/loss", "dmd/weight", "student/grad_norm"} <= set(metrics)


def test_average_is_the_power_ema_of_the_update_count_not_of_the_step():
    before = start(step=7)
    before = before.replace(student=before.student.replace(updates=jnp.int32(3)))
    after, _ = step("student", before)
    beta = float(power_ema_beta(3, power_ema_exponent(0.1)))
    expected = jax.tree.map(lambda e, p: beta * e + (1 - beta) * p, before.ema, after.student.params)
    assert_trees_close(after.ema, expected, rtol=1e-5, atol=1e-6)


def test_critic_phase_moves_the_fake_score_alone():
    before = start()
    after, metrics = step("critic", before)
    assert after.step == 8
    assert differs(after.fake_score.params, before.fake_score.params)
    assert after.fake_score.updates == 1
    assert_trees_equal((after.student, after.ema), (before.student, before.ema))
    told = {"loss", "nonfinite", "grad_norm", "skipped", "learning_rate"}
    assert set(metrics) == {f"critic/{name}" for name in told} | {"watched", "data/nonfinite"}


def test_warmup_phase_has_no_dmd():
    _, metrics = step("warmup", start(step=2))
    assert not [name for name in metrics if name.startswith("dmd")]


def test_first_warmup_step_has_no_tangent_but_the_gap_to_the_teacher():
    """r = 0 at step 0: g = −c·(F − F_T)."""
    state = start(step=0)
    _, metrics = step("warmup", state)
    assert 0 < metrics["scm/tangent_norm"] <= metrics["scm/teacher_gap"]


@pytest.mark.smoke
@pytest.mark.parametrize("phase", ["diffusion", "warmup", "student"])
def test_an_update_with_a_gradient_that_is_not_finite_leaves_the_state_and_counts_as_skipped(phase):
    before = start(phase=phase)
    after, metrics = step(phase, before, batch(3e38))  # a sample whose F is not finite
    assert metrics["student/skipped"] == 1 and not np.all(metrics["watched"]["gradients"]["student"])
    assert after.step == before.step + 1
    assert_trees_equal(after.replace(step=before.step), before)


@pytest.mark.parametrize("phase", ["diffusion", "warmup", "student", "critic"])
def test_a_sample_that_is_not_finite_costs_itself_and_not_the_update(phase):
    network = "critic" if phase == "critic" else "student"
    after, metrics = step(phase, data=batch(jnp.nan))
    assert metrics[f"{network}/skipped"] == 0 and np.all(metrics["watched"]["gradients"][network])
    for flags in ("data", "examples"):
        assert metrics["watched"][flags].tolist() == [0.0, 1.0] + [0.0] * (tiny.BATCH - 2)
    assert_trees_equal(after, step(phase, data=batch(jnp.inf))[0])
    whole, _ = step(phase)
    moved = (lambda state: state.fake_score.params) if phase == "critic" else (lambda state: state.student.params)
    assert differs(moved(after), moved(whole))


def test_the_gradient_is_that_of_the_finite_samples():
    F, _ = tiny.dit()
    state, data = start(phase="diffusion"), batch()
    objective = DiffusionConfig(LogNormal(-0.2, 1.2))

    @jax.jit
    @jax.grad
    def expected(params):
        term = objective.term(Given(Velocities(F, F, F), params, None, tiny.teacher(None), data, jax.random.key(0)))
        return jnp.sum(jnp.delete(term.loss, 1)) / tiny.BATCH

    _, metrics = step("diffusion", state, batch(jnp.nan))
    grad = expected(state.student.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grad)))
    np.testing.assert_allclose(metrics["student/grad_norm"], norm, rtol=1e-5)


def test_an_update_by_no_sample_is_skipped():
    before = start(phase="diffusion")
    after, metrics = step("diffusion", before, batch() | {"x0": jnp.full_like(batch()["x0"], jnp.nan)})
    assert metrics["student/skipped"] == 1 and metrics["student/grad_norm"] == 0
    assert_trees_equal(after.replace(step=before.step), before)


def test_a_critic_update_with_a_gradient_that_is_not_finite_is_skipped():
    before = start()
    broken = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan), before.student.params)
    before = before.replace(student=before.student.replace(params=broken))
    after, metrics = step("critic", before)
    assert metrics["critic/skipped"] == 1
    assert_trees_equal(after.replace(step=before.step), before)


def test_without_dmd_the_student_phase_is_scm_alone():
    F, _ = tiny.dit()
    method = tiny.distillation(F, dmd=None)
    assert "critic" not in {method.phase(i) for i in range(40)}
    _, metrics = jax.eval_shape(method.steps["student"], start(), teacher(), batch(), jax.random.key(0))
    assert not [name for name in metrics if name.startswith("dmd")]


def test_steps_depend_on_the_key_and_on_nothing_else():
    one, _ = compiled("student")(start(), teacher(), batch(), jax.random.key(0))
    same, _ = compiled("student")(start(), teacher(), batch(), jax.random.key(0))
    other, _ = compiled("student")(start(), teacher(), batch(), jax.random.key(1))
    assert_trees_equal(one, same)
    assert differs(one.student.params, other.student.params)


def test_scm_metrics_of_a_warmup_step_are_those_of_the_loss_on_its_draws():
    """The step is the loss at t ~ p_G with the ramp r = i/H and the guided teacher."""
    config, (F, _) = rcm_config(), tiny.dit()
    state, data = start(step=1), batch()
    _, metrics = step("warmup", state, data)
    keys = named_keys(jax.random.key(0), "time", "noise", "dmd")
    t = config.consistency.time.sample(keys["time"], (tiny.BATCH,))
    x_t = trigflow.diffuse(data["x0"], jax.random.normal(keys["noise"], data["x0"].shape), t)

    @jax.jit
    def expected():
        cond, params = data["cond"], teacher().params
        F_u = F(params, x_t, t, {"label": jnp.full(tiny.BATCH, tiny.CLASSES)})
        F_T = F_u + config.guidance * (F(params, x_t, t, cond) - F_u)
        return scm.loss(F, state.student.params, x_t, t, cond, F_T, r=1 / config.warmup)[1]

    for name, value in expected().items():
        np.testing.assert_allclose(metrics[f"scm/{name}"], jnp.mean(value), rtol=1e-4, atol=1e-6, err_msg=name)


def test_dmd_metrics_of_a_student_step_are_those_of_the_loss_on_its_draws():
    """At the student's rollout, with the guided teacher and the fake score without guidance."""
    config, (F, _) = rcm_config(), tiny.dit()
    state, data = start(), batch()
    _, metrics = step("student", state, data)
    own = named_keys(jax.random.key(0), "time", "noise", "samples")["samples"]
    keys = named_keys(own, "rollout", "time", "noise")

    @jax.jit
    def expected():
        cond, params = data["cond"], teacher().params
        given = Given(Velocities(F, F, F), state.student.params, None, None, data, None)
        x0 = config.dmd.rollout(given, keys["rollout"])
        t = config.dmd.time.sample(keys["time"], (tiny.BATCH,))
        x_t = trigflow.diffuse(x0, jax.random.normal(keys["noise"], x0.shape), t)
        F_u = F(params, x_t, t, {"label": jnp.full(tiny.BATCH, tiny.CLASSES)})
        F_T = F_u + config.guidance * (F(params, x_t, t, cond) - F_u)
        return dmd.loss(x0, x_t, t, F_T, F(state.fake_score.params, x_t, t, cond))[1]

    for name, value in expected().items():
        np.testing.assert_allclose(metrics[f"dmd/{name}"], jnp.mean(value), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("phase", "loss", "parts"), [("student", "scm", 1), ("student", "scm", 4), ("diffusion", "diffusion", 1)]
)
def test_a_sample_that_is_not_finite_is_known_by_its_place_in_the_batch(phase, loss, parts):
    F, _ = tiny.dit()
    data = jax.tree.map(lambda x: jnp.concatenate([x] * 2), batch())
    data["x0"] = data["x0"].at[5].set(jnp.nan)
    made = tiny.pretraining(F, parts) if phase == "diffusion" else tiny.distillation(F, parts)
    _, metrics = jax.jit(made.steps[phase])(start(phase=phase), teacher(), data, jax.random.key(0))
    assert metrics["watched"]["examples"].tolist() == [float(i == 5) for i in range(2 * tiny.BATCH)]
    assert float(metrics[f"{loss}/nonfinite"]) == pytest.approx(1 / (2 * tiny.BATCH))


def test_rollout_lengths_take_every_value_up_to_the_largest_and_the_last_carries_the_gradient():
    """F = −params makes f = c·x + s·params: the gradient in params is sin of the time of the last step."""
    config, data = tiny.dmd_config(max_rollout=3), batch()

    def F(params, x, t, cond):
        return jnp.full_like(x, -params)

    def last_time(key):
        return jax.grad(lambda p: jnp.mean(config.rollout(Given(Velocities(F, F, F), p, None, None, data, key), key)))(
            0.0
        )

    gradients = np.asarray(jax.jit(jax.vmap(last_time))(jax.random.split(jax.random.key(0), 40)))
    one_step = np.isclose(gradients, 1.0, atol=1e-6)  # sin(pi/2)
    assert 5 <= one_step.sum() <= 25  # a third of 40, within three standard deviations
    assert np.all(gradients <= 1 + 1e-6)


def test_an_accumulated_gradient_is_the_mean_of_those_of_the_parts():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=5), jnp.float32)}
    rows = {"x": jnp.asarray(rng.normal(size=(12, 5)), jnp.float32), "cond": {"y": jnp.arange(12.0)}}
    key = jax.random.key(3)

    def loss(params, batch, key):
        seen = batch["x"] + jax.random.normal(key, batch["x"].shape)
        loss_b = jnp.square(seen @ params["w"] - batch["cond"]["y"])
        return jnp.mean(loss_b), {"loss": loss_b, "pair": (jnp.sum(loss_b), len(loss_b))}

    grads, metrics = jax.jit(functools.partial(steps.accumulated_grad, loss, parts=3))(params, rows, key)
    parts = [jax.tree.map(lambda x, i=i: x[i::3], rows) for i in range(3)]
    each = [jax.grad(loss, has_aux=True)(params, part, jax.random.fold_in(key, i)) for i, part in enumerate(parts)]
    assert_trees_close(grads, {"w": sum(g["w"] for g, _ in each) / 3}, rtol=1e-5, atol=1e-5)
    in_order = jnp.stack([m["loss"] for _, m in each], axis=1).reshape(-1)
    assert_trees_close(metrics["loss"], in_order, rtol=1e-5, atol=1e-5)
    total, count = metrics["pair"]
    assert count == 12 and float(total) == pytest.approx(float(jnp.sum(metrics["loss"])), rel=1e-5)
    whole = jax.grad(loss, has_aux=True)(params, rows, key)
    assert_trees_equal(steps.accumulated_grad(loss, params, rows, key, parts=1), whole)


@pytest.mark.parametrize("phase", ["student", "probe", "diffusion"])
def test_a_step_in_parts_needs_the_memory_of_a_part(phase):
    """And has the same metrics."""
    F, _ = tiny.dit()
    state, rows = start(phase=phase), jax.tree.map(lambda x: jnp.concatenate([x] * 8), batch())

    def program(parts):
        made = tiny.pretraining(F, parts) if phase == "diffusion" else tiny.distillation(F, parts)
        step = jax.jit(made.probe if phase == "probe" else made.steps[phase])
        lowered = step.lower(state, teacher(), rows, jax.random.key(0))
        return jax.tree.map(lambda x: x.shape, lowered.out_info), lowered.compile().memory_analysis()

    (shapes, one), (divided, eight) = program(1), program(8)
    assert shapes == divided
    assert eight.temp_size_in_bytes < 0.35 * one.temp_size_in_bytes  # a gradient is there twice


def test_named_keys_differ_from_each_other():
    keys = named_keys(jax.random.key(0), "a", "b", "c")
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys.values()}) == 3


# --- one forward

CALLS = {
    # sCM: one forward with tangent, backward; guided teacher: one forward of 2b.
    "warmup": {"forward": 2, "tangent": 1, "backward": 1},
    # and DMD: rollout loop and its last step, teacher and fake score; backward through the last step.
    "student": {"forward": 6, "tangent": 1, "backward": 2},
    # rollout loop and last step; fake score and its backward.
    "critic": {"forward": 3, "tangent": 0, "backward": 1},
}


@pytest.mark.parametrize("phase", CALLS)
def test_no_step_runs_a_network_twice(monkeypatch, phase):
    """Calls of the attention kernels in the whole step, per block: the sCM loss adds no second student forward."""
    tiny.mark_attention_kernels(monkeypatch)

    def fresh(*args):  # a trace of the same function with unmarked kernels may be cached
        return method().steps[phase](*args)

    closed = jax.make_jaxpr(fresh)(start(), teacher(), batch(), jax.random.key(0))
    assert tiny.count_attention_kernels(closed) == CALLS[phase]

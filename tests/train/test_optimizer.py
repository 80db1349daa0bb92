"""AdamW without a first moment, learning rates and the power EMA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rcm_jax.train.averages import power_ema_beta, power_ema_exponent
from rcm_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from rcm_jax.train.steps import rcm_phase, student_updates
from tests.tiny import assert_trees_close, dmd_config, rcm_config, x64

CONSTANT = OptimizerConfig(learning_rate=1e-2, b1=0.0, b2=0.99, weight_decay=0.1, warmup_steps=0)


def parameters():
    return {"w": jax.random.normal(jax.random.key(0), (5, 3)), "b": jnp.linspace(-1.0, 1.0, 3)}


def run(optimizer, steps):
    """Parameters after some steps on gradients that change in size and sign from step to step."""
    params = parameters()
    state = optimizer.init(params)
    for i in range(steps):
        keys = jax.random.split(jax.random.key(i + 1), 2)
        scale = (1 + i % 5) ** 3
        grads = {name: scale * jax.random.normal(k, params[name].shape) for name, k in zip("wb", keys, strict=True)}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.smoke
def test_without_first_moment_the_numbers_are_those_of_adamw_with_b1_0():
    ours, _ = run(make_optimizer(CONSTANT), 25)
    adamw, _ = run(optax.adamw(1e-2, b1=0.0, b2=0.99, eps=1e-8, weight_decay=0.1), 25)
    assert_trees_close(ours, adamw, rtol=1e-6, atol=1e-7)  # a few float32 roundings over 25 steps


def test_with_first_moment_the_numbers_are_those_of_adamw():
    config = OptimizerConfig(learning_rate=1e-2, b1=0.9, b2=0.99, weight_decay=0.1, warmup_steps=0)
    ours, _ = run(make_optimizer(config), 25)
    adamw, _ = run(optax.adamw(1e-2, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1), 25)
    assert_trees_close(ours, adamw, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("b2", [0.99, 0.999])
def test_radam_is_the_recurrence_of_its_paper_with_eps_after_the_bias_correction(b2):
    """In float64, through the first updates, which are of the first moment alone, and on."""
    rng, b1, eps, rate, decay = np.random.default_rng(0), 0.9, 1e-3, 1e-2, 0.1
    gradients, start = rng.normal(size=(20, 5)), rng.normal(size=5)
    params, mean, square, rho_max, rectified = start, 0.0, 0.0, 2 / (1 - b2) - 1, []
    for n, g in enumerate(gradients, 1):
        mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
        step, rho = mean / (1 - b1**n), rho_max - 2 * n * b2**n / (1 - b2**n)
        rectified.append(rho > 5)
        if rho > 5:
            r = np.sqrt((rho - 4) * (rho - 2) * rho_max / ((rho_max - 4) * (rho_max - 2) * rho))
            correction = np.sqrt(1 - b2**n)  # torch: correction / (np.sqrt(square) + eps)
            step = r * step / (np.sqrt(square) / correction + eps)
        params = params - rate * (step + decay * params)
    assert rectified == [False] * 5 + [True] * 15
    config = OptimizerConfig(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, warmup_steps=0, kind="radam")
    with x64():
        ours, optimizer = jnp.asarray(start), make_optimizer(config)
        state = optimizer.init(ours)
        for g in gradients:
            updates, state = optimizer.update(jnp.asarray(g), state, ours)
            ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, params, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(kind="sgd"), "kind is 'sgd': it must be one of adamw, radam"),
        (dict(decay_after=-1), "decay_after is -1"),
        (dict(decay_after=70, decay_steps=500), "decay_steps 500 .* decay_after 70"),
    ],
)
def test_configs_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)


@pytest.mark.parametrize(("b1", "slots"), [(0.0, 1), (0.9, 2)])
def test_state_has_one_slot_a_parameter_without_first_moment(b1, slots):
    params = parameters()
    state = make_optimizer(OptimizerConfig(learning_rate=1e-3, b1=b1)).init(params)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(a.shape for a in arrays) == sorted(p.shape for p in jax.tree.leaves(params) for _ in range(slots))
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if not leaf.ndim) <= 2  # counts of steps


def test_learning_rate_rises_linearly_from_the_first_update_and_stays():
    rate = schedule(OptimizerConfig(learning_rate=2e-3, warmup_steps=4))
    rates = [float(rate(n)) for n in (0, 1, 3, 4, 1000)]
    np.testing.assert_allclose(rates, [5e-4, 1e-3, 2e-3, 2e-3, 2e-3], rtol=1e-6)


def test_cosine_falls_to_the_final_scale_and_stays_there():
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, decay_steps=110, final_scale=0.1))
    # 10: peak; 60: half way, the mean of 1 and 0.1; 110 and later: 0.1.
    np.testing.assert_allclose([float(rate(n)) for n in (10, 60, 110, 500)], [1, 0.55, 0.1, 0.1], rtol=1e-6)


@pytest.mark.golden
def test_root_decay_is_that_of_edm2_whose_warmup_is_one_update_behind(golden):
    """Of updates of 1,000 images, for which all of its counts are whole."""
    cases = json.loads((golden / "edm2_unet/phema.json").read_text())["learning_rate_schedule"]
    warm = late = 0
    for case in cases:
        n, warmup = case["cur_nimg"] / 1000, round(case["rampup_Mimg"] * 1000)
        decay_after = round(case["ref_batches"] * case["batch_size"] / 1000)
        with x64():
            rate = schedule(OptimizerConfig(case["ref_lr"], warmup_steps=warmup, decay_after=decay_after))
            ours = float(rate(jnp.asarray(n))), float(rate(jnp.asarray(n - 1)))
        if n == 0:
            assert case["lr"] == 0 and ours[0] == pytest.approx(case["ref_lr"] / warmup, rel=1e-12)
        elif n < warmup:
            assert ours[1] == pytest.approx(case["lr"], rel=1e-12) and ours[0] > case["lr"]
            warm += 1
        else:
            assert ours[0] == pytest.approx(case["lr"], rel=1e-12)
            late += case["lr"] < case["ref_lr"]
    assert warm and late


def test_decay_that_ends_within_the_warmup_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"decay_steps 5 .*warmup_steps 10"):
        schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, decay_steps=5))


@pytest.mark.golden
@pytest.mark.smoke
def test_ema_exponent_is_the_root_of_the_reference(golden):
    rates = json.loads((golden / "ema/ema.json").read_text())["rates"]
    assert rates
    for std, entry in rates.items():
        # The suggested tolerance of roots.
        assert power_ema_exponent(float(std)) == pytest.approx(entry["ema_exp_coefficient"], rel=1e-9, abs=0)


@pytest.mark.golden
def test_ema_beta_is_that_of_the_reference(golden):
    rates = json.loads((golden / "ema/ema.json").read_text())["rates"]
    tested = 0
    for std, entry in rates.items():
        gamma = power_ema_exponent(float(std))
        for shift, betas in entry["beta"].items():
            n = np.array([int(i) for i in betas]) + int(shift.removeprefix("iteration_shift="))
            beta = power_ema_beta(n, gamma)
            assert beta.dtype == jnp.float32
            np.testing.assert_allclose(beta, list(betas.values()), rtol=0, atol=1e-6)
            tested += 1
    assert tested
    assert power_ema_beta(0, 6.94) == 0


@pytest.mark.golden
def test_ema_update_is_that_of_the_reference(golden):
    data = np.load(golden / "ema/ema_update.npz")
    args = {"w": data["ema_weight_before"]}, {"w": data["src_weight"]}
    after = optax.incremental_update(*args[::-1], 1 - float(data["beta"]))["w"]
    np.testing.assert_allclose(after, data["ema_weight_after"], rtol=1e-6, atol=1e-7)  # float32
    with x64():
        args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), args)
        after = optax.incremental_update(*args[::-1], 1 - float(data["beta"]))["w"]
    np.testing.assert_allclose(after, data["ema_weight_after"], rtol=1e-6, atol=1e-7)  # the recorded one is float32


@pytest.mark.parametrize("std", [0.0, -0.1, 0.28, 1.0])
def test_ema_width_without_a_root_is_refused_with_its_number(std):
    with pytest.raises(ValueError, match=str(std)):
        power_ema_exponent(std)


def test_ema_width_is_the_relative_deviation_of_the_average_in_time():
    """EDM2's definition: weights of the average have a standard deviation of std·n after n updates."""
    gamma, n = power_ema_exponent(0.1), 4000
    beta = np.asarray(power_ema_beta(np.arange(n), gamma), np.float64)
    weights = (1 - beta) * np.append(np.cumprod(beta[:0:-1])[::-1], 1.0)
    position = (np.arange(n) + 1) / n
    mean = np.sum(weights * position)
    assert np.sum(weights) == pytest.approx(1, abs=1e-6)
    assert np.sqrt(np.sum(weights * (position - mean) ** 2)) == pytest.approx(0.1, rel=2e-3)  # 1/n effects


@pytest.mark.golden
@pytest.mark.smoke
def test_phases_alternate_as_in_the_reference(golden):
    schedules = json.loads((golden / "ema/ema.json").read_text())["phase_schedule"]
    assert schedules
    for schedule_ in schedules:
        dmd = dmd_config(update_freq=schedule_["student_update_freq"]) if schedule_["loss_scale_dmd"] else None
        config = rcm_config(warmup=schedule_["tangent_warmup"], dmd=dmd)
        phases = [rcm_phase(config, i) for i in schedule_["iteration"]]
        assert [phase != "critic" for phase in phases] == schedule_["is_student_phase"], schedule_


@pytest.mark.golden
def test_updates_of_the_student_count_the_effective_iteration_of_the_reference(golden):
    """With DMD: before iteration i the student has had effective_iteration(i) updates, + 1 after a student phase."""
    schedules = json.loads((golden / "ema/ema.json").read_text())["phase_schedule"]
    tested = 0
    for schedule_ in schedules:
        if schedule_["loss_scale_dmd"] == 0:
            continue  # the reference counts critic phases there that do not run; we count updates
        dmd = dmd_config(update_freq=schedule_["student_update_freq"])
        config = rcm_config(warmup=schedule_["tangent_warmup"], dmd=dmd)
        effective = zip(
            schedule_["iteration"],
            schedule_["effective_iteration"],
            schedule_["effective_iteration_fake"],
            strict=True,
        )
        for i, student, fake in effective:
            critics = [rcm_phase(config, j) == "critic" for j in range(i + 1)]
            # What cycles the length of rollouts: updates before this one.
            before = student_updates(config, i)
            assert (i - before if critics[i] else before) == (fake if critics[i] else student), (schedule_, i)
            # Both count updates done up to and with this iteration, from −1.
            assert critics.count(False) - 1 == student, (schedule_, i)
            assert critics.count(True) - 1 == fake, (schedule_, i)
            tested += 1
    assert tested


def test_dmd_joins_after_the_warmup_and_warmup_0_starts_with_one_scm_step():
    assert [rcm_phase(rcm_config(warmup=2, dmd=dmd_config(update_freq=3)), i) for i in range(9)] == [
        *("warmup", "warmup", "warmup"),
        *("critic", "critic", "student"),
        *("critic", "critic", "student"),
    ]
    assert [rcm_phase(rcm_config(warmup=0, dmd=dmd_config(update_freq=2)), i) for i in range(4)] == [
        *("warmup", "critic", "student", "critic")
    ]


def test_without_dmd_there_is_no_critic_phase():
    assert "critic" not in {rcm_phase(rcm_config(warmup=3, dmd=None), i) for i in range(50)}


def test_constants_of_a_network_do_not_decay():
    params = {"time": {"freqs": jnp.ones(3), "kernel": jnp.ones((2, 2))}}
    optimizer = make_optimizer(OptimizerConfig(0.1, weight_decay=0.5, warmup_steps=0))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["time"]["freqs"], 0)
    np.testing.assert_allclose(updates["time"]["kernel"], -0.05, rtol=1e-6)

"""Samplers and networks of an experiment."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, wan_1_3b, wan_14b
from rcm_jax.method import denoiser, samplers
from rcm_jax.models import cosmos, wan
from rcm_jax.run import experiment, pipeline, program
from rcm_jax.run.experiment import SamplingConfig
from rcm_jax.train.steps import rcm_phase, student_updates
from rcm_jax.util.config import revise, to_mapping
from tests import tiny
from tests.tiny import relative

SAMPLING = SamplingConfig(sigma_max=80.0, mid_times=((), (1.1,), (1.3, 0.8)), teacher_shift=3.0)
SHAPE = (2, 3)
UNCOND = {"label": np.int32(9)}


def F(params, x, t, cond):
    return jnp.tanh(params * x + t[:, None, None]) + 0.1 * cond["label"][:, None, None]


COND = {"label": jnp.arange(6)}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_student_sampler_is_few_step_sampling_with_the_configured_times(steps):
    key = jax.random.key(0)
    sampled = program.student_sampler(F, SAMPLING, steps)(0.5, key, np.arange(6), COND, SHAPE)
    noise = jnp.stack([samplers.unit_noise(jax.random.fold_in(key, k), np.arange(6), SHAPE) for k in range(steps)])
    times = samplers.student_times(80.0, SAMPLING.mid_times[steps - 1])
    np.testing.assert_allclose(sampled, samplers.few_step(F, 0.5, noise, times, COND), rtol=1e-5, atol=1e-5)


@pytest.mark.smoke
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in():
    for sampler in (
        program.student_sampler(F, SAMPLING, 3),
        program.teacher_sampler(denoiser.guided(F, 2.0), UNCOND, SAMPLING, 4),
    ):
        key, ids = jax.random.key(0), np.arange(6)
        whole = sampler(0.5, key, ids, COND, SHAPE)
        halves = [
            sampler(0.5, key, part, {"label": part}, SHAPE) for part in (ids[:2], ids[2:])
        ]  # labels are the ids here
        np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-6, atol=1e-6)  # vectorised differently


def test_teacher_sampler_is_the_guided_euler_solution_from_the_first_noise_of_the_student():
    key = jax.random.key(0)
    sampled = program.teacher_sampler(denoiser.guided(F, 2.0), UNCOND, SAMPLING, 4)(0.5, key, np.arange(6), COND, SHAPE)
    noise = samplers.unit_noise(jax.random.fold_in(key, 0), np.arange(6), SHAPE)
    guided = denoiser.guided(F, 2.0)
    expected = samplers.euler(guided, 0.5, noise, samplers.ode_times(4, 80.0, 3.0), (COND, UNCOND))
    np.testing.assert_allclose(sampled, expected, rtol=1e-5, atol=1e-5)
    unguided = program.teacher_sampler(denoiser.guided(F, 1.0), UNCOND, SAMPLING, 4)(
        0.5, key, np.arange(6), COND, SHAPE
    )
    assert relative(unguided, sampled) > 1e-2


@pytest.mark.parametrize("steps", [0, 4])
def test_steps_without_mid_times_are_refused_with_both_numbers(steps):
    with pytest.raises(ValueError, match=rf"{steps} steps asked for.*1 to 3"):
        program.student_sampler(F, SAMPLING, steps)


def test_mid_times_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match=r"mid_times\[1\] is for 2 steps: it needs 1 times, got \[1.1, 1.0\]"):
        dataclasses.replace(SAMPLING, mid_times=((), (1.1, 1.0)))


def test_more_student_updates_than_the_learning_rate_lasts_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"train\.steps 4403 makes 1801 updates, .*decay_steps = 1800"):
        revise(digits.EXPERIMENT, {"train.steps": 4403})
    with pytest.raises(ValueError, match=r"pretrain\.train\.steps 5000 makes 5000 updates, .*decay_steps = 4999"):
        optimizer = {"pretrain.method.optimizer.decay_steps": 4999, "pretrain.method.optimizer.final_scale": 0.0}
        revise(digits.EXPERIMENT, optimizer)
    longer = revise(digits.EXPERIMENT, {"train.steps": 4403, "rcm.student.final_scale": 0.1})
    assert longer.train.steps == 4403


def test_student_updates_are_counted_as_the_phases_make_them():
    for dmd in (None, tiny.dmd_config()):
        config = tiny.rcm_config(warmup=5, dmd=dmd)
        for steps in (0, 3, 5, 6, 7, 8, 9, 20):
            phases = [rcm_phase(config, i) for i in range(steps)]
            assert student_updates(config, steps) == len(phases) - phases.count("critic")


# --- what an experiment is made of


def wan_values(**changes):
    return to_mapping(wan_1_3b.tiny(wan_1_3b.EXPERIMENT)) | changes


@pytest.mark.smoke
def test_a_mapping_is_what_its_keys_make_it():
    values = wan_values()
    assert experiment.from_mapping(values) == wan_1_3b.tiny(wan_1_3b.EXPERIMENT)
    network = {key: values[key] for key in ("model", "parametrization", "time_scale")}
    assert type(experiment.from_mapping(network)) is experiment.Predictor
    theirs = experiment.from_mapping(to_mapping(digits.EXPERIMENT.pretraining))
    assert type(theirs) is experiment.Pretraining and theirs == digits.EXPERIMENT.pretraining


def test_a_network_predicts_what_its_record_says_unless_the_config_does():
    assert experiment.Predictor(wan.PUBLISHED["wan-1.3b"]).time_scale == 1000.0
    assert experiment.Predictor(cosmos.PUBLISHED["cosmos-2b"]).parametrization == "rectified_flow"
    assert experiment.Predictor(cosmos.PUBLISHED["cosmos-2b"], "edm", 0.25).parametrization == "edm"
    with pytest.raises(ValueError, match="parametrization is 'none': it must be one of '', trigflow, rect"):
        experiment.Predictor(cosmos.PUBLISHED["cosmos-2b"], "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_dtype": "int8"}, r"config.teacher_dtype is 'int8': it must be one of float32, bfloat16"),
        ({"data": {"kind": "latents", "shape": ()}}, r"config.data.shape is \(\): it must be one value or more"),
        ({"data": {"kind": "cifar"}}, r"config.data.kind is 'cifar'; it must be one of digits, latents"),
        ({"rcm": {"dmd": None}}, r"config.rcm: dmd and fake_score belong together"),
        ({"rcm": {"consistency": {}, "weighting": {}, "dmd": {"scale": 2.0}}}, None),
        ({"rcm": {"consistency": {}}}, r"config.rcm.consistency.kind is None; it must be one of scm, rf_scm, dcm"),
    ],
)
def test_experiments_that_cannot_be_are_refused(changes, message):
    values = wan_values(**changes)
    if message is None:
        assert experiment.from_mapping(values).rcm.name == "DMD"
        return
    if message.startswith("config.rcm.consistency"):
        values["rcm"] = {"consistency": {"scale": 1.0}}
    with pytest.raises(ValueError, match=message):
        experiment.from_mapping(values)


@pytest.mark.parametrize("config", [digits, wan_1_3b, wan_14b])
def test_every_config_says_how_attention_is_computed(config):
    assert config.EXPERIMENT.model.attention == "auto"
    with pytest.raises(ValueError, match=r"attention is 'tritn': it must be one of auto, .*triton, pallas_tpu"):
        revise(config.EXPERIMENT, {"model.attention": "tritn"})


def test_a_network_for_classes_takes_no_data_without_and_the_other_way_round():
    run = wan_1_3b.tiny(wan_1_3b.EXPERIMENT)
    latents = program.zeros(run, run.data.shape)
    with pytest.raises(ValueError, match=r"config.model.num_classes is None, but the data have 3 classes"):
        program.assemble(run, tiny.one_device(), dataclasses.replace(latents, num_classes=3))
    with pytest.raises(ValueError, match=r"config.model.num_classes is 10, but the data have None classes"):
        program.assemble(digits.EXPERIMENT, tiny.one_device(), latents)


def test_solvers_are_known_by_name():
    with pytest.raises(ValueError, match="teacher_solver is 'trapezoid': it must be one of euler, unipc, heun"):
        dataclasses.replace(SAMPLING, teacher_solver="trapezoid")
    key, unipc = jax.random.key(0), dataclasses.replace(SAMPLING, teacher_solver="unipc")
    sampled = program.teacher_sampler(denoiser.guided(F, 2.0), UNCOND, unipc, 4)(0.5, key, np.arange(6), COND, SHAPE)
    noise = samplers.unit_noise(jax.random.fold_in(key, 0), np.arange(6), SHAPE)
    times = samplers.ode_times(4, 80.0, 3.0)
    expected = samplers.unipc(denoiser.guided(F, 2.0), 0.5, noise, times, (COND, UNCOND))
    np.testing.assert_allclose(sampled, expected, rtol=1e-5, atol=1e-5)


def test_parameters_in_another_dtype_take_the_place_of_the_first():
    params = {"a": jnp.arange(4.0), "b": jnp.ones(3)}
    same = pipeline.as_dtype(params, "float32")
    assert all(same[name] is params[name] for name in params)
    narrow = pipeline.as_dtype(params, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(narrow["a"], [0, 1, 2, 3])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_teacher_may_start_at_another_noise_level():
    key = jax.random.key(0)
    further = dataclasses.replace(SAMPLING, teacher_sigma_max=5000.0)
    sampled = program.teacher_sampler(denoiser.guided(F, 2.0), UNCOND, further, 4)(0.5, key, np.arange(6), COND, SHAPE)
    noise = samplers.unit_noise(jax.random.fold_in(key, 0), np.arange(6), SHAPE)
    times = samplers.ode_times(4, 5000.0, SAMPLING.teacher_shift)
    expected = samplers.euler(denoiser.guided(F, 2.0), 0.5, noise, times, (COND, UNCOND))
    np.testing.assert_allclose(sampled, expected, rtol=1e-5, atol=1e-6)

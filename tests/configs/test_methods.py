"""Every method by name, in every training config: an experiment that traces, phase by phase."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cosmos_0_6b, cosmos_2b, cosmos_14b, digits, methods, mixture, wan_1_3b, wan_14b
from rcm_jax.method import denoiser
from rcm_jax.run import experiment
from rcm_jax.train.steps import rcm_method, rcm_phase, student_updates
from rcm_jax.util.config import revise
from tests import tiny

MODULES = (digits, mixture, wan_1_3b, wan_14b, cosmos_0_6b, cosmos_2b, cosmos_14b)
CONFIGS = {module.__name__.split(".")[-1]: module for module in MODULES}
PHASES = {  # and the metrics by which their losses are known
    "rcm": {"scm", "dmd", "critic"},
    "rcm_adaptive": {"scm", "dmd", "critic", "weighting"},
    "scm": {"scm"},
    "scm_semi": {"scm"},
    "scm_discrete": {"scm"},
    "scm_adaptive": {"scm", "weighting"},
    "sct": {"scm"},
    "rf_scm": {"rf_scm"},
    "rf_rcm": {"rf_scm", "dmd", "critic"},
    "dcm": {"dcm"},
    "dcm_dmd": {"dcm", "dmd", "critic"},
    "dmd": {"dmd", "critic"},
    "dmd_fixed": {"dmd", "critic"},
}


def run_of(module, variant):
    """As the scripts get it: through the flags' ConfigDict."""
    return experiment.from_mapping(CONFIGS[module].get_config(variant).to_dict())


@pytest.mark.parametrize("module", CONFIGS)
@pytest.mark.parametrize("name", PHASES)
def test_every_method_is_an_experiment_in_every_config(module, name):
    run = run_of(module, name)
    assert {"dmd"} <= PHASES[name] if run.rcm.dmd else "dmd" not in PHASES[name]
    assert run.rcm.needs_teacher == (name != "sct")
    rcm = run_of(module, "rcm")
    updates = [student_updates(e.rcm, e.train.steps) for e in (run, rcm)]
    if (module, name) != ("digits", "sct"):  # from nothing: it takes more
        assert updates[0] == updates[1]


@pytest.mark.parametrize("module", CONFIGS)
def test_smoke_makes_every_method_short(module):
    for name in PHASES:
        run = run_of(module, f"smoke,{name}")
        assert run == run_of(module, f"{name},smoke")
        assert run.train.steps <= 40 and run.sampling.report_samples == 200
        whole = run_of(module, name).rcm
        phases = {rcm_phase(run.rcm, i) for i in range(run.train.steps)}
        assert phases == {rcm_phase(whole, i) for i in range(2000)}  # all of them have their turn
        if run.pretrain:
            assert run.pretrain.train.steps == run.pretrain.method.optimizer.decay_steps == 40


def test_the_table_of_methods_is_the_one_tested():
    assert methods.METHODS.keys() == PHASES.keys()
    for name in PHASES:
        assert name in methods.__doc__


@pytest.mark.parametrize("name", PHASES)
def test_every_method_trains_by_its_losses_alone(name):
    """Traced on a tiny network: what the phases of the first iterations report."""
    config = run_of("digits", name).rcm
    F, params = tiny.dit()
    method = rcm_method(config, denoiser.Velocities(F, denoiser.guided(F, 2.0), F))
    state = jax.eval_shape(method.init, params)
    batch = jax.tree.map(lambda a: jnp.asarray(a[: tiny.BATCH]), tiny.arrays())
    teacher = tiny.teacher(None if name == "sct" else params)
    phases = {method.phase(i) for i in (0, config.warmup, config.warmup + 1, config.warmup + 3)}
    seen = set()
    for phase in phases:
        after, metrics = jax.eval_shape(method.steps[phase], state, teacher, batch, jax.random.key(0))
        assert jax.tree.structure(after) == jax.tree.structure(state)
        seen |= {metric.split("/")[0] for metric in metrics}
    assert seen - {"student", "watched", "data"} == PHASES[name]
    assert (method.probe is not None) == ("scm" in PHASES[name] and config.consistency.derivative == "jvp")


def test_the_adaptive_weighting_learns_with_the_student():
    config = tiny.rcm_config(dmd=None, warmup=0, weighting=tiny.OPTIMIZER)
    F, params = tiny.dit()
    method = rcm_method(config, denoiser.Velocities(F, denoiser.guided(F, 2.0), F))
    batch = jax.tree.map(lambda a: jnp.asarray(a[: tiny.BATCH]), tiny.arrays())
    state = method.init(params)
    after, metrics = jax.jit(method.steps["student"])(state, tiny.teacher(params), batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["scm/log_weight"], np.log(batch["x0"][0].size), rtol=1e-6)  # at first
    assert metrics["scm/loss"] < 1  # where e^w/D·L − w falls as w grows
    assert after.weighting.params["bias"] > 0
    assert after.weighting.updates == after.student.updates == 1
    assert np.any(after.weighting.params["kernel"] != 0)
    batch["x0"] = batch["x0"].at[0].set(3e38)
    skipped, metrics = jax.jit(method.steps["student"])(after, tiny.teacher(params), batch, jax.random.key(0))
    assert metrics["student/skipped"] == metrics["weighting/skipped"] == 1
    tiny.assert_trees_equal(skipped.weighting, after.weighting)


@pytest.mark.parametrize("module", CONFIGS)
def test_the_door_for_flags_changes_nothing(module):
    assert run_of(module, "") == CONFIGS[module].EXPERIMENT


def test_variants_are_known_whatever_their_case():
    assert run_of("wan_1_3b", "TINY, dCM") == run_of("wan_1_3b", "tiny,dcm")


@pytest.mark.parametrize("variant", ["scn", "tiny"])
def test_an_unknown_variant_is_refused_with_the_known_ones(variant):
    with pytest.raises(ValueError, match=rf"variant '{variant}' is none of .*scm, "):
        digits.get_config(variant)


def test_the_phases_around_the_end_of_the_warm_up():
    """At i = H the student has its first turn, still without DMD (the official code adds it there)."""
    config = tiny.rcm_config(warmup=4)
    phases = [rcm_phase(config, i) for i in range(12)]
    assert phases == ["warmup"] * 5 + ["critic", "critic", "student"] * 2 + ["critic"]
    assert [rcm_phase(tiny.rcm_config(warmup=0), i) for i in range(4)] == ["warmup", "critic", "critic", "student"]


def test_dcm_with_dmd_warms_up_as_rcm_does():
    rcm, dcm_dmd = run_of("wan_1_3b", "rcm"), run_of("wan_1_3b", "dcm_dmd")
    assert dcm_dmd.rcm.warmup == rcm.rcm.warmup == 1000
    assert dcm_dmd.train == rcm.train


@pytest.mark.parametrize("module", CONFIGS)
def test_a_recipe_has_the_updates_of_its_config_each_stage_from_the_one_before(module):
    run = CONFIGS[module].EXPERIMENT
    stages = methods.stages(run, "staged")
    assert list(stages) == ["1_dcm", "2_scm", "3_rcm"]
    assert [stage.rcm.name for stage in stages.values()] == ["dCM", "sCM", "rCM"]
    updates = sum(student_updates(stage.rcm, stage.train.steps) for stage in stages.values())
    assert abs(updates - student_updates(run.rcm, run.train.steps)) <= 2
    assert all(stage.rcm.warmup == 0 for stage in stages.values())


def test_a_fake_score_of_its_own_is_for_the_stages_that_have_one():
    stages = methods.stages(revise(digits.EXPERIMENT, {"fake_start": "other"}), "staged")
    assert [stage.fake_start for stage in stages.values()] == ["", "", "other"]


def test_a_recipe_that_is_none_or_of_another_method_is_refused():
    with pytest.raises(ValueError, match="recipe 'stage' is none of staged"):
        methods.stages(digits.EXPERIMENT, "stage")
    with pytest.raises(ValueError, match="this one is of sCM: name no method"):
        methods.stages(methods.scm(digits.EXPERIMENT), "staged")


def test_pure_dmd_begins_with_dmd():
    config = run_of("digits", "dmd").rcm
    assert [rcm_phase(config, i) for i in range(4)] == ["student", "critic", "critic", "student"]


def test_a_variant_comes_before_the_method_in_whatever_order_they_are_named():
    one, other = (run_of("wan_1_3b", variant) for variant in ("tiny,dcm", "dcm,tiny"))
    assert one == other
    with pytest.raises(ValueError, match="variant 'scm,dmd' names 2 methods, scm, dmd: choose one"):
        digits.get_config("scm,dmd")

"""The sCM paper's systems: its tables in the configs, and each trained in small."""

import math

import jax
import pytest

from configs import cifar10, imagenet64, imagenet512
from rcm_jax import data
from rcm_jax.models import init
from rcm_jax.run import pipeline, workdir
from rcm_jax.run.experiment import Experiment, Pretraining, from_mapping
from rcm_jax.train.metrics import read_metrics
from rcm_jax.util.config import revise
from tests import tiny

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

# Much less to compile: one level, and attention in plain JAX.
SHALLOW = {"model.channel_mult": (1,), "model.attn_resolutions": (8, 16), "model.attention": "reference"}
LN2 = math.log(2)  # of sigma_data = 1/2, for ours is 1


def run_of(module, variant) -> Experiment:
    return from_mapping(module.get_config(variant).to_dict())


# Appendix G, Tables 4 and 5: learning rate of the students; dropout of teacher, sCD and sCT; steps of the teacher, of
# both; width of the teacher's average.
ROWS = [
    (imagenet64, "s", 1e-4, (0.0, 0.0, 0.45), 1_048_000, (400_000, 400_000), 0.075),
    (imagenet64, "m", 9e-5, (0.1, 0.0, 0.45), 1_486_000, (400_000, 400_000), 0.06),
    (imagenet64, "l", 8e-5, (0.1, 0.0, 0.45), 761_000, (400_000, 400_000), 0.04),
    (imagenet64, "xl", 7e-5, (0.1, 0.0, 0.45), 540_000, (400_000, 400_000), 0.04),
    (imagenet512, "s", 1e-4, (0.0, 0.0, 0.25), 1_048_000, (200_000, 100_000), 0.025),
    (imagenet512, "m", 9e-5, (0.1, 0.1, 0.35), 1_048_000, (200_000, 100_000), 0.03),
    (imagenet512, "l", 8e-5, (0.1, 0.1, 0.35), 696_000, (200_000, 100_000), 0.015),
    (imagenet512, "xl", 7e-5, (0.1, 0.1, 0.35), 598_000, (200_000, 100_000), 0.02),
    (imagenet512, "xxl", 6.5e-5, (0.1, 0.1, 0.35), 376_000, (200_000, 100_000), 0.015),
]


@pytest.mark.parametrize(("module", "size", "rate", "dropout", "teacher_steps", "steps", "ema"), ROWS)
def test_the_columns_of_the_papers_tables(module, size, rate, dropout, teacher_steps, steps, ema):
    scd, sct = (run_of(module, f"{size},{way}") for way in ("scd", "sct"))
    channels = {"s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}[size]
    teacher = scd.pretrain.method
    for run in (scd, sct):
        assert run.model.model_channels == channels and run.model.double_norm
        assert run.rcm.student.learning_rate == pytest.approx(rate) and run.rcm.warmup == 10_000
        adam = run.rcm.student
        assert (adam.b1, adam.b2, adam.eps, adam.weight_decay) == (0.9, 0.99, 1e-11, 0)
        assert adam.decay_after == (35_000 if module is imagenet64 else 70_000)
        assert run.train.batch_size == run.pretrain.train.batch_size == 2048
        mean = -1.0 if module is imagenet64 else -0.8
        assert (run.rcm.consistency.time.mean, run.rcm.consistency.time.std) == (pytest.approx(mean + LN2), 1.6)
        assert run.rcm.consistency.tangent_constant == pytest.approx(0.1 / 0.5) and run.rcm.ema_std == 0.05
        assert run.sampling.sigma_max == 160 and run.sampling.mid_times == ((), (1.1,))
    assert teacher.optimizer.learning_rate == pytest.approx(100 * rate)
    assert (teacher.dropout, scd.rcm.dropout, sct.rcm.dropout) == dropout
    assert (scd.pretrain.train.steps, (scd.train.steps, sct.train.steps)) == (teacher_steps, steps)
    assert module.SIZES[size].ema == ema
    given = (1.0, 2.0) if module is imagenet512 else (1.0, None)
    assert (scd.rcm.guidance, scd.rcm.guidance_max) == given and sct.rcm.guidance_max is None
    assert sct.rcm.consistency.follows == "data" and scd.rcm.consistency.follows == "teacher"


def test_cifar10_is_the_papers():
    scd, sct, teacher = (run_of(cifar10, way) for way in ("scd", "sct", "teacher"))
    assert type(teacher) is Pretraining
    for run in (scd, sct):
        adam = run.rcm.student
        assert (adam.kind, adam.learning_rate, adam.b1, adam.b2, adam.eps) == ("radam", 1e-4, 0.9, 0.99, 1e-8)
        assert (run.rcm.consistency.time.mean, run.rcm.consistency.time.std) == (pytest.approx(-1 + LN2), 1.4)
        assert (run.train.batch_size, run.rcm.ema_half_life) == (512, 500_000)
    assert (teacher.pretrain.method.dropout, scd.rcm.dropout, sct.rcm.dropout) == (0.13, 0.0, 0.20)
    assert teacher.sampling.teacher_times()[0] == pytest.approx(math.atan(160))
    # EDM's DDPM++ has 55.7 million parameters; scale and shift for every block make it a little more.
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tiny.abstract_params(init, scd.model)))
    assert 55.7e6 < count < 63e6


@pytest.mark.parametrize(
    ("module", "way"), [(cifar10, "sct"), pytest.param(imagenet512, "scd", marks=pytest.mark.slow)]
)
def test_each_trains_in_small(module, way, tmp_path):
    """A teacher with dropout and learned weights, then the student; on the digits and on noise as latents."""
    run = revise(
        run_of(module, f"tiny,{way}"), SHALLOW | {"train.sample_every": 100, "pretrain.train.sample_every": 100}
    )
    trained = pipeline.train(run, tmp_path / "run")
    rows = read_metrics(trained.folder)
    assert {"scm/loss", "scm/log_weight", "weighting/grad_norm"} <= set().union(*rows)
    assert not any(row.get("student/skipped") for row in rows)
    assert all(value is not None for row in rows for value in row.values())
    if module is cifar10:
        assert data.load(run.data).sample_shape == (16, 16, 1)
        assert (trained.folder / "samples/00000006.png").exists()


def test_a_teacher_alone_is_one_that_a_student_starts_from(tmp_path):
    short = SHALLOW | {"pretrain.train.steps": 2, "pretrain.train.sample_every": 100}
    teacher = revise(run_of(imagenet64, "tiny,teacher"), short)
    state = pipeline.train_teacher(teacher, tmp_path / "teacher")
    assert int(state.step) == 2 and len(state.tracks) == 1
    assert (
        workdir.check_teacher(revise(run_of(imagenet64, "tiny,scd"), SHALLOW | {"teacher": str(tmp_path / "teacher")}))
        == 2
    )


def test_a_teacher_alone_takes_a_config_that_makes_one():
    with pytest.raises(ValueError, match="no pretraining"):
        from configs import wan_1_3b

        wan_1_3b.get_config("teacher")

"""From the command line to one experiment: every key can be set, also those that are None and the kind of a group."""

import subprocess
import sys

from tests.scripts.conftest import ROOT

PRINT = """
import sys
sys.path.insert(0, "scripts")
import common
CONFIG = common.config_flag()
common.run(lambda: print(common.experiment(CONFIG)))
"""


def printed(*flags) -> str:
    """The experiment of those flags, as it prints itself."""
    done = subprocess.run([sys.executable, "-c", PRINT, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kinds_of_groups_keys_that_are_none_and_groups_left_out_can_be_set():
    run = printed(
        "--config=digits:RCM",
        "--config.rcm.consistency.kind=dcm",
        "--config.rcm.consistency.skip=2",
        "--config.sampling.teacher_sigma_max=40",
        "--config.sampling.mid_times=((),(0.8,))",
        "--config.rcm.weighting.learning_rate=0.01",
        "--config.rcm.student.kind=radam",
        "--config.rcm.ema_half_life=500000",
        "--config.rcm.ema_tracks=(0.1,)",
    )
    assert "consistency=DcmConfig(steps=48, skip=2, shift=5.0, scale=100.0)" in run  # nothing of sCM's is left
    assert "teacher_sigma_max=40.0" in run and "mid_times=((), (0.8,))" in run
    assert "weighting=OptimizerConfig(learning_rate=0.01" in run and "seed=0" in run
    assert "student=OptimizerConfig(learning_rate=0.0004," in run and "kind='radam'" in run  # all else is kept
    assert "ema_half_life=500000" in run and "ema_tracks=(0.1,)" in run


def test_a_group_can_be_left_out_and_configs_are_found_by_their_names():
    run = printed(
        "--config=mixture.py", "--config.rcm.dmd={}", "--config.rcm.fake_score={}", "--config.train.steps=4000"
    )
    assert "dmd=None" in run and "fake_score=None" in run


def test_synthetic_data_keep_the_shape_of_those_they_stand_for():
    run = printed("--config=wan_1_3b.py:tiny", "--config.data.kind=synthetic", "--config.data.examples=8")
    assert "data=SyntheticConfig(shape=(2, 4, 6, 4), conditions=(), num_classes=None, examples=8, seed=0)" in run

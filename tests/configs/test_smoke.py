"""Training by the configs of the real runs, at tiny sizes, on latents on disk."""

import importlib
import pathlib
import re

import jax
import numpy as np
import pytest

from rcm_jax.models import NETWORKS
from rcm_jax.run import pipeline, workdir
from rcm_jax.run.experiment import Predictor, from_mapping
from rcm_jax.train.metrics import read_metrics
from rcm_jax.util.config import kind_of, revise
from tests import cosmos, tiny, wan

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
# wan_1_3b is trained by its script in tests/scripts, digits and mixture have runs of their own.
# Those of image to video in tests/run/test_image_to_video.py.
CONFIGS = sorted({path.stem for path in FOLDER.glob("*_*b.py") if not re.search("i2v|v2w", path.stem)} - {"wan_1_3b"})
TINY = {"cosmos": cosmos, "wan": wan}


def test_every_real_config_is_tested():
    assert {"cosmos_0_6b", "cosmos_2b", "cosmos_14b", "wan_14b", "wan2_2_t2v_a14b"} == set(CONFIGS)


# Tiny, the configs of a family are one program: all but one are left to those who have time.
SLOW = ("cosmos_0_6b", "cosmos_14b", "wan_14b", "wan2_2_t2v_a14b")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CONFIGS])
def test_a_few_steps_of_a_real_config_from_converted_weights(name, tmp_path):
    """Student and critic, in bfloat16 and with everything computed again, as the real runs."""
    run, rng = importlib.import_module(f"configs.{name}").get_config("tiny").to_dict(), np.random.default_rng(0)
    run = from_mapping(run)
    path = tiny.write_latents(tmp_path / "latents", rng.normal(size=(16, *run.data.shape)), rng.normal(size=(16, 6, 8)))
    params = TINY[kind_of(NETWORKS, run.model)].random_params()
    workdir.write_converted(tmp_path / "teacher", Predictor(run.model), jax.tree.map(np.asarray, params))
    # The last step has DMD.
    changes = {"data.path": path, "teacher": str(tmp_path / "teacher"), "train.steps": run.rcm.warmup + 3}
    rows = read_metrics(pipeline.train(revise(run, changes), tmp_path / "run").folder)
    assert {"scm/loss", "dmd/loss", "critic/loss"} <= set().union(*rows)
    assert all(value is not None for row in rows for value in row.values())
    assert not any(row.get("student/skipped") or row.get("critic/skipped") for row in rows)

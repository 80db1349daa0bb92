"""Noise stands in for data: its shapes, its moments, its place in a config."""

import numpy as np
import pytest

from configs import cosmos_2b, digits, wan_1_3b
from rcm_jax import data
from rcm_jax.data import SyntheticConfig
from rcm_jax.run.program import load_data
from rcm_jax.util.config import revise


def test_noise_is_normal_the_same_every_time_and_another_in_every_example():
    config = SyntheticConfig((3, 16, 16, 4), (("text", (5, 8)),), examples=2000)
    dataset = data.load(config)
    batch = dataset.train[np.arange(8)]
    assert len(dataset.train) == 2000 and batch["x0"].shape == (8, 3, 16, 16, 4)
    assert abs(batch["x0"].mean()) < 0.02 and abs(batch["x0"].std() - 1) < 0.02
    assert batch["cond"]["text"].shape == (8, 5, 8) and batch["x0"].dtype == np.float32
    np.testing.assert_array_equal(data.load(config).train[np.arange(8)]["x0"], batch["x0"])
    rows = batch["x0"].reshape(8, -1)
    assert np.abs(np.corrcoef(rows) - np.eye(8)).max() < 0.2
    assert dataset.uncond["text"].shape == (5, 8) and not dataset.uncond["text"].any()


@pytest.mark.parametrize(("module", "text"), [(wan_1_3b, (6, 8)), (cosmos_2b, (6, 8))])
def test_conditions_are_those_of_the_network(module, text):
    run = module.tiny(module.EXPERIMENT)
    dataset = load_data(revise(run, {"data": SyntheticConfig(run.data.shape)}))
    assert dataset.first["cond"]["text"].shape == (1, *text) and dataset.sample_shape == run.data.shape


def test_classes_are_those_of_the_network():
    dataset = load_data(revise(digits.EXPERIMENT, {"data": SyntheticConfig((8, 8, 1))}))
    assert dataset.num_classes == 10 and dataset.uncond["label"] == 10
    assert dataset.train[np.array([13])]["cond"]["label"].tolist() == [3]


def test_a_shape_is_needed():
    with pytest.raises(ValueError, match=r"shape is \(\): it must be one value or more"):
        SyntheticConfig()

"""Precision, recall, density, coverage: exact counts."""

import json

import numpy as np
import pytest

from rcm_jax.evaluate import arrays
from rcm_jax.evaluate.neighbours import neighbour_metrics, neighbour_radii

METRICS = ("precision", "recall", "density", "coverage")


@pytest.mark.golden
@pytest.mark.parametrize(("block", "products"), [(1 << 22, 1 << 30), (130, 1 << 30), (130, 0)])
def test_agrees_with_the_reference(golden, monkeypatch, block, products):
    """Counts are exact, so the metrics agree to the last rounding, whatever the size of the blocks, and however
    distances are taken."""
    monkeypatch.setattr(arrays, "BLOCK", block)
    monkeypatch.setattr(arrays, "PRODUCTS", products)
    data = np.load(golden / "fid" / "prdc.npz")
    cases = {name: case for name, case in json.loads((golden / "fid" / "prdc.json").read_text()).items() if "k" in case}
    assert cases
    for name, case in cases.items():
        k, group = case["k"], name.removesuffix(f"_k{case['k']}")
        real, generated = data[f"{group}/real"], data[f"{group}/generated"]
        for side, x in (("real", real), ("generated", generated)):
            np.testing.assert_allclose(neighbour_radii(x, k), data[f"{group}/radii_{side}_k{k}"], rtol=1e-12)
        assert neighbour_metrics(real, generated, k) == pytest.approx({m: case[m] for m in METRICS}, rel=1e-14), name


def test_the_same_set_and_a_far_one():
    x = np.random.default_rng(0).normal(size=(60, 5))
    same, far = neighbour_metrics(x, x, 3), neighbour_metrics(x, x + 100, 3)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert far == dict.fromkeys(METRICS, 0.0)


def test_one_mode_of_two_is_precise_but_does_not_cover():
    rng = np.random.default_rng(1)
    mode = rng.normal(size=(50, 2))
    real = np.concatenate([mode, mode + 50])
    metrics = neighbour_metrics(real, mode + 0.01, 5)
    assert metrics["precision"] > 0.95
    assert metrics["recall"] < 0.55 and metrics["coverage"] == pytest.approx(0.5)


def test_precision_counts_the_border_and_coverage_does_not():
    real, generated = np.array([[0.0], [1.0], [2.0]]), np.array([[3.0], [10.0]])
    metrics = neighbour_metrics(real, generated, 1)  # every real radius is 1; 3 lies on the border of 2's ball
    assert metrics["precision"] == 0.5 and metrics["coverage"] == metrics["density"] == 0


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), 3, "3 features and generated has 4"),
        (np.zeros((9, 3)), np.zeros((5, 3)), 5, "k = 5 needs.*at least 6 samples, got 5.*lower k"),
        (np.zeros((9, 3)), np.zeros((5, 3)), 0, "k = 0"),
        (np.zeros((9, 3)), np.full((9, 3), np.nan), 3, "generated: 9 of 9 samples"),
        (np.zeros((9, 0)), np.zeros((9, 0)), 3, r"\(9, 0\)"),
    ],
)
def test_bad_input(real, generated, k, message):
    with pytest.raises(ValueError, match=message):
        neighbour_metrics(real, generated, k)

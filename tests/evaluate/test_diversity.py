"""Mean distance within classes."""

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from rcm_jax.evaluate import arrays
from rcm_jax.evaluate.diversity import within_class_distance


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_all_pairs_and_classes_weigh_the_same(monkeypatch, block):
    monkeypatch.setattr(arrays, "BLOCK", block)
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(90, 6)), np.repeat([4, 1, 7], [60, 20, 10])
    expected = np.mean([pdist(x[labels == label]).mean() for label in (4, 1, 7)])
    shuffled = rng.permutation(90)
    assert within_class_distance(x[shuffled], labels[shuffled]) == pytest.approx(expected, rel=1e-13)


def test_known_distances():
    x, labels = np.array([[0.0, 0], [3, 4], [7, 7], [7, 7]]), np.array([0, 0, 1, 1])
    assert within_class_distance(x, labels) == 2.5


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (np.zeros((4, 2)), np.array([0, 0, 3, 0]), "class 3 has one sample.*at least 2.*2 classes"),
        (np.zeros((4, 2)), np.zeros(3, int), r"labels has shape \(3,\), expected \(4,\)"),
        (np.zeros((4, 2)), np.zeros(4), "float64, expected integers"),
        (np.full((4, 2), np.inf), np.zeros(4, int), "4 of 4 samples"),
    ],
)
def test_bad_input(x, labels, message):
    with pytest.raises(ValueError, match=message):
        within_class_distance(x, labels)

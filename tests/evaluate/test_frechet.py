"""Fréchet distance: 50-digit values, closed forms, degenerate sets."""

import numpy as np
import pytest

from rcm_jax.evaluate.frechet import distance_of, fitted, frechet_distance, of_moments


@pytest.mark.golden
def test_agrees_with_fifty_digits(golden):
    """1e-9 for every case, the singular ones included (eigenvalue methods are off by 1e-6 there)."""
    data = np.load(golden / "fid" / "frechet.npz")
    cases = sorted({name.split("/")[0] for name in data})
    assert cases
    for case in cases:
        a, b = data[f"{case}/features_1"], data[f"{case}/features_2"]
        assert frechet_distance(a, b) == pytest.approx(float(data[f"{case}/fid"]), abs=1e-9), case
        assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), abs=1e-9), case


@pytest.mark.golden
def test_means_and_covariances_alone_agree_as_far_as_they_can(golden):
    """1e-9 where covariances have full rank, 1e-5 where they are nearly singular; also with samples on one side."""
    data = np.load(golden / "fid" / "frechet.npz")
    cases = sorted({name.split("/")[0] for name in data})
    assert cases
    for case in cases:
        samples = [data[f"{case}/features_{i}"] for i in (1, 2)]
        alone = [of_moments(x.mean(0), np.cov(x.T)) for x in samples]
        ranks = [np.linalg.cond(np.cov(x.T)) for x in samples]
        tolerance = 1e-9 if max(ranks) < 1e6 else 1e-5
        for a, b in (alone, (fitted("a", samples[0]), alone[1])):
            assert distance_of(a, b) == pytest.approx(float(data[f"{case}/fid"]), abs=tolerance), case


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.zeros(3), np.zeros((2, 2)), r"\(3,\) and a covariance \(2, 2\)"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "must be symmetric"),
        (np.zeros(1), np.array([[np.nan]]), "finite"),
    ],
)
def test_bad_moments(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        of_moments(mean, covariance)


@pytest.mark.parametrize("shape", [(200, 8), (10, 40), (2, 3)])
def test_a_set_is_at_distance_zero_from_itself(shape):
    x = np.random.default_rng(0).normal(size=shape) * 100 + 1e4
    assert 0 <= frechet_distance(x, x) < 1e-12
    assert frechet_distance(x, x[::-1]) < 1e-12  # the order of samples is of no account


def test_features_that_are_always_zero_change_nothing_and_cost_little():
    a, b = (np.random.default_rng(seed).normal(size=(n, 5)) for seed, n in ((0, 12), (1, 9)))
    padded = (np.pad(x, [(0, 0), (0, 20_000)]) for x in (a, b))
    assert frechet_distance(*padded) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_closed_form_of_commuting_gaussians():
    """Diagonal covariances, exact in the samples: ‖mu‖² + Σ (sigma_a − sigma_b)²."""
    rng = np.random.default_rng(1)
    white = np.linalg.qr(rng.normal(size=(50, 7)))[0]
    white = np.linalg.qr(white - white.mean(0))[0] * np.sqrt(49)  # mean 0, covariance 1
    s_a, s_b, mu = rng.uniform(0, 3, 7), rng.uniform(0, 3, 7), rng.normal(size=7)
    expected = np.sum(mu**2) + np.sum((s_a - s_b) ** 2)
    assert frechet_distance(white * s_a, white[::-1] * s_b + mu) == pytest.approx(expected, rel=1e-12)


def test_large_sample_tends_to_the_distance_of_the_distributions():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(50_000, 4)), 2 * rng.normal(size=(40_000, 4)) + 1
    assert frechet_distance(a, b) == pytest.approx(4 + 4, rel=0.02)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), "3 features and b has 4"),
        (np.zeros((5, 2, 2, 1)), np.zeros((5, 4)), r"\(5, 2, 2, 1\).*reshape"),
        (np.zeros((1, 3)), np.zeros((5, 3)), "a has 1 sample.*at least 2"),
        (np.zeros((5, 3)), np.array([[0.0, 0], [np.nan, 1], [np.inf, 0]]), "2 of 3 samples.*the first: 1"),
    ],
)
def test_bad_input(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)

"""The exact map of a Gaussian mixture in closed form, and metrics of samples whose faults are known."""

import numpy as np
import pytest

from rcm_jax.data.mixture import MixtureConfig, sample, standardise
from rcm_jax.evaluate.mixture import (
    data_reference,
    evaluate,
    exact_map,
    make_reference,
    mmd,
    modes,
    sliced_wasserstein,
)

N = 4_000
MIXTURE = standardise(
    MixtureConfig(
        weights=(0.3, 0.1, 0.4, 0.2),
        means=((1.0, 0.0), (-1.0, 0.5), (0.0, 1.0), (0.0, -1.5)),
        stds=(0.1, 0.08, 0.12, 0.1),
        labels=(0, 0, 1, 1),
    )
)


@pytest.fixture(scope="module")
def reference():
    # The seed of the independent set, too: the two must differ all the same.
    rng = np.random.default_rng(0)
    return make_reference(MIXTURE, 1.0, rng.normal(size=(N, 2)), sample(MIXTURE, rng, N)[1])


@pytest.mark.parametrize("sigma_max", [np.inf, 3.0])
def test_the_map_of_one_gaussian_is_its_closed_form(sigma_max):
    """x0 = mu + sigma·(x − c·mu)/sqrt(c²·sigma² + s²), for each of two classes that are one Gaussian."""
    pair = standardise(MixtureConfig((1.0, 2.0), ((0.0, 0.0), (3.0, 1.0)), (0.1, 0.5), (0, 1)))
    noise, labels = np.random.default_rng(0).normal(size=(200, 2)), np.arange(200) % 2
    t = np.arctan(sigma_max)
    c, s = np.cos(t), np.sin(t)
    mu, sigma = pair.means[labels], pair.stds[labels, None]
    expected = mu + sigma * (noise - c * mu) / np.sqrt(c**2 * sigma**2 + s**2)
    np.testing.assert_allclose(exact_map(pair, 1.0, noise, labels, sigma_max), expected, atol=1e-6)


def test_guidance_moves_away_from_the_other_classes():
    noise, labels = np.random.default_rng(0).normal(size=(500, 2)), np.full(500, 1)
    plain, guided, null = (exact_map(MIXTURE, w, noise, labels) for w in (1.0, 2.0, 0.0))
    assert abs(guided[:, 1]).mean() > abs(plain[:, 1]).mean() + 0.01  # classes differ in the second coordinate
    np.testing.assert_allclose(null, exact_map(MIXTURE, 1.0, noise, np.full(500, 2)), atol=1e-9)


def test_the_map_has_the_distribution_of_the_data(reference):
    counts, variances = modes(MIXTURE, reference.target, reference.labels)
    expected = MIXTURE.weights * N
    assert np.all(abs(counts - expected) < 4 * np.sqrt(expected))
    np.testing.assert_allclose(variances / MIXTURE.stds**2, 1, atol=0.2)


def test_the_target_scores_0_and_independent_samples_the_sampling_error(reference):
    scores = evaluate(reference.target, reference)
    assert (scores["map_error"], scores["mode_kl"], scores["modes_lost"]) == (0, 0, 0)
    assert scores["variance"] == pytest.approx(1, abs=1e-12)
    assert abs(scores["mmd"]) < 3e-3
    assert 0 < scores["sliced_wasserstein"] < 0.05

    rng = np.random.default_rng(5)
    x0, label, _ = sample(MIXTURE, rng, 4 * N)
    others = np.empty((N, 2))
    for c in (0, 1):
        others[reference.labels == c] = x0[label == c][: (reference.labels == c).sum()]
    scores = evaluate(others, reference)
    assert scores["map_error"] > 0.3
    assert scores["mode_kl"] < 5e-3
    assert scores["modes_lost"] == 0
    assert scores["variance"] == pytest.approx(1, abs=0.1)
    assert abs(scores["mmd"]) < 3e-3
    assert 0 < scores["sliced_wasserstein"] < 0.05


def test_a_collapsed_set_scores_as_computed_by_hand(reference):
    """Mode 1 goes to its class's other mode, and deviations shrink by sqrt(1/2) about the means."""
    counts, _ = modes(MIXTURE, reference.target, reference.labels)
    samples = reference.target.copy()
    first = samples[reference.labels == 0]
    lost = first[:, 0] < 0
    assert lost.sum() == counts[1]
    kept = first[~lost]
    first[lost] = kept[np.arange(counts[1]) % counts[0]]
    samples[reference.labels == 0] = first
    assigned = np.where(reference.labels == 0, 0, 2 + (samples[:, 1] < 0))
    for k in (0, 2, 3):
        group = samples[assigned == k]
        samples[assigned == k] = group.mean(axis=0) + (group - group.mean(axis=0)) / np.sqrt(2)

    scores = evaluate(samples, reference)
    p = (counts + 0.5) / (N + 2)
    q = (np.array([counts[0] + counts[1], 0, counts[2], counts[3]]) + 0.5) / (N + 2)
    assert scores["mode_kl"] == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-12)
    assert scores["mode_kl"] > 0.3
    assert scores["modes_lost"] == 1
    assert scores["variance"] == pytest.approx(0.5, abs=0.02)  # mode 0 got copies of some samples
    error = np.sqrt(np.mean(np.sum((samples - reference.target) ** 2, axis=1)))
    assert scores["map_error"] == pytest.approx(error, rel=1e-12)
    fine = evaluate(reference.target, reference)
    assert scores["mmd"] > 20 * abs(fine["mmd"])
    assert scores["sliced_wasserstein"] > 3 * fine["sliced_wasserstein"]


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    """A shift by d moves the projection by d·|cos|, whose mean over directions is 2/pi·d."""
    x = np.random.default_rng(0).normal(size=(50, 2))
    assert sliced_wasserstein(x, x + np.array([3.0, 4.0])) == pytest.approx(5 * 2 / np.pi, rel=1e-3)


def test_mmd_is_its_formula_and_unbiased():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 2)), rng.normal(size=(5, 2)) + 0.3

    def kernel(x, y):
        squares = np.sum((x[:, None] - y) ** 2, axis=-1)
        return np.mean([np.exp(-squares / (2 * h**2)) for h in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)], axis=0)

    within = [(kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    assert mmd(a, b) == pytest.approx(sum(within) - 2 * kernel(a, b).mean(), rel=1e-10)
    values = [mmd(*rng.normal(size=(2, 20, 2))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


def labelled(counts, seed):
    """Points about (c, 0) for class c, and their labels: counts[c] of each."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    noise = np.random.default_rng(seed).normal(size=(len(labels), 2))
    return np.stack([labels, 0 * labels], axis=1) + 0.01 * noise, labels


def test_a_reference_of_data_has_equally_many_of_each_class_from_both_splits():
    train, test = labelled([50, 10, 200], 0), labelled([40, 40, 40], 1)
    reference = data_reference(train, test, most=1000)
    assert np.bincount(reference.labels).tolist() == [40, 10, 40] and reference.labels.dtype == np.int32
    for points, (source, _) in (reference.target, train), (reference.independent, test):
        np.testing.assert_array_equal(np.round(points[:, 0]), reference.labels)
        assert len(np.unique(points, axis=0)) == 90 and np.isin(points, source).all()
    assert np.any(np.diff(reference.labels) < 0)  # mixed, for pictures
    assert np.bincount(data_reference(train, test, most=60).labels).tolist() == [20, 10, 20]


def test_distances_are_taken_class_by_class():
    reference = data_reference(labelled([300, 100], 0), labelled([300, 100], 1), most=1000)
    near = evaluate(reference.target, reference)
    assert abs(near["mmd"]) < 1e-3 and near["sliced_wasserstein"] < 0.005
    swapped = evaluate(reference.independent[:, ::-1], reference)  # class 0 stays where it is, class 1 moves by (-1, 1)
    assert swapped["sliced_wasserstein"] == pytest.approx(0.25 * np.sqrt(2) * 2 / np.pi, rel=0.02)
    classes_exchanged = reference.independent.copy()
    classes_exchanged[:, 0] = 1 - classes_exchanged[:, 0]
    assert evaluate(classes_exchanged, reference)["mmd"] > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: evaluate(r.target[:5], r), r"samples are \(5, 2\), the reference is \(4000, 2\)"),
        (lambda r: evaluate(r.target * np.nan, r), "4000 of 4000 samples"),
        (lambda r: exact_map(MIXTURE, 1.0, np.zeros((2, 2)), np.array([0, 3])), r"0 to 1, or 2 for all, got \[3\]"),
        (lambda r: make_reference(MIXTURE, 1.0, np.zeros((3, 2)), np.array([0, 1, 1])), "class 0 has one sample"),
        (
            lambda r: data_reference(labelled([9, 1], 0), labelled([3, 3], 0), 9),
            "class 1 has 1 training and 3 held-out",
        ),
        (lambda r: data_reference(labelled([9], 0), labelled([9], 0), 1), "of at most 1 in all"),
    ],
)
def test_bad_input(reference, call, message):
    with pytest.raises(ValueError, match=message):
        call(reference)

"""Metrics of whole sets of samples, and tables of them."""

import json

import jax
import numpy as np
import pytest

from rcm_jax.evaluate.table import evaluate_samples, format_table, make_reference, table

KEYS = {"frechet_features", "frechet_pixels", "accuracy", "precision", "recall", "density", "coverage", "diversity"}


def test_real_noisy_and_collapsed_samples(digits, reference):
    """Real images score best; noise costs fidelity, collapse to one image per class costs diversity and coverage."""
    train, labels, _, _ = digits
    noise = np.random.default_rng(0).normal(size=train.shape)
    prototypes = np.stack([train[labels == label][0] for label in range(10)])[labels]
    real, noisy, collapsed = (
        evaluate_samples(x, labels, reference) for x in (train, train + noise, prototypes + 0.01 * noise)
    )
    assert set(real) == KEYS and all(type(value) is float for value in real.values())
    assert real["accuracy"] > 0.98 and real["precision"] > 0.9 and real["recall"] > 0.9 and real["coverage"] > 0.95
    assert noisy["accuracy"] < real["accuracy"] and noisy["precision"] < real["precision"]
    assert collapsed["coverage"] < 0.5 and collapsed["diversity"] < 0.1 * real["diversity"]
    for name in ("frechet_features", "frechet_pixels"):
        assert real[name] < 0.5 * noisy[name] and real[name] < 0.5 * collapsed[name]


def test_the_held_out_images_themselves(digits, reference):
    _, _, images, labels = digits
    metrics = evaluate_samples(images, labels, reference)
    assert metrics["frechet_features"] < 1e-9 and metrics["frechet_pixels"] < 1e-9
    assert metrics["accuracy"] == reference.accuracy
    assert metrics["precision"] == metrics["recall"] == metrics["coverage"] == 1


def test_bad_samples(reference):
    samples, labels = np.zeros((20, 8, 8, 1)), np.arange(20) % 10
    broken = samples.copy()
    broken[7] = np.nan
    for bad, bad_labels, message in [
        (broken, labels, "samples: 1 of 20 samples hold NaN.*the first: 7"),
        (samples[:, :4], labels, r"\(4, 8, 1\).*\(8, 8, 1\)"),
        (samples, labels[:5], r"\(5,\), expected \(20,\)"),
        (samples[:4], labels[:4] * 0, "k = 5 needs.*got 4"),
        (samples[:10], labels[:10], "class 0 has one sample"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_samples(bad, bad_labels, reference)


def test_reference_needs_more_images_than_neighbours(digits):
    train, labels, test, test_labels = digits
    with pytest.raises(ValueError, match="k = 5 neighbours need at least 6 held-out images, got 4"):
        make_reference(train, labels, test[:4], test_labels[:4], jax.random.key(0), steps=1)


ROWS = {
    "teacher 50": {"frechet_features": 0.5, "accuracy": np.float32(0.75), "diversity": 4.0, "frechet_pixels": 0.0},
    "student 1": {"frechet_features": 1.0, "accuracy": 0.5, "diversity": 3.0, "frechet_pixels": 2.0},
}


def test_ratios():
    rows = table(ROWS, "teacher 50")
    assert rows["student 1"]["frechet_features_ratio"] == 2 and rows["student 1"]["diversity_ratio"] == 0.75
    assert rows["teacher 50"]["diversity_ratio"] == 1
    assert rows["student 1"]["frechet_pixels_ratio"] is None  # the base is 0
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert "diversity_ratio" not in ROWS["student 1"]
    with pytest.raises(ValueError, match=r"no row 'teacher'.*'teacher 50', 'student 1'"):
        table(ROWS, relative_to="teacher")


def test_text_is_aligned():
    upper, lower, rule, *lines = format_table(table(ROWS, "teacher 50")).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["teacher 50", "student 1"]
    assert set(rule) == {"-"} and len(rule) == max(map(len, lines)) == len(lower)
    assert lower.split()[:3] == ["features", "pixels", "accuracy"] and upper.split()[:2] == ["FD", "FD"]
    end = lower.index("accuracy") + len("accuracy")
    assert [line[:end].split()[-1] for line in lines] == ["0.750", "0.500"]
    assert lines[1].split()[-2:] == ["-", "0.75"]

"""The classifier learns the digits, and the same key gives the same one."""

import jax
import numpy as np
import pytest

from rcm_jax.evaluate.classifier import train_classifier


def test_recognises_held_out_digits(digits, reference):
    _, _, images, labels = digits
    assert reference.accuracy >= 0.975
    assert reference.classifier.accuracy(images, labels) == reference.accuracy


def test_features_have_unit_variance_and_do_not_depend_on_batching(digits, reference):
    train = digits[0]
    features = reference.classifier.features(train)
    assert features.shape == (len(train), 64) and features.dtype == np.float64
    assert features.var(axis=0).mean() == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(reference.classifier.features(train[300:303]), features[300:303], atol=1e-5)


def test_deterministic_by_key_and_free_of_pixel_units(digits):
    train, labels, _, _ = digits
    options = {"steps": 5, "batch_size": 32}
    a, b, other = (train_classifier(train, labels, 10, jax.random.key(i), **options) for i in (3, 3, 4))
    np.testing.assert_array_equal(a.features(train[:9]), b.features(train[:9]))
    assert np.abs(a.features(train[:9]) - other.features(train[:9])).max() > 0.01
    scaled = train_classifier(5 * train + 2, labels, 10, jax.random.key(3), **options)
    np.testing.assert_allclose(scaled.features(5 * train[:9] + 2), a.features(train[:9]), atol=1e-3)


def test_other_image_sizes(digits):
    images = np.random.default_rng(0).normal(size=(20, 5, 7, 3))
    classifier = train_classifier(images, np.arange(20) % 4, 4, jax.random.key(0), steps=2, batch_size=8)
    assert classifier.features(images).shape == (20, 64) and classifier.predict(images).max() < 4


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 8, 8)), np.zeros(4, int), r"\(4, 8, 8\), expected \[n, h, w, c\]"),
        (np.zeros((4, 8, 8, 1)), np.zeros(5, int), r"\(5,\), expected \(4,\)"),
        (np.zeros((4, 8, 8, 1)), np.array([0, 1, 2, 3]), "from 0 to 3, num_classes = 3 allows 0 to 2"),
        (np.zeros((4, 8, 8, 1)), np.zeros(4, int), "single value 0.0"),
        (np.full((4, 8, 8, 1), np.nan), np.zeros(4, int), "4 of 4 samples hold NaN"),
    ],
)
def test_bad_training_data(images, labels, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(images, labels, 3, jax.random.key(0), steps=1)


def test_another_image_shape_is_refused(reference):
    with pytest.raises(ValueError, match=r"\(16, 16, 1\).*trained on \(8, 8, 1\)"):
        reference.classifier.features(np.zeros((2, 16, 16, 1)))

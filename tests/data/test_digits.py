"""The digits as training data."""

import numpy as np
import pytest

from rcm_jax.data import DigitsConfig, load


@pytest.fixture(scope="module")
def digits():
    return load(DigitsConfig())


def test_training_data_have_mean_0_and_unit_variance(digits):
    assert digits.train["x0"].shape == (1437, 8, 8, 1)
    assert digits.test["x0"].shape == (360, 8, 8, 1)
    assert digits.train["x0"].dtype == np.float32
    assert digits.sample_shape == (8, 8, 1)
    assert abs(float(digits.train["x0"].mean())) < 1e-4
    assert float(digits.train["x0"].std()) == pytest.approx(1, abs=1e-4)


def test_classes_are_equally_represented_in_both_splits(digits):
    shares = [
        np.bincount(part["cond"]["label"], minlength=10) / len(part["x0"]) for part in (digits.train, digits.test)
    ]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.01)
    assert digits.num_classes == 10
    assert digits.uncond["label"] == 10  # the null class is not one of them


def test_no_held_out_image_is_a_training_image(digits):
    seen = {image.tobytes() for image in digits.train["x0"]}
    assert not [image for image in digits.test["x0"] if image.tobytes() in seen]


def test_the_split_is_the_same_every_time(digits):
    again = load(DigitsConfig())
    np.testing.assert_array_equal(again.test["x0"], digits.test["x0"])
    np.testing.assert_array_equal(again.train["cond"]["label"], digits.train["cond"]["label"])


def test_to_image_undoes_the_scaling_and_clips(digits):
    images = digits.to_image(digits.train["x0"][:50])
    assert images.min() == 0
    assert images.max() == 1
    np.testing.assert_allclose(images * 16, np.round(images * 16), atol=1e-4)  # the pixels are sixteenths
    np.testing.assert_array_equal(digits.to_image(np.full((1, 8, 8, 1), 100.0)), 1)


def test_larger_digits_are_the_same_pictures_of_unit_variance(digits):
    larger = load(DigitsConfig(size=16))
    assert larger.train["x0"].shape == (1437, 16, 16, 1)
    assert float(larger.train["x0"].std()) == pytest.approx(1, abs=1e-4)
    small, large = digits.to_image(digits.test["x0"]), larger.to_image(larger.test["x0"])
    means = large.reshape(-1, 8, 2, 8, 2, 1).mean(axis=(2, 4))
    assert np.corrcoef(means.ravel(), small.ravel())[0, 1] > 0.99
    with pytest.raises(ValueError, match="size is 4: it must be from 8"):
        DigitsConfig(size=4)

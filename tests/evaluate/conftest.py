"""One classifier, trained once for the folder."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from rcm_jax.evaluate.table import Reference, make_reference


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, ...]:
    """(training images, labels, held-out images, labels); images [n, 8, 8, 1] of unit variance."""
    pixels, labels = load_digits(return_X_y=True)
    images = ((pixels - pixels.mean()) / pixels.std()).reshape(-1, 8, 8, 1).astype(np.float32)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    return train, train_labels, test, test_labels


@pytest.fixture(scope="session")
def reference(digits) -> Reference:
    return make_reference(*digits, jax.random.key(0))

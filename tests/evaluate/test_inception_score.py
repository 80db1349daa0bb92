"""The inception score: values of torch-fidelity, closed forms."""

import json
import re

import numpy as np
import pytest

from rcm_jax.evaluate.inception_score import SEED, inception_score


@pytest.mark.golden
def test_agrees_with_the_reference(golden):
    data = np.load(golden / "fid/inception_score.npz")
    np.testing.assert_array_equal(
        np.random.RandomState(SEED).permutation(len(data["logits"])), data["permutation_seed2020"]
    )
    cases = json.loads((golden / "fid/inception_score.json").read_text())
    found = [(re.fullmatch(r"splits(\d+)_shuffle(\d)", name), case) for name, case in cases.items()]
    assert sum(match is not None for match, _ in found) >= 6
    for match, case in ((match, case) for match, case in found if match):
        mean, std = inception_score(data["logits"], int(match[1]), match[2] == "1")
        assert mean == pytest.approx(case["inception_score_mean"], rel=1e-10)
        assert std == pytest.approx(case["inception_score_std"], rel=1e-10, abs=1e-12)


def test_sure_and_even_classes_score_their_number():
    logits = np.tile(1e4 * np.eye(5), (8, 1))
    assert inception_score(logits, 1) == pytest.approx((5, 0))
    assert inception_score(np.zeros((40, 5))) == pytest.approx((1, 0))


def test_bad_input():
    with pytest.raises(ValueError, match=r"9 sample\(s\), at least 10"):
        inception_score(np.zeros((9, 3)))
    with pytest.raises(ValueError, match="splits = 0"):
        inception_score(np.zeros((9, 3)), 0)

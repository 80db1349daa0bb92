"""Weights that are not finite are refused by the tensor's name."""

import ml_dtypes
import numpy as np
import pytest

from rcm_jax import convert
from rcm_jax.convert.values import check_finite
from tests.wan import TINY, random_params

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_one_value_is_seen_among_many(dtype, value):
    tensor = np.ones((100, 1001), dtype)
    tensor[40, 7] = value
    with pytest.raises(ValueError, match=r"^blocks\.0: 1 of 100,100 values are NaN or inf: .* take others$"):
        check_finite("blocks.0", tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_large_values_whose_sum_is_not_finite_are_taken(dtype):
    check_finite("a", np.full((3, 1000), ml_dtypes.finfo(dtype).max, dtype))
    check_finite("none", np.ones((0, 3), dtype))


def test_weights_with_a_nan_are_not_converted():
    tensors = {name: np.array(x) for name, x in convert.to_reference("wan", random_params(), TINY, "official").items()}
    tensors["blocks.0.ffn.0.bias"][3] = np.nan
    with pytest.raises(ValueError, match=r"^blocks\.0\.ffn\.0\.bias: 1 of \d+ values are NaN"):
        convert.from_reference("wan", tensors, TINY)

"""Arrays of numpy in pickles of every protocol, read without unpickling."""

import pickle

import numpy as np
import pytest

from rcm_jax.convert.numpy_pickle import read_arrays


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_come_back_whatever_the_protocol_dtype_and_order(protocol, tmp_path):
    arrays = {
        "mu": np.arange(3.0),
        "sigma": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "count": np.array(7, ">i4"),
        "flags": np.array([True, False]),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fid": arrays, "other": {"x": 1}}, protocol))
    found = read_arrays(tmp_path / "a.pkl", "fid")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert read_arrays(tmp_path / "a.pkl", "none") == {}


@pytest.mark.parametrize(
    "content",
    [pickle.dumps([1]), pickle.dumps({"fid": 3}), pickle.dumps({"fid": print}), b"", b"\x80\x04" + b"]" * 1000 + b"."],
    ids=["a list", "no dict", "a function", "nothing", "nested"],
)
def test_anything_else_is_one_line(content, tmp_path):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pkl is no pickle of arrays: "):
        read_arrays(tmp_path / "a.pkl", "fid")

"""base + Σ w·(a − b): exact where it can be, in any layouts, of one tensor at a time."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from rcm_jax import convert
from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.convert.merge import Term, merge, under_names_of
from tests.wan import I2V, TINY, random_params

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def drawn(key, dtype=np.float32, shape=(7, 5)):
    return (10.0 ** np.random.default_rng(key).uniform(-6, 6, shape)).astype(dtype)


def read(tensors):
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
def test_weight_1_and_minus_the_base_give_plus_to_the_bit(dtype):
    base, plus = ({"x": (1e-2 * drawn(key)).astype(dtype)} for key in range(2))
    found = read(merge(base, [Term(1, plus, {"x": base["x"].copy()})]))["x"]
    assert found.dtype == dtype and found.tobytes() == plus["x"].tobytes()
    assert np.any(base["x"] + (plus["x"] - base["x"]) != plus["x"])  # a plain sum does not


def test_a_sum_is_that_of_float64_in_the_dtype_of_the_base():
    base, a, b, c, d = (drawn(key, BFLOAT16 if key == 0 else np.float32) for key in range(5))
    terms = [Term(0.5, {"x": a}, {"x": b}), Term(-2.0, {"x": c}, {"x": d})]
    exact = base.astype(np.float64) + 0.5 * (np.float64(a) - b) - 2 * (np.float64(c) - d)
    found = merge({"x": base}, terms)["x"]
    assert found.dtype == BFLOAT16 and np.asarray(found).dtype == BFLOAT16
    np.testing.assert_array_equal(np.asarray(found), exact.astype(BFLOAT16))
    replaced = merge({"x": base}, [*terms, Term(1, {"x": a}, {"x": base})])["x"]
    exact = a.astype(np.float64) + 0.5 * (np.float64(a) - b) - 2 * (np.float64(c) - d)
    np.testing.assert_array_equal(np.asarray(replaced), exact.astype(BFLOAT16))


def test_names_that_a_term_lacks_stay_and_values_too_large_are_refused():
    base = {"x": np.float16([1, 2]), "y": np.float16([3])}
    found = read(merge(base, [Term(1.0, {"y": np.float16([5])}, {"y": np.float16([4])})]))
    assert found["x"].tolist() == [1, 2] and found["y"].tolist() == [4]
    large = merge(base, [Term(1e6, {"x": np.float16([5, 1])}, {"x": np.float16([0, 1])})])["x"]
    with pytest.raises(ValueError, match="x: 1 of 2 values are too large for float16"):
        np.asarray(large)


@pytest.mark.parametrize("layout", ["official", "rcm", "diffusers"])
def test_checkpoints_of_any_layout_come_under_the_names_of_another(layout):
    params = random_params(TINY)
    tensors = convert.to_reference("wan", params, TINY, layout)
    wanted = convert.to_reference("wan", params, TINY, "official")
    found = under_names_of("official", "wan", {f"net.{name}": t for name, t in tensors.items()}, TINY)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.shape == wanted[name].shape
        np.testing.assert_array_equal(np.asarray(tensor), wanted[name], err_msg=name)


@pytest.mark.parametrize("layout", ["official", "rcm", "diffusers"])
def test_what_does_not_fit_is_left_out_or_refused(layout):
    tensors = convert.to_reference("wan", random_params(TINY), TINY, layout)  # I2V has more channels in
    with pytest.raises(ValueError, match=r"with 1 problems:\n- patch_embedding\.weight: shape .*, must be "):
        under_names_of("official", "wan", tensors, I2V)
    found = under_names_of("official", "wan", tensors, I2V, lambda name: name == "patch_embedding.weight")
    assert "patch_embedding.weight" not in found and len(found) == len(tensors) - 1
    lacking = {name: tensor for name, tensor in tensors.items() if name != "patch_embedding.weight"}
    again = under_names_of("official", "wan", lacking, I2V, lambda name: name == "patch_embedding.weight")
    assert again.keys() == found.keys()
    with pytest.raises(ValueError, match=r"patch_embedding\.bias: missing"):
        under_names_of("official", "wan", {n: t for n, t in tensors.items() if n != "patch_embedding.bias"}, TINY)


def test_memory_is_that_of_one_tensor():
    size, count = 2**18, 24  # 1 MiB each

    def lazy(key):
        return LazyTensor((size,), np.dtype(np.float32), lambda: np.full(size, key, np.float32))

    base, plus, minus = ({f"x{i}": lazy(i + key) for i in range(count)} for key in (0, 3, 1))
    found = merge(base, [Term(0.5, plus, minus)])
    tracemalloc.start()
    sums = [float(np.asarray(tensor).sum()) for tensor in found.values()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sums == [size * (i + 1) for i in range(count)]
    assert peak < 14 * 2**20  # of 72 MiB in all files

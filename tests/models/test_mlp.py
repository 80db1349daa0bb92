"""The MLP: shapes, tangents, what it depends on, and the axes of its parameters."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.models import network_of
from rcm_jax.models.mlp import MLP, MLPConfig
from tests import tiny
from tests.tiny import perturbed, relative, x64

# Compiling is most of the time that these tests take.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

CONFIG = MLPConfig(num_classes=3, dim=16, num_layers=2, freq_dim=8)
X = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
T = np.linspace(0.1, 1.5, 6, dtype=np.float32)
LABEL = np.arange(6) % 3


@functools.cache
def boxed():
    return jax.jit(MLP(CONFIG).init)(jax.random.key(0), X, T, LABEL)["params"]


@functools.partial(jax.jit, static_argnums=3)
def apply(x, t, label, dtype="float32"):
    params = jax.tree.map(lambda p: p.astype(dtype), perturbed(nn.meta.unbox(boxed()), 0))
    return MLP(dataclasses.replace(CONFIG, dtype=dtype)).apply({"params": params}, x, t, label)


def test_a_fresh_network_predicts_zero_in_float32():
    out = MLP(CONFIG).apply({"params": nn.meta.unbox(boxed())}, X, T, LABEL)
    assert (out.shape, out.dtype) == ((6, 2), jnp.float32)
    np.testing.assert_array_equal(out, 0)
    assert network_of(CONFIG).module is MLP


def test_output_depends_on_input_time_and_label_and_samples_do_not_mix():
    out = apply(X, T, LABEL)
    assert relative(apply(X + 0.1, T, LABEL), out) > 1e-2
    assert relative(apply(X, T + 0.1, LABEL), out) > 1e-2
    assert relative(apply(X, T, np.full(6, 3)), out) > 1e-2
    np.testing.assert_allclose(apply(X[:2], T[:2], LABEL[:2]), out[:2], rtol=1e-5, atol=1e-6)


def test_tangent_agrees_with_central_differences_in_float64():
    with x64():
        x, t, h = X.astype(np.float64), T.astype(np.float64), 1e-5
        f = jax.jit(lambda x, t: apply(x, t, LABEL, "float64"))
        dx, dt = np.cos(np.arange(12.0)).reshape(6, 2), np.ones(6)
        tangent = jax.jit(lambda *at: jax.jvp(f, *at)[1])((x, t), (dx, dt))
        assert tangent.dtype == jnp.float64
        assert relative(tangent, (f(x + h * dx, t + h * dt) - f(x - h * dx, t - h * dt)) / (2 * h)) < 1e-8


def test_parameters_are_float32_with_logical_axes():
    leaves = jax.tree.leaves(boxed(), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    assert all(isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim for leaf in leaves)
    assert {leaf.value.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("change", "message"), [({"dim": 0}, "dim is 0: it must be"), ({"dtype": "int8"}, "is 'int8': it must be one of")]
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MLPConfig(num_classes=3, **change)

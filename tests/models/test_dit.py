"""The diffusion transformer: shapes, tangents, and what must not change a number."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels import attention
from rcm_jax.models.dit import DiTConfig
from tests import tiny
from tests.tiny import assert_trees_close, relative, x64

# The claims do not depend on XLA's optimisations, and compiling takes half the time without them.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

DEEP = dataclasses.replace(tiny.MODEL, num_layers=2)


@functools.cache
def value_and_gradient(config):
    """(output, gradient of its square) of the network of DEEP under another configuration."""
    _, params = tiny.dit(DEEP)
    F, _ = tiny.dit(config)
    x, t, cond = tiny.inputs()

    def loss(params):
        out = F(params, x, t, cond)
        return jnp.sum(out**2), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    return out, gradient


@pytest.mark.smoke
@pytest.mark.parametrize("change", [{"remat": remat} for remat in ("full", "save_attention", "save_products")], ids=str)
def test_remat_changes_neither_values_nor_gradients(change):
    out, gradient = value_and_gradient(DEEP)
    other_out, other_gradient = value_and_gradient(dataclasses.replace(DEEP, **change))
    np.testing.assert_allclose(other_out, out, rtol=1e-5, atol=1e-5)
    assert_trees_close(other_gradient, gradient, rtol=1e-4, atol=1e-4)  # float32, other orders of sums of 512 terms


def test_attention_is_computed_as_the_config_says(monkeypatch):
    monkeypatch.setitem(
        attention.IMPLEMENTATIONS, "blockwise", attention.Implementation()
    )  # what "auto" stands for here
    asked = tiny.boxed_init(dataclasses.replace(tiny.MODEL, attention="reference"))
    jax.eval_shape(asked, jax.random.key(0))
    with pytest.raises(TypeError, match="'NoneType'"):
        jax.eval_shape(tiny.boxed_init(), jax.random.key(0))


def test_bfloat16_compute_gives_float32_output_near_that_of_float32():
    out, _ = value_and_gradient(DEEP)
    low, gradient = value_and_gradient(dataclasses.replace(DEEP, dtype="bfloat16"))
    assert low.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert 0 < relative(low, out) < 0.05  # 8 bits of mantissa, two blocks


@pytest.mark.parametrize("along", ["x", "t", "both"])
def test_tangent_agrees_with_central_differences_in_float64(along):
    with x64():
        config = dataclasses.replace(DEEP, dtype="float64")
        F, _ = tiny.dit(config)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), tiny.dit(DEEP)[1])
        x, t, cond = (jax.tree.map(jnp.asarray, v) for v in tiny.inputs())
        x, t = x.astype(jnp.float64), t.astype(jnp.float64)
        dx = jnp.cos(jnp.arange(x.size, dtype=jnp.float64)).reshape(x.shape) * (along != "t")
        dt = jnp.ones_like(t) * (along != "x")
        f = jax.jit(lambda x, t: F(params, x, t, cond))
        tangent = jax.jit(lambda: jax.jvp(lambda x, t: F(params, x, t, cond), (x, t), (dx, dt))[1])()
        h = STEP[along]
        difference = (f(x + h * dx, t + h * dt) - f(x - h * dx, t - h * dt)) / (2 * h)
        assert relative(tangent, difference) < TOLERANCE[along]


# A central difference in float64: h²·F''' from truncation, with F''' up to 16³ in time, and 1e-16/h from rounding.
STEP = {"x": 1e-4, "t": 1e-5, "both": 1e-5}
TOLERANCE = {"x": 1e-7, "t": 1e-7, "both": 1e-7}


def test_output_depends_on_input_time_label_and_position():
    F, params = tiny.dit()
    x, t, cond = tiny.inputs()
    f = jax.jit(F)
    out = f(params, x, t, cond)
    assert relative(f(params, 1.1 * x, t, cond), out) > 1e-3
    assert relative(f(params, x, t + 0.1, cond), out) > 1e-3
    assert relative(f(params, x, t, {"label": cond["label"] * 0 + tiny.CLASSES}), out) > 1e-3
    moved = f(params, jnp.roll(x, 4, axis=1), t, cond)  # by a whole patch
    assert relative(jnp.roll(moved, -4, axis=1), out) > 1e-3


def test_samples_of_a_batch_do_not_mix():
    F, params = tiny.dit()
    x, t, cond = tiny.inputs()
    f = jax.jit(F)
    changed = f(params, x.at[0].add(1.0), t, cond)
    np.testing.assert_array_equal(changed[1:], f(params, x, t, cond)[1:])


def test_a_fresh_network_predicts_zero_and_its_parameters_are_float32_with_logical_axes():
    boxed = jax.jit(tiny.boxed_init(dataclasses.replace(tiny.MODEL, dtype="bfloat16")))(jax.random.key(0))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    assert all(isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim for leaf in leaves)
    assert {leaf.value.dtype for leaf in leaves} == {jnp.dtype("float32")}
    F, _ = tiny.dit()
    x, t, cond = tiny.inputs()
    np.testing.assert_array_equal(jax.jit(F)(nn.meta.unbox(boxed), x, t, cond), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 0}, "patch is 0: it must be"),
        ({"dtype": "float33"}, "is 'float33': it must be one of float32"),
        ({"num_heads": 3}, "num_heads 3 .*dim 16"),
        ({"remat": "some"}, "is 'some': it must be one of none, full, save_attention, save_products"),
        ({"attention": "tritn"}, "attention is 'tritn': it must be one of auto, reference, blockwise, triton"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.MODEL, **change)


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="patch 1×3×3 does not divide the 1×8×8 frames, rows and columns"):
        jax.eval_shape(tiny.boxed_init(dataclasses.replace(tiny.MODEL, patch=3)), jax.random.key(0))


def test_network_is_found_by_its_configuration():
    network = tiny.make_network()
    boxed = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.structure(nn.meta.unbox(boxed)) == jax.tree.structure(tiny.dit()[1])
    assert isinstance(tiny.MODEL, DiTConfig)

"""The product of dense layers: derivatives against float64, and the dtypes in which it sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from rcm_jax.models.layers import dense
from rcm_jax.models.product import affine
from tests.tiny import relative, x64

X, KERNEL = (2, 5, 6), (6, 4)
# Of the last rounding of a value, and of what is narrow in a second derivative.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}


def draw(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_value_tangent_gradient_and_second_derivatives_are_those_of_rounded_factors(dtype, bias):
    arrays = draw(X, KERNEL, KERNEL[1:], X, KERNEL, KERNEL[1:], (*X[:-1], KERNEL[1]))

    def moments(layer, *arrays):
        primals, tangents, g = arrays[:3], arrays[3:6], arrays[6]

        def pushed(*all_six):
            return jax.jvp(layer, all_six[:3], all_six[3:])[1]

        value, pull = jax.vjp(layer, *primals)
        again, pull_again = jax.vjp(pushed, *primals, *tangents)
        alone = jax.jvp(lambda x: layer(x, *primals[1:]), primals[:1], tangents[:1])[1]
        one, two = pull(g.astype(value.dtype)), pull_again(g.astype(value.dtype))
        return value, alone, again, *one, *two

    def ours(x, kernel, b):
        return affine(x, kernel, b if bias else None, dtype)

    def theirs(x, kernel, b):
        return x @ kernel + (b if bias else 0 * b)

    found = jax.jit(lambda *arrays: moments(ours, *arrays))(*arrays)
    with x64():
        exact = [jnp.asarray(np.asarray(a.astype(dtype), np.float64)) for a in arrays]
        expected = moments(theirs, *exact)
    assert {str(a.dtype) for a in found[:3]} == {dtype}
    assert {str(a.dtype) for a in found[3:]} == {"float32"}
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if np.any(b):
            assert relative(a, b) < TOLERANCE[dtype], i
        else:
            np.testing.assert_array_equal(a, b)
    for i in (4, 5) if bias else (4,):  # of kernel and bias: exact sums of what is narrow
        assert relative(found[i], expected[i]) < 1e-6


def eqns_of(jaxpr, name):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from eqns_of(inner, name)


def test_a_narrow_layer_multiplies_narrow_and_gives_its_gradients_in_float32_without_rounding():
    """So that sums over devices, which are made of the parts of a gradient, are of float32."""
    layer = dense(4, "layer", dtype="bfloat16")
    x, g = draw(X, (*X[:-1], 4))
    params = layer.init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(layer.apply(params, x) * g.astype(jnp.bfloat16))

    closed = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x)
    products = list(eqns_of(closed.jaxpr, "dot_general"))
    assert {tuple(str(v.aval.dtype) for v in eqn.invars) for eqn in products} == {("bfloat16", "bfloat16")}
    by_shape = {eqn.outvars[0].aval.shape: str(eqn.outvars[0].aval.dtype) for eqn in products}
    assert by_shape == {(*X[:-1], 4): "bfloat16", X: "bfloat16", KERNEL: "float32"}
    (bias,) = (eqn for eqn in eqns_of(closed.jaxpr, "reduce_sum") if eqn.outvars[0].aval.shape == (4,))
    assert {str(v.aval.dtype) for v in (*bias.invars, *bias.outvars)} == {"float32"}


def test_a_tangent_along_the_input_alone_costs_one_product_more():
    kernel = draw(KERNEL)[0]
    closed = jax.make_jaxpr(lambda x: jax.jvp(lambda x: affine(x, kernel, None, "bfloat16"), (x,), (x,)))(jnp.ones(X))
    assert len(list(eqns_of(closed.jaxpr, "dot_general"))) == 2


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("float64", "HIGHEST"), ("bfloat16", None)])
def test_float32_is_asked_for_where_it_is_promised(dtype, precision):
    with x64():
        closed = jax.make_jaxpr(lambda x, k: affine(x, k, None, dtype))(jnp.ones(X), jnp.ones(KERNEL))
    (eqn,) = eqns_of(closed.jaxpr, "dot_general")
    asked = {p.name for p in eqn.params["precision"] or ()} - {"DEFAULT"}
    assert asked == ({precision} if precision else set())

"""The product of dense layers: derivatives against float64, and the dtypes in which it sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from rcm_jax.models.layers import dense
from rcm_jax.models.product import product
from tests.tiny import relative, x64

X, KERNEL = (2, 5, 6), (6, 4)


def draw(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_value_tangent_gradient_and_second_derivatives_are_those_of_the_product_of_rounded_factors(dtype):
    x, kernel, dx, dkernel, g = draw(X, KERNEL, X, KERNEL, (*X[:-1], KERNEL[1]))

    def moments(multiply, *arrays):
        x, kernel, dx, dkernel, g = arrays

        def pushed(x, kernel, dx, dkernel):
            return jax.jvp(multiply, (x, kernel), (dx, dkernel))[1]

        value, pull = jax.vjp(multiply, x, kernel)
        again, pull_again = jax.vjp(pushed, x, kernel, dx, dkernel)
        alone = jax.jvp(lambda x: multiply(x, kernel), (x,), (dx,))[1]
        return value, *pull(g), again, *pull_again(g), alone

    ours = jax.jit(lambda *arrays: moments(lambda x, k: product(x, k, dtype), *arrays))(x, kernel, dx, dkernel, g)
    with x64():
        exact = [jnp.asarray(np.asarray(a.astype(dtype), np.float64)) for a in (x, kernel, dx, dkernel, g)]
        theirs = moments(jnp.matmul, *exact)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.float32
        assert relative(a, b) < 1e-6


def eqns_of(jaxpr, name):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from eqns_of(inner, name)


def test_a_narrow_layer_multiplies_narrow_and_gives_its_gradients_in_float32_without_rounding():
    """So that sums over devices are float32, which would be where the parts of a gradient are added."""
    layer = dense(4, "layer", dtype="bfloat16")
    x, g = draw(X, (*X[:-1], 4))
    params = layer.init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(layer.apply(params, x) * g.astype(jnp.bfloat16))

    closed = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x)
    products = list(eqns_of(closed.jaxpr, "dot_general"))
    assert len(products) == 3  # forward, and one for each factor
    for eqn in products:
        assert {str(v.aval.dtype) for v in eqn.invars} == {"bfloat16"}
        assert eqn.outvars[0].aval.dtype == jnp.float32
    produced = {eqn.outvars[0]: eqn for eqn in closed.jaxpr.eqns}
    for out in closed.jaxpr.outvars[:2]:  # of bias and kernel: last made by a sum, not by a conversion
        assert out.aval.dtype == jnp.float32
        assert produced.get(out) is None or produced[out].primitive.name != "convert_element_type"


def test_a_tangent_along_the_input_alone_costs_one_product_more():
    kernel = draw(KERNEL)[0]
    closed = jax.make_jaxpr(lambda x: jax.jvp(lambda x: product(x, kernel, "bfloat16"), (x,), (x,)))(jnp.ones(X))
    assert len(list(eqns_of(closed.jaxpr, "dot_general"))) == 2


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("float64", "HIGHEST"), ("bfloat16", None)])
def test_float32_is_asked_for_where_it_is_promised(dtype, precision):
    with x64():
        closed = jax.make_jaxpr(lambda x, k: product(x, k, dtype))(jnp.ones(X), jnp.ones(KERNEL))
    (eqn,) = eqns_of(closed.jaxpr, "dot_general")
    asked = {p.name for p in eqn.params["precision"] or ()} - {"DEFAULT"}
    assert asked == ({precision} if precision else set())

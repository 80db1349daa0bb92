"""The tangent of the consistency loss costs work, but hardly any memory: its gradient keeps nothing of it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from rcm_jax import models
from rcm_jax.method.objectives import scm
from rcm_jax.models import wan
from tests import tiny
from tests import wan as tiny_wan

# Compiling takes half the time without most of XLA's optimisations.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

MODEL = wan.WanConfig(
    dim=64, ffn_dim=256, num_heads=2, num_layers=8, in_dim=4, out_dim=4, text_dim=8, text_len=8, freq_dim=16,
    remat="full", attention="blockwise",
)  # fmt: skip
BATCH, GRID = 2, (4, 16, 16)


def without_tangent(F, params, x_t, t, cond, F_teacher):
    """In the place of scm.jvp_derivative: the same loss but for dF = 0."""
    out = F(params, x_t, t, cond)
    return out, jnp.zeros_like(out)


def compiled_gradient(derivative):
    """The compiled gradient of the sCM loss in the parameters, of shapes alone."""
    F = tiny_wan.velocity(MODEL)

    def loss(params, x_t, t, text, F_teacher):
        return jnp.mean(scm.loss(F, params, x_t, t, {"text": text}, F_teacher, r=1.0, derivative=derivative)[0])

    params = nn.meta.unbox(jax.eval_shape(functools.partial(models.init, MODEL), jax.random.key(0)))
    shapes = (BATCH, *GRID, 4), (BATCH,), (BATCH, 8, 8), (BATCH, *GRID, 4)
    return jax.jit(jax.grad(loss)).lower(params, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def test_the_gradient_with_the_tangent_inside_needs_hardly_more_memory(monkeypatch):
    monkeypatch.setitem(scm.DERIVATIVES, "none", without_tangent)
    ours, plain = compiled_gradient("jvp"), compiled_gradient("none")
    size, plain_size = (program.memory_analysis().temp_size_in_bytes for program in (ours, plain))
    assert plain_size > 2 * 8 * BATCH * 256 * 64 * 4  # at least what the scan keeps: x of every block, and some
    assert size <= 1.25 * plain_size, f"{size / plain_size:.2f}"
    # The tangent is there: twice the forward pass and more of 1 + 1 + 2 (forward, again, backward).
    assert ours.cost_analysis()["flops"] > 1.2 * plain.cost_analysis()["flops"]

"""Adapters beside the kernels of any network: values, tangents and gradients of W + scale·A·B, never formed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.models import adapters, network_of
from rcm_jax.models.adapters import Adapted, AdapterConfig
from rcm_jax.models.edm_unet import EdmConfig
from rcm_jax.models.mlp import MLPConfig
from tests import adapters as ours
from tests import cosmos, tiny, wan

NETWORKS = {"wan": wan.TINY, "dit": tiny.MODEL, "cosmos": cosmos.TINY, "mlp": MLPConfig(num_classes=3, dim=8)}
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
# They share their dense layers: one network with a stack of blocks is enough for every day.
every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("wan", "mlp") else pytest.mark.slow) for name in NETWORKS]
)


def given(model):
    """(x, t, conditions) for a network."""
    for module in (cosmos, wan):
        if type(model) is type(module.TINY):
            return module.inputs(model)
    shape = (2,) if isinstance(model, MLPConfig) else tiny.SHAPE
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, *shape)))
    return x, jnp.linspace(0.1, 1.5, 3), {"label": jnp.arange(3)}


def applied(model):
    """(F(params, x, t), a base of which nothing is zero, x, t)."""
    module, (x, t, cond) = network_of(model).module(model), given(model)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, t, **cond))["params"]
    rng = np.random.default_rng(1)
    base = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape)), nn.meta.unbox(params))
    return (lambda params, x, t: module.apply({"params": adapters.whole(params)}, x, t, **cond)), base, x, t


@every_network
def test_value_tangent_and_gradients_are_those_of_the_merged_kernels(name):
    with tiny.x64():
        model, config = ours.with_dtype(NETWORKS[name], "float64"), AdapterConfig(rank=3, alpha=2.0)
        F, base, x, t = applied(model)
        adapter = ours.drawn(model, config, dtype="float64")
        x, t = x.astype(jnp.float64), t.astype(jnp.float64)
        tangents = (jnp.cos(x), jnp.ones_like(t))

        def value(adapter, merge):
            params = ours.merged(base, adapter, config.scale) if merge else Adapted(base, adapter, config.scale)
            y, dy = jax.jvp(lambda x, t: F(params, x, t), (x, t), tangents)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(dy)), (y, dy)

        beside, formed = (jax.jit(jax.grad(value, has_aux=True), static_argnums=1)(adapter, m) for m in (False, True))
        plainly = F(base, x, t)
    assert tiny.relative(beside[1][0], plainly) > 0.01
    for a, b in zip(jax.tree.leaves(beside), jax.tree.leaves(formed), strict=True):
        assert a.dtype == np.float64
        assert tiny.relative(a, b) < 1e-11


@every_network
def test_an_adapter_as_it_is_first_drawn_changes_no_bit(name):
    model = NETWORKS[name]
    F, base, x, t = applied(model)
    config = AdapterConfig(rank=2, alpha=7.0)
    adapter = nn.meta.unbox(adapters.init(config, network_of(model).adapted, ours.boxed(model), jax.random.key(5)))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(adapter))
    np.testing.assert_array_equal(F(Adapted(base, adapter, config.scale), x, t), F(base, x, t))


def test_a_is_drawn_within_one_over_the_root_of_its_inputs_and_layers_differ():
    adapter = nn.meta.unbox(
        adapters.init(AdapterConfig(rank=8), ("blocks/mlp/*",), ours.boxed(wan.TINY), jax.random.key(0))
    )
    down = np.asarray(adapter["blocks"]["mlp"]["up"]["lora_a"])
    assert down.shape == (2, 24, 8) and not np.array_equal(*down)
    assert 0.9 < np.abs(down).max() * np.sqrt(24) <= 1
    assert adapter["blocks"]["mlp"].keys() == {"up", "down"} and adapter["blocks"].keys() == {"mlp"}


def test_kernels_of_a_config_are_found_by_name():
    def targets(model, **settings):
        return set(adapters.targets_of(AdapterConfig(**settings), network_of(model).adapted, ours.boxed(model)))

    attention = {f"blocks/{kind}_attention/{part}" for kind in ("self", "cross") for part in ("q", "k", "v", "out")}
    assert targets(wan.TINY, rank=2) == attention | {"blocks/mlp/up", "blocks/mlp/down"}
    assert targets(wan.TINY, rank=2, targets=("blocks/*/q", "time_in")) == {
        "blocks/self_attention/q", "blocks/cross_attention/q", "time_in",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"'blocks/nothing' is no module with a kernel; they are .*blocks/mlp/up"):
        targets(wan.TINY, rank=2, targets=("blocks/nothing",))
    with pytest.raises(ValueError, match=r"rank 25 is more than blocks/.* has, of 24 × .*: 24 at most"):
        targets(wan.TINY, rank=25)
    edm = EdmConfig(img_resolution=8, model_channels=32, channel_mult=(1,), num_blocks=1)
    with pytest.raises(ValueError, match="no kernels that take adapters"):
        targets(edm, rank=2)

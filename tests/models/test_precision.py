"""Products of float32 say so: TPUs make them in bfloat16 unless asked, and GPUs in TF32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from rcm_jax import models
from rcm_jax.models import layers, mlp, t5, wan_vae
from rcm_jax.models.classifier import ClassifierNet
from tests import tiny
from tests.cosmos import TINY as COSMOS
from tests.edm2 import TINY as EDM2
from tests.wan import TINY as WAN

TEXT = t5.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
VAE = wan_vae.WanVAEConfig(dim=4, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
NETWORKS = {"wan": WAN, "cosmos": COSMOS, "dit": tiny.MODEL}
NETWORKS |= {"edm2": EDM2, "mlp": mlp.MLPConfig(num_classes=2, dim=8, num_layers=1)}


def products(jaxpr):
    """(dtypes of the operands, precision) of all products and convolutions."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            asked = eqn.params["precision"]
            yield {str(v.aval.dtype) for v in eqn.invars}, set(asked if isinstance(asked, tuple) else [asked])
        for inner in core.jaxprs_in_params(eqn.params):
            yield from products(inner)


def assert_exact(function, *args, narrow=False):
    """Of float32 operands; `narrow`: there are others as well."""
    found = list(products(jax.make_jaxpr(function)(*args).jaxpr))
    wide = [precision for dtypes, precision in found if "bfloat16" not in dtypes]
    assert wide and (len(wide) < len(found)) == narrow
    assert all(precision == {jax.lax.Precision.HIGHEST} for precision in wide)


def abstract(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_float32_layers_and_their_derivatives_ask_for_float32(name, dtype, monkeypatch):
    """In bfloat16: time embedding, modulation and head. (Attention has a test of its own.)"""
    monkeypatch.setattr(layers, "flash_attention", lambda q, k, v, **_: q)
    config = NETWORKS[name]
    config = type(config)(**{**vars(config), "dtype": dtype})
    record = models.network_of(config)
    module, shape = record.module(config), record.smallest(config)
    cond = {key: abstract((2, *leaf.shape), leaf.dtype) for key, leaf in record.conditions(config, shape).items()}
    x, t = abstract((2, *shape)), abstract((2,))
    params = jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args[:2], **args[2]), x, t, cond)

    def loss(params, x, t, cond):
        F, dF = jax.jvp(lambda x, t: module.apply(params, x, t, **cond), (x, t), (x, t))
        return jnp.sum(F * jax.lax.stop_gradient(dF))

    assert_exact(jax.grad(loss), params, x, t, cond, narrow=dtype == "bfloat16")


def test_so_do_text_encoder_autoencoder_and_the_judge():
    ids = jnp.zeros((1, 4), jnp.int32)
    encoder = t5.T5Encoder(TEXT)
    assert_exact(lambda p: encoder.apply(p, ids, ids), jax.eval_shape(encoder.init, jax.random.key(0), ids, ids))
    params = jax.eval_shape(lambda key: wan_vae.init(VAE, key), jax.random.key(0))
    params = {half: {"params": jax.tree.map(lambda x: x, tree)} for half, tree in params.items()}
    assert_exact(lambda p, x: wan_vae.Encoder(VAE).apply(p, x, {})[0], params["encoder"], abstract((1, 5, 8, 8, 3)))
    assert_exact(lambda p, x: wan_vae.Decoder(VAE).apply(p, x, {})[0], params["decoder"], abstract((1, 2, 1, 1, 4)))
    judge, x = ClassifierNet(3), jnp.asarray(np.zeros((1, 8, 8, 1), np.float32))
    assert_exact(lambda p: judge.apply(p, x), jax.eval_shape(judge.init, jax.random.key(0), x))

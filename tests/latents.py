"""Latents, a network on them that compiles in a moment, and the published weights that runs on them ask for."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import methods, wan_1_3b
from rcm_jax import convert
from rcm_jax.convert.files import write_tensors
from rcm_jax.models import NETWORKS, wan_vae
from rcm_jax.models.layers import dense
from rcm_jax.models.records import Network
from rcm_jax.run import workdir
from rcm_jax.run.experiment import Experiment, Predictor
from rcm_jax.run.program import make_network, zeros
from rcm_jax.util.config import revise
from tests import tiny

SHAPE, TEXT = (2, 4, 6, 4), (6, 8)


@dataclasses.dataclass(frozen=True)
class BlendConfig:
    """Of `Blend`."""


class Blend(nn.Module):
    """One layer, of every place and the mean of the text: hardly a network."""

    config: BlendConfig

    @nn.compact
    def __call__(self, x, t, text):
        places = (*x.shape[:-1], 1)
        time, words = (v.reshape(-1, 1, 1, 1, 1) for v in (t, text.mean(axis=(1, 2))))
        features = [x, jnp.broadcast_to(jnp.sin(time), places), jnp.broadcast_to(words, places)]
        return dense(SHAPE[-1], "out", dtype="float32", axes=("features", "embed"))(jnp.concatenate(features, -1))


BLEND = Network(
    config=BlendConfig,
    module=Blend,
    conditions=lambda config, shape: {"text": jax.ShapeDtypeStruct(TEXT, jnp.float32)},
    smallest=lambda config: (1, 1, 1, SHAPE[-1]),
)


def add_network(monkeypatch) -> None:
    """The network, as config.model.kind=blend."""
    monkeypatch.setitem(NETWORKS, "blend", BLEND)


def given(tmp_path_factory):
    """As a fixture: the folder with all that a run reads, and the network in its table."""
    with pytest.MonkeyPatch.context() as patch:
        add_network(patch)
        folder = tmp_path_factory.mktemp("given")
        write_all(folder)
        yield folder


def write_all(folder, examples: int = 12) -> None:
    """Latents, a teacher, and the published weights of an autoencoder that fits them."""
    rng, run = np.random.default_rng(0), wan_1_3b.tiny(wan_1_3b.EXPERIMENT)
    tiny.write_latents(folder / "latents", rng.normal(size=(examples, *SHAPE)), rng.normal(size=(examples, *TEXT)))
    network = make_network(Predictor(BlendConfig()), zeros(Predictor(BlendConfig()), SHAPE).first)
    params = jax.tree.map(lambda x: np.asarray(x) + 0.3, network.make_params(jax.random.key(0)))
    workdir.write_converted(folder / "teacher", Predictor(BlendConfig()), params)
    write_vae(folder / "vae.safetensors", run.media.vae)


def write_vae(path, config) -> None:
    """Random weights of an autoencoder as they are published."""
    params = jax.tree.map(np.asarray, tiny.random_params(wan_vae.init, config))
    write_tensors(path, convert.to_reference("wan_vae", params, config, "official"))


def experiment(folder, *, vae: bool = True, **changes) -> Experiment:
    """Six steps of dCM by the network on what write_all wrote in a folder; changes: as revise takes them."""
    run = methods.choose(wan_1_3b.tiny(wan_1_3b.EXPERIMENT), "dcm", {})
    given = {
        "model": BlendConfig(),
        "parametrization": "trigflow",
        "time_scale": 1.0,
        "data.path": str(folder / "latents"),
        "teacher": str(folder / "teacher"),
        "teacher_dtype": "float32",
        "media.vae_path": str(folder / "vae.safetensors") if vae else "",
        "sampling.teacher_steps": 5,
    }
    train = revise(run.train, {"steps": 6, "sample_every": 3, "log_every": 2, "asynchronous": False})
    return revise(revise(run, given | {"train": train}), changes)

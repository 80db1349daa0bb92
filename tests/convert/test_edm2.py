"""Conversion of EDM2 networks: every tensor of the full-size ones, round trips, and configs from the reference's."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert import edm2
from rcm_jax.models.edm2_unet import PUBLISHED
from tests.edm2 import TINY, golden_case, random_params
from tests.tiny import assert_trees_equal, cases, stem


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize("path", cases("checkpoint_index/edm2_*.json"), ids=stem)
def test_every_tensor_of_the_full_size_networks_has_one_place(path):
    config, names = PUBLISHED[path.stem.replace("_", "-")], json.loads(path.read_text())
    recorded = json.loads((path.parent / "index_sCM.json").read_text())[path.stem]
    entries = convert.entries("edm2", config)["official"]
    assert {name: list(entry.shape) for name, entry in entries.items()} == names
    abstract = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.float16) for name, shape in names.items()}
    assert convert.recognise("edm2", abstract, config) == "official"
    assert len({entry.rule.ours for entry in entries.values()}) == len(names) == recorded["tensors"]
    trained = [shape for name, shape in names.items() if name not in recorded["buffers"]]
    assert sum(map(math.prod, trained)) == recorded["params"]
    assert edm2.config_of(recorded["config"]) == config


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("edm2_unet/*.config.json"), ids=stem)
def test_recorded_weights_round_trip_to_the_bit(path):
    case = path.with_name(path.name.replace(".config.json", ".npz"))
    tensors, (config, params) = load_file(case.with_suffix(".safetensors")), golden_case(case)
    back = convert.to_reference("edm2", params, config, "official")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    assert edm2.config_of(json.loads(json.dumps(edm2.described(config, "official")))) == config


def test_what_scm_adds_round_trips_and_takes_the_place_of_random_features():
    params = jax.tree.map(np.asarray, random_params())
    tensors = convert.to_reference("edm2", params, TINY, "official")
    assert tensors["unet.emb_guidance.weight"].shape == (16, 8) and tensors["unet.guidance_gain"].shape == ()
    assert "unet.emb_fourier.freqs" not in tensors and tensors["logvar_fourier.freqs"].shape == (4,)
    assert_trees_equal(convert.from_reference("edm2", tensors, TINY), params)
    qkv = params["enc_4x4_block0"]["attn_qkv"]["kernel"][0, 0]  # [in, out] there, [out, in, 1, 1] here
    np.testing.assert_array_equal(tensors["unet.enc.4x4_block0.attn_qkv.weight"][..., 0, 0], qkv.T)
    tensors["unet.extra"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"unet\.extra: unexpected, of shape \[3\]"):
        convert.from_reference("edm2", tensors, TINY)


def test_keywords_of_the_reference_are_a_config_or_refused_by_name():
    sizes = {
        "img_resolution": 64,
        "img_channels": 4,
        "label_dim": 1000,
        "model_channels": 256,
        "resample_filter": [1, 1],
    }
    rest = {"class_name": "training.networks_edm2.Precond", "use_fp16": True, "sigma_data": 0.5, "dropout": 0.1}
    assert edm2.config_of(sizes | rest) == PUBLISHED["edm2-img512-m"]
    with pytest.raises(ValueError, match="Precond: unknown key augment_dim"):
        edm2.config_of(sizes | {"augment_dim": 9})
    with pytest.raises(ValueError, match=r"resample_filter \[1, 3, 3, 1\] is not supported: it must be \[1, 1\]"):
        edm2.config_of(sizes | {"resample_filter": [1, 3, 3, 1]})

"""Conversion of the video autoencoder of Wan2.2: every tensor of the real one, and round trips."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert import wan22_vae
from rcm_jax.models.wan22_vae import PUBLISHED
from tests.tiny import assert_trees_equal, cases, stem
from tests.wan22_vae import TINY, golden_config, random_params

KIND = "wan22_vae"


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("checkpoint_index/*wan2.2_vae.json"), ids=stem)
def test_every_tensor_of_the_real_checkpoints_has_one_place(path):
    config, layout = PUBLISHED["wan2.2-vae"], "diffusers" if path.stem.startswith("diffusers") else "official"
    names = json.loads(path.read_text())
    entries = convert.entries(KIND, config)[layout]
    assert {name: list(entry.shape) for name, entry in entries.items()} == names
    abstract = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.bfloat16) for name, shape in names.items()}
    assert convert.recognise(KIND, abstract, config) == layout
    recorded = json.loads((path.parent / "index.json").read_text())[path.stem]
    assert recorded["params"] == sum(map(math.prod, convert.shapes_of(KIND, config).values()))
    described = wan22_vae.described(config, layout)
    if layout == "diffusers":
        assert recorded["config"].items() <= described.items()
        assert json.loads(json.dumps(described)) == described and described["scale_factor_spatial"] == 16
    else:
        assert type(config)(**recorded["config"]) == config and not described


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("wan22_vae/*.safetensors"), ids=stem)
def test_recorded_weights_of_both_layouts_are_the_same_parameters_and_round_trip_to_the_bit(path):
    config, official = golden_config(path), load_file(path)
    names = json.loads(path.with_suffix(".diffusers_names.json").read_text())
    files = {"official": official, "diffusers": {theirs: official[ours] for theirs, ours in names.items()}}
    assert len(files["diffusers"]) == len(official)
    params = []
    for layout, tensors in files.items():
        assert convert.recognise(KIND, tensors, config) == layout
        params.append(convert.from_reference(KIND, tensors, config))
        assert_trees_equal(convert.to_reference(KIND, params[-1], config, layout), tensors)
    assert_trees_equal(*params)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_random_weights_round_trip_and_those_of_wan21_are_refused(layout):
    params = jax.tree.map(np.asarray, random_params())
    tensors = convert.to_reference(KIND, params, TINY, layout)
    assert_trees_equal(convert.from_reference(KIND, tensors, TINY), params)
    with pytest.raises(ValueError, match="are no wan_vae of this config"):
        convert.recognise("wan_vae", tensors, convert.PUBLISHED_AROUND["wan2.1-vae"][1])

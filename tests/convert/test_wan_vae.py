"""Conversion of the video autoencoder: every tensor of the real one, and round trips."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert import wan_vae
from rcm_jax.models.wan_vae import PUBLISHED
from tests.tiny import assert_trees_equal, cases, stem
from tests.wan_vae import TINY, golden_config, random_params

LAYOUTS = ("official", "diffusers")


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize("path", cases("checkpoint_index/*wan2.1_vae.json"), ids=stem)
def test_every_tensor_of_the_real_checkpoints_has_one_place(path):
    config, layout = PUBLISHED["wan2.1-vae"], "diffusers" if path.stem.startswith("diffusers") else "official"
    names = json.loads(path.read_text())
    entries = convert.entries("wan_vae", config)[layout]
    assert {name: list(entry.shape) for name, entry in entries.items()} == names
    abstract = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.bfloat16) for name, shape in names.items()}
    assert convert.recognise("wan_vae", abstract, config) == layout
    recorded = json.loads((path.parent / "index.json").read_text())[path.stem]
    assert recorded["params"] == sum(map(math.prod, convert.shapes_of("wan_vae", config).values()))
    if layout == "diffusers":
        described = wan_vae.described(config, layout)
        assert recorded["config"].items() <= described.items()
        assert json.loads(json.dumps(described)) == described
    else:
        assert type(config)(**recorded["config"]) == config


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("wan_vae/*.diffusers.safetensors"), ids=stem)
def test_recorded_weights_of_both_layouts_are_the_same_parameters_and_round_trip_to_the_bit(path):
    official = path.with_name(path.name.replace(".diffusers", ""))
    config, params = golden_config(official.with_suffix(".config.json")), {}
    for layout, file in zip(LAYOUTS, (official, path), strict=True):
        tensors = load_file(file)
        assert convert.recognise("wan_vae", tensors, config) == layout
        params[layout] = convert.from_reference("wan_vae", tensors, config)
        assert_trees_equal(convert.to_reference("wan_vae", params[layout], config, layout), tensors)
    assert_trees_equal(*params.values())


@pytest.mark.parametrize("changes", [{}, dict(num_res_blocks=3, dim_mult=(1, 2), temperal_downsample=(True,))], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_weights_of_other_sizes_round_trip(layout, changes):
    config = dataclasses.replace(TINY, **changes)
    params = jax.tree.map(np.asarray, random_params(config))
    tensors = convert.to_reference("wan_vae", params, config, layout)
    assert_trees_equal(convert.from_reference("wan_vae", tensors, config), params)
    leaves = jax.tree.leaves(params)
    assert all(any(np.shares_memory(tensor, leaf) for leaf in leaves) for tensor in tensors.values())
    del tensors["encoder.conv1.bias" if layout == "official" else "encoder.conv_in.bias"]
    with pytest.raises(ValueError, match=rf"nearest is the layout '{layout}', with 1 problems:\n.*: missing"):
        convert.from_reference("wan_vae", tensors, config)


def test_axes_go_where_they_belong():
    tensors = convert.to_reference("wan_vae", jax.tree.map(np.asarray, random_params()), TINY, "official")
    params = convert.from_reference("wan_vae", tensors, TINY)["encoder"]
    kernel, theirs = params["conv_in"]["kernel"], tensors["encoder.conv1.weight"]
    assert kernel.shape == (3, 3, 3, 3, 4) and kernel[2, 0, 1, 1, 3] == theirs[3, 1, 2, 0, 1]
    kernel, theirs = params["stage_0_resample"]["conv"]["kernel"], tensors["encoder.downsamples.1.resample.1.weight"]
    assert kernel[0, 2, 1, 3] == theirs[3, 1, 0, 2]
    assert tensors["encoder.head.0.gamma"].shape == (12, 1, 1, 1)
    assert tensors["encoder.middle.1.norm.gamma"].shape == (12, 1, 1)


def test_it_is_no_generator_to_be_distilled(tmp_path):
    path = tmp_path / "model.json"
    path.write_text('{"kind": "wan_vae"}')
    with pytest.raises(ValueError, match=r"its kind is 'wan_vae'; it must be one of wan, cosmos, edm, edm2$"):
        convert.named(str(path))

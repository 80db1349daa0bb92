"""Conversion of Cosmos checkpoints: every tensor of the real ones, and round trips."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert import cosmos
from rcm_jax.models.cosmos import PUBLISHED
from tests.cosmos import TINY, golden_config, random_params
from tests.tiny import assert_trees_equal, cases, stem


def name_of(path) -> str:
    """Of the published network that a file lists."""
    return f"cosmos-{'v2w-' if 'video2world' in path.stem else ''}{path.stem.rpartition('_')[2].lower()}"


INDEX = {path: name_of(path) for path in cases("checkpoint_index/*cosmos_*.json")}


@pytest.mark.golden
@pytest.mark.parametrize("path", INDEX, ids=stem)
def test_every_tensor_of_the_real_checkpoints_has_one_place(path):
    config, layout = PUBLISHED[INDEX[path]], "diffusers" if path.stem.startswith("diffusers") else "official"
    names = json.loads(path.read_text())
    recorded = json.loads((path.parent / "index.json").read_text())[path.stem]
    buffers = {name for name in names if cosmos.IGNORED.fullmatch(name)}
    assert buffers == set(recorded["buffers"])
    entries = convert.entries("cosmos", config)[layout]
    assert {name: list(entry.shape) for name, entry in entries.items()} == {
        name: shape for name, shape in names.items() if name not in buffers
    }
    abstract = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.bfloat16) for name, shape in names.items()}
    assert convert.recognise("cosmos", {f"net.{name}": leaf for name, leaf in abstract.items()}, config) == layout
    assert recorded["params"] == sum(map(math.prod, convert.shapes_of("cosmos", config).values()))
    if layout == "diffusers":
        assert recorded["config"].items() <= cosmos.described(config, layout).items()
    else:
        shared = recorded["config"].keys() & vars(config).keys()
        theirs = {name: recorded["config"][name] for name in shared}
        free = {"crossattn_proj_in_channels", "max_img_h", "max_img_w"}  # said otherwise, to the same effect
        assert {k: v for k, v in theirs.items() if k not in free} == {k: getattr(config, k) for k in shared - free}


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("cosmos_dit/*_tiny.safetensors"), ids=stem)
def test_recorded_weights_of_both_layouts_are_the_same_parameters_and_round_trip_to_the_bit(path):
    config = golden_config(path.with_suffix(".config.json"))
    files = {"official": path, "diffusers": path.with_suffix(".diffusers.safetensors")}
    params = {}
    for layout, file in files.items():
        tensors = load_file(file)
        params[layout] = convert.from_reference("cosmos", tensors, config)
        back = convert.to_reference("cosmos", params[layout], config, layout)
        lost = tensors.keys() - back.keys()
        assert all(cosmos.IGNORED.fullmatch(name) for name in lost) and not back.keys() - tensors.keys()
        for name, tensor in back.items():
            np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    assert_trees_equal(params["official"], params["diffusers"])


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_random_weights_round_trip_through_a_layout(layout):
    params = jax.tree.map(np.asarray, random_params())
    tensors = convert.to_reference("cosmos", params, TINY, layout)
    assert_trees_equal(convert.from_reference("cosmos", tensors, TINY), params)
    tensors["blocks.0.cross_attn._extra_state"] = np.zeros(3)
    assert_trees_equal(convert.from_reference("cosmos", tensors, TINY), params)
    tensors["blocks.0.cross_attn.extra"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"blocks\.0\.cross_attn\.extra: unexpected, of shape \[3\]"):
        convert.from_reference("cosmos", tensors, TINY)

"""Conversion of EDM's U-Nets: every tensor of the published ones, their snapshots, and round trips."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert, models
from rcm_jax.convert import edm
from rcm_jax.convert.files import open_tensors
from rcm_jax.models.edm_unet import PUBLISHED
from rcm_jax.parallel.sharding import RULES, MeshConfig, make_mesh, partition_spec
from tests.edm import SMALL, golden_config, random_params
from tests.tiny import assert_trees_equal, cases, stem
from tests.torch_pickle import nested_modules, pickled

INDEX = {path: path.stem.replace("_", "-") for path in cases("checkpoint_index/edm_*.json")}
INDEX = {path: name.removesuffix("-ddpmpp").removesuffix("-ncsnpp") for path, name in INDEX.items()}


@pytest.mark.golden
@pytest.mark.parametrize("path", INDEX, ids=stem)
def test_every_tensor_of_the_published_networks_has_one_place(path):
    config, names = PUBLISHED[INDEX[path]], json.loads(path.read_text())
    recorded = json.loads((path.parent / "index_sCM.json").read_text())[path.stem]
    buffers = {name for name in names if edm.IGNORED.fullmatch(name)}
    frequencies = names.keys() & {"model.map_noise.freqs"}
    known = recorded["buffers"]
    assert len(buffers | frequencies) == known["count"] if "count" in known else buffers | frequencies == {*known}
    entries = convert.entries("edm", config)["official"]
    assert {f"model.{name}": list(entry.shape) for name, entry in entries.items()} == {
        name: shape for name, shape in names.items() if name not in buffers
    }
    abstract = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for name, shape in names.items()}
    assert convert.recognise("edm", abstract, config) == "official"
    ours = sum(map(math.prod, convert.shapes_of("edm", config).values()))
    assert recorded["params"] == ours - (config.model_channels if frequencies else 0)
    assert edm.config_of(recorded["config"]) == config
    described = edm.described(config, "official")
    assert {name: described[name] for name in recorded["config"].keys() - {"dropout"}}.items() <= recorded[
        "config"
    ].items()
    assert edm.config_of(described) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_has_known_axes_and_every_large_one_is_split(name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, seq=2))
    boxed = jax.eval_shape(lambda key: models.init(PUBLISHED[name], key), jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert set(leaf.names) <= set(RULES) and len(leaf.names) == leaf.value.ndim, path
        assert leaf.value.dtype == jnp.float32, path
        whole = not any(partition_spec(leaf.names, leaf.value.shape, mesh))
        assert not whole or leaf.value.size <= 2**14, path


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("edm_unet/*.safetensors"), ids=stem)
def test_recorded_weights_round_trip_also_from_a_snapshot(path, tmp_path):
    config, tensors = golden_config(path.with_name(f"{path.stem}.config.json")), load_file(path)
    params = convert.from_reference("edm", tensors, config)
    back = convert.to_reference("edm", params, config, "official")
    lost = tensors.keys() - {f"model.{name}" for name in back}
    assert all(edm.IGNORED.fullmatch(name) for name in lost)
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[f"model.{name}"], err_msg=name)
    (tmp_path / "edm.pkl").write_bytes(pickled({"ema": nested_modules(tensors)}))
    opened = open_tensors(tmp_path / "edm.pkl")
    assert convert.recognise("edm", opened, config) == "official"
    assert_trees_equal(convert.from_reference("edm", opened, config), params)


def test_what_the_reference_lacks_is_described_and_its_other_arguments_are_dropped():
    params = jax.tree.map(np.asarray, random_params())
    tensors = convert.to_reference("edm", params, SMALL, "official")
    assert tensors["map_guidance.weight"].shape == (8, 8)
    assert_trees_equal(convert.from_reference("edm", tensors, SMALL), params)
    described = edm.described(SMALL, "official")
    assert described.keys() & {*edm.OURS, *edm.COMPUTED} == {*edm.OURS}
    assert edm.config_of(json.loads(json.dumps(described)) | {"dropout": 0.13, "use_fp16": True}) == SMALL
    with pytest.raises(ValueError, match="EDMPrecond: unknown key layers"):
        edm.config_of({"img_resolution": 8, "layers": 3})


def test_a_network_without_its_wrapper_and_inside_comfyui_are_told_apart():
    tensors = {f"model.{name}": np.zeros(1) for name in ("a", "b")}
    assert convert.parameters("edm", tensors).keys() == {"a", "b"}
    inner = {f"model.diffusion_model.{name}": np.zeros(1) for name in ("a", "b")}
    assert convert.parameters("wan", inner).keys() == {"a", "b"}
    with pytest.raises(ValueError, match=r"several prefixes, model\.diffusion_model\., model\."):
        convert.parameters("wan", tensors | inner)

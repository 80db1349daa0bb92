"""Conversion of text encoders: every tensor of the real ones, round trips, and the names that files hold besides."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert import t5
from rcm_jax.models.t5 import PUBLISHED
from tests.t5 import TINY, config_from, golden_config, random_params
from tests.tiny import assert_trees_equal, cases, stem

ALIAS, FIRST = "encoder.embed_tokens.weight", "shared.weight"


def published(path) -> str:
    """The name in PUBLISHED of an entry of the index."""
    return path.stem.removeprefix("transformers_").removesuffix("_encoder").replace("_", "-")


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("checkpoint_index/*_encoder.json"), ids=stem)
def test_every_tensor_of_the_real_checkpoints_has_one_place(path):
    kind, config = convert.PUBLISHED_AROUND[published(path)]
    names = json.loads(path.read_text())
    recorded = json.loads((path.parent / "index.json").read_text())[path.stem]
    layout = "official" if "dim_attn" in recorded["config"] else "transformers"
    abstract = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.bfloat16) for name, shape in names.items()}
    assert convert.recognise(kind, abstract, config) == layout
    entries = convert.entries(kind, config)[layout]
    shapes = {name: shape for name, shape in names.items() if name != ALIAS}
    assert {name: list(entry.shape) for name, entry in entries.items()} == shapes
    assert recorded["params"] == sum(map(math.prod, convert.shapes_of(kind, config).values()))
    if layout == "official":
        assert config_from(recorded["config"]) == config and not t5.described(config, layout)
    else:
        assert recorded["config"].items() <= t5.described(config, layout).items()


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("text_encoders/*.safetensors"), ids=stem)
def test_recorded_weights_round_trip_to_the_bit(path):
    config, tensors = golden_config(path.with_suffix(".config.json")), load_file(path)
    layout = convert.recognise(config.model_type, tensors, config)
    params = convert.from_reference(config.model_type, tensors, config)
    back = convert.to_reference(config.model_type, params, config, layout)
    assert tensors.keys() - back.keys() <= {ALIAS} and not back.keys() - tensors.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("text_encoders/rcm_*.safetensors"), ids=stem)
def test_both_layouts_of_an_encoder_are_the_same_parameters(path):
    config = golden_config(path.with_suffix(".config.json"))
    other = path.with_name(path.name.removeprefix("rcm_"))
    assert golden_config(other.with_suffix(".config.json")) == config
    files = {"official": load_file(path), "transformers": load_file(other)}
    assert [convert.recognise("umt5", tensors, config) for tensors in files.values()] == list(files)
    assert_trees_equal(*(convert.from_reference("umt5", tensors, config) for tensors in files.values()))


def test_an_embedding_under_either_name_or_both_is_read_and_two_that_differ_are_refused():
    params = random_params()
    tensors = convert.to_reference("umt5", params, TINY, "transformers")
    alone = {ALIAS if name == FIRST else name: tensor for name, tensor in tensors.items()}
    for held in (tensors, alone, tensors | alone, alone | tensors):
        assert_trees_equal(convert.from_reference("umt5", held, TINY), params)
    with pytest.raises(ValueError, match=f"{ALIAS} and {FIRST} must be the same.*differ"):
        convert.from_reference("umt5", tensors | {ALIAS: tensors[FIRST] + 1}, TINY)
    with pytest.raises(ValueError, match=r"shared\.weight: missing"):
        convert.from_reference("umt5", {name: t for name, t in tensors.items() if name != FIRST}, TINY)


def test_the_decoder_of_a_whole_model_is_passed_over_and_nothing_else():
    params = random_params()
    tensors = convert.to_reference("umt5", params, TINY, "transformers")
    rest = ("decoder.block.0.layer.0.SelfAttention.q.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert_trees_equal(convert.from_reference("umt5", tensors | dict.fromkeys(rest, np.zeros(3)), TINY), params)
    with pytest.raises(ValueError, match=r"encoder\.extra: unexpected, of shape \[3\]"):
        convert.from_reference("umt5", tensors | {"encoder.extra": np.zeros(3)}, TINY)


@pytest.mark.parametrize("name", PUBLISHED)
def test_encoders_are_not_to_be_converted_to_a_workdir(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is read as it is published"):
        convert.named(name)
    (tmp_path / "sizes.json").write_text(json.dumps({"kind": PUBLISHED[name].model_type}))
    with pytest.raises(ValueError, match=r"its kind is 'u?m?t5'; it must be one of wan, cosmos"):
        convert.named(str(tmp_path / "sizes.json"))

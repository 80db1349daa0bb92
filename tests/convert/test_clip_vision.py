"""Conversion of CLIP's image encoder: every tensor of the real one, round trips, and what whole models hold besides."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert import clip_vision
from rcm_jax.models.clip_vision import PUBLISHED
from tests.clip_vision import TINY, golden_config, random_params
from tests.tiny import assert_trees_equal, cases, stem

KIND = "clip_vision"


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("checkpoint_index/*wan_clip_vit_h.json"), ids=stem)
def test_every_tensor_of_the_real_checkpoints_has_one_place(path):
    config = PUBLISHED["wan-clip-vit-h"]
    layout = "transformers" if path.stem.startswith("transformers") else "official"
    names = json.loads(path.read_text())
    abstract = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.float16) for name, shape in names.items()}
    assert convert.recognise(KIND, abstract, config) == layout
    read = {name: shape for name, shape in names.items() if not clip_vision.IGNORED.fullmatch(name)}
    assert {name: list(entry.shape) for name, entry in convert.entries(KIND, config)[layout].items()} == read
    left = {name.split(".")[0] for name in names.keys() - read.keys()}
    assert left == ({"textual", "log_scale", "visual"} if layout == "official" else set())
    assert sum(map(math.prod, read.values())) == sum(map(math.prod, convert.shapes_of(KIND, config).values()))
    recorded = json.loads((path.parent / "index.json").read_text())[path.stem]["config"]
    described = clip_vision.described(config, layout)
    assert recorded.items() <= described.items() if layout != "official" else not described


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("clip_vision/*.transformers.safetensors"), ids=stem)
def test_recorded_weights_of_all_layouts_are_the_same_parameters_and_round_trip_to_the_bit(path):
    official = path.with_name(path.name.replace(".transformers", ""))
    config, params = golden_config(official), []
    files = {"official": load_file(official), "transformers": load_file(path)}
    files["transformers-5"] = {n.removeprefix("vision_model."): t for n, t in files["transformers"].items()}
    assert files.keys() == convert.entries(KIND, config).keys()
    for layout, tensors in files.items():
        assert convert.recognise(KIND, tensors, config) == layout
        params.append(convert.from_reference(KIND, tensors, config))
        back = convert.to_reference(KIND, params[-1], config, layout)
        read = {n: t for n, t in tensors.items() if not clip_vision.IGNORED.fullmatch(n)}
        assert_trees_equal(back, read)
    assert_trees_equal(params[0], params[1])
    assert_trees_equal(params[0], params[2])


def test_what_is_no_part_of_the_image_encoder_is_passed_over_and_nothing_else():
    params = random_params()
    tensors = convert.to_reference(KIND, params, TINY, "transformers")
    rest = ("text_model.embeddings.token_embedding.weight", "visual_projection.weight", "logit_scale")
    assert_trees_equal(convert.from_reference(KIND, tensors | dict.fromkeys(rest, np.zeros(3)), TINY), params)
    with pytest.raises(ValueError, match=r"vision_model\.extra: unexpected, of shape \[3\]"):
        convert.from_reference(KIND, tensors | {"vision_model.extra": np.zeros(3)}, TINY)
    with pytest.raises(ValueError, match=r"vision_model\.encoder\.layers\.1\.self_attn\.v_proj\.bias: missing"):
        lacking = {n: t for n, t in tensors.items() if n != "vision_model.encoder.layers.1.self_attn.v_proj.bias"}
        convert.from_reference(KIND, lacking, TINY)


def test_it_is_not_to_be_converted_to_a_workdir():
    with pytest.raises(ValueError, match="wan-clip-vit-h is read as it is published"):
        convert.named("wan-clip-vit-h")

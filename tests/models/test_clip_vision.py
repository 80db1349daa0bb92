"""The image encoder of CLIP: the reference's numbers, narrow dtypes, axes of parameters, and what it refuses."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.models.clip_vision import PUBLISHED, ClipVisionConfig, init
from rcm_jax.models.wan import CLIP_TOKENS
from rcm_jax.models.wan import PUBLISHED as WAN
from rcm_jax.parallel.sharding import MeshConfig, make_mesh, partition_spec
from tests import tiny
from tests.clip_vision import TINY, apply, golden_config, golden_params, random_params
from tests.tiny import cases, relative, stem
from tests.wan import precision

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
replace = dataclasses.replace

# float64: rounding, reached 7e-16. float32: reached 3e-7.
TOLERANCES = {"float64": 1e-13, "float32": 5e-6}


@pytest.mark.golden
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("path", cases("clip_vision/*.npz"), ids=stem)
def test_features_are_those_of_the_reference(path, dtype):
    data = np.load(path)
    sizes = [name.removeprefix("features_") for name in data if name.startswith("features_")]
    assert sizes
    with precision(dtype):
        config = golden_config(path, dtype=dtype)
        params = golden_params(path, config, dtype)
        for size in sizes:
            ours = apply(config, params, data[f"pixels_{size}"].astype(dtype))
            assert ours.dtype == dtype
            assert relative(ours, data[f"features_{size}"]) < TOLERANCES[dtype], size


def test_a_narrow_encoder_stays_close():
    config = replace(TINY, image_size=28)
    images = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    params = random_params(config)
    narrow = apply(replace(config, dtype="bfloat16"), params, images)
    assert narrow.dtype == jnp.bfloat16
    assert 1e-4 < relative(narrow, apply(config, params, images)) < 0.05


def test_the_published_encoder_makes_what_the_networks_ask_for():
    config = PUBLISHED["wan-clip-vit-h"]
    assert (config.tokens, config.hidden_size) == (CLIP_TOKENS, WAN["wan-i2v-14b"].clip_dim)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, seq=2))
    boxed = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert ("layers" in leaf.names) == (path[0].key == "blocks"), path
        assert any(partition_spec(leaf.names, leaf.value.shape, mesh)) or leaf.value.size < 2**20, path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_hidden_layers=1), "num_hidden_layers 1 must be at least 2: features are those before the last"),
        (dict(num_attention_heads=3), "num_attention_heads 3 does not divide hidden_size 8"),
        (dict(image_size=30), "patch_size 14 does not divide image_size 30"),
        (dict(hidden_size=0), "hidden_size is 0: it must be"),
        (dict(dtype="int8"), "dtype is 'int8': it must be one of"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ClipVisionConfig(**dataclasses.asdict(TINY) | changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[b, 224, 224, 3\], got \(1, 28, 28, 3\)"):
        apply(TINY, random_params(), np.zeros((1, 28, 28, 3)))

"""The text encoders: the reference's numbers, padding, narrow dtypes, and what they refuse."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.models.t5 import PUBLISHED, T5Config, T5Encoder, bucket_of_distance, init
from rcm_jax.parallel.sharding import MeshConfig, make_mesh, partition_spec
from tests import tiny
from tests.t5 import TINY, golden_config, golden_params, random_params
from tests.tiny import cases, relative, stem
from tests.wan import precision

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
replace = dataclasses.replace

# float64: rounding, reached 8e-16. float32: the suggested one, reached 5e-7.
TOLERANCES = {"float64": 1e-13, "float32": 5e-6}


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, ids, mask):
    return T5Encoder(config).apply({"params": params}, ids, mask)


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("path", cases("text_encoders/*.npz"), ids=stem)
def test_embeddings_are_those_of_the_reference(path, dtype):
    data = np.load(path)
    prefixes = [name.removesuffix("input_ids") for name in data if name.endswith("input_ids")]
    assert prefixes
    with precision(dtype):
        config = golden_config(path.with_suffix(".config.json"), dtype=dtype)
        params = golden_params(path.with_suffix(".safetensors"), config, dtype)
        for prefix in prefixes:
            ids, mask = (data[prefix + name].astype(np.int32) for name in ("input_ids", "attention_mask"))
            ours = np.asarray(apply(config, params, ids, mask))
            assert ours.dtype == dtype and not np.any(ours[mask == 0])
            (exact,) = [data[name] for name in data if name.startswith(prefix) and name.endswith("_f64")]
            assert relative(ours[mask == 1], exact[mask == 1]) < TOLERANCES[dtype], prefix
            (zeroed,) = [data[name] for name in data if name.startswith(f"{prefix}embedding_")]
            assert relative(ours, zeroed[:, : ids.shape[1]]) < TOLERANCES["float32"], prefix
            assert not np.any(zeroed[:, ids.shape[1] :])


@pytest.mark.golden
@pytest.mark.parametrize("path", [p for p in cases("text_encoders/*.npz") if "bucket_index" in np.load(p)], ids=stem)
def test_buckets_of_distances_are_those_of_the_reference(path):
    data = np.load(path)
    np.testing.assert_array_equal(bucket_of_distance(data["bucket_distance_key_minus_query"]), data["bucket_index"])


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
def test_padding_changes_nothing_whatever_its_length_and_tokens(model_type):
    config = replace(TINY, model_type=model_type)
    params, ids = random_params(config), np.array([[5, 3, 9, 1]], np.int32)
    plain = apply(config, params, ids, np.ones((1, 4), np.int32))
    padded = np.concatenate([ids, [[7, 0, 7]]], axis=1)
    masked = apply(config, params, padded, np.array([[1, 1, 1, 1, 0, 0, 0]], np.int32))
    assert relative(masked[:, :4], plain) < 1e-6 and not np.any(masked[:, 4:])
    seen = apply(config, params, padded, np.ones((1, 7), np.int32))
    assert relative(seen[:, :4], plain) > 1e-2


def test_narrow_encoders_stay_close():
    ids, mask = np.arange(12, dtype=np.int32).reshape(2, 6), np.ones((2, 6), np.int32)
    params = random_params()
    narrow = apply(replace(TINY, dtype="bfloat16"), jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), ids, mask)
    assert narrow.dtype == jnp.bfloat16
    assert 1e-4 < relative(narrow, apply(TINY, params, ids, mask)) < 0.05


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_has_known_axes_and_every_large_one_is_split(name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, seq=2))
    boxed = jax.eval_shape(lambda key: init(PUBLISHED[name], key), jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert len(leaf.names) == leaf.value.ndim, path
        assert ("layers" in leaf.names) == (path[0].key == "blocks"), path
        assert any(partition_spec(leaf.names, leaf.value.shape, mesh)) or leaf.value.size < 2**20, path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dtype="float16"), "float16 ends at 65,504.*take bfloat16"),
        (dict(feed_forward_proj="gelu"), "feed_forward_proj is 'gelu': it must be one of relu, gated-gelu"),
        (dict(model_type="mt5"), "model_type is 'mt5': it must be one of t5, umt5"),
        (dict(relative_attention_num_buckets=30), "buckets is 30: it must be a multiple of 4"),
        (dict(d_kv=0), "d_kv is 0: it must be"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**dataclasses.asdict(TINY) | changes)


@pytest.mark.parametrize("shapes", [((2, 6), (2, 5)), ((6,), (6,))])
def test_inputs_that_do_not_fit_are_refused_with_the_shapes(shapes):
    with pytest.raises(ValueError, match=r"ids must be ints \[b, l\], and so the mask, got int32 \("):
        apply(TINY, random_params(), *(np.ones(shape, np.int32) for shape in shapes))

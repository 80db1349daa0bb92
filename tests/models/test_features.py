"""InceptionV3 against the reference's layers and features; EfficientNet against numpy; resizing."""

import json
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax import convert
from rcm_jax.convert.files import open_tensors
from rcm_jax.models import efficientnet, features, inception
from rcm_jax.models.efficientnet import EfficientNetConfig
from rcm_jax.models.inception import InceptionConfig
from tests import tiny

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

TINY = EfficientNetConfig(stages=((1, 3, 1, 1, 4), (2, 5, 2, 2, 6)), stem=4, head=8, logits=3, size=12)


def drawn(name: str, shape) -> np.ndarray:
    """The weights of the golden Inception, by the rule of its README."""
    n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("conv.weight"):
        n = n * np.sqrt(2 / np.prod(shape[1:]))
    elif name == "fc.weight":
        n = n * np.sqrt(1 / 2048)
    elif name.endswith("running_var"):
        n = 0.5 + 0.5 * np.abs(n)
    else:
        n = 0.1 * n + name.endswith("bn.weight")
    return n.astype(np.float32)


@pytest.fixture(scope="module")
def tensors(golden):
    """Every tensor of the golden Inception, under the names of the reference."""
    shapes = json.loads((golden / "fid/inception_v3.index.json").read_text())
    return {name: np.zeros(()) if "num_batches" in name else drawn(name, shape) for name, shape in shapes.items()}


def worst(a, b) -> float:
    """max|a − b|/max|b|."""
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


@pytest.mark.golden
def test_inception_agrees_with_the_reference(golden, tensors):
    """2e-5 for every layer, 5e-6 for the features, of max|b|."""
    params = convert.from_reference("inception", tensors, InceptionConfig())
    data = np.load(golden / "fid/inception_v3.npz")
    about = json.loads((golden / "fid/inception_v3.json").read_text())["layers"]
    module = inception.InceptionV3(InceptionConfig())
    apply = jax.jit(lambda p, x: module.apply({"params": p}, x, capture_intermediates=True, mutable="intermediates"))
    found, inner = apply(params, jnp.asarray(data["images"].transpose(0, 2, 3, 1)))
    for name in (key.removeprefix("features/") for key in data if key.startswith("features/")):
        assert worst(np.asarray(found[name]), data[f"features/{name}"]) < 5e-6, name
    compared = [name for name in about if f"layer/{name}" in data and name in inner["intermediates"]]
    assert len(compared) == 16
    for name in compared:
        places = [about[name][side] for side in ("rows", "columns", "channels")]
        ours = np.asarray(inner["intermediates"][name]["__call__"][0])[:, *np.ix_(*places)].transpose(0, 3, 1, 2)
        assert worst(ours, data[f"layer/{name}"]) < 2e-5, name


@pytest.mark.golden
def test_inception_resizes_as_the_reference(golden):
    data = np.load(golden / "fid/inception_v3.npz")
    about = json.loads((golden / "fid/inception_v3.json").read_text())
    layer = about["layers"]["resized"]
    resized = features.resize_as_tensorflow(jnp.asarray(data["images"].transpose(0, 2, 3, 1), jnp.float32), 299)
    ours = np.asarray(resized)[:, *np.ix_(*(layer[s] for s in ("rows", "columns", "channels")))].transpose(0, 3, 1, 2)
    assert worst(ours, data["layer/resized"]) < 2e-5
    assert worst((ours - 128) / 128, data["layer/scaled"]) < 2e-5
    for case in (name for name in about if name.startswith("resize_")):
        shape = about[case]["input_shape"]
        x = np.random.default_rng(zlib.crc32(case.encode())).integers(0, 256, shape, np.uint8)
        y = features.resize_as_tensorflow(jnp.asarray(x.transpose(0, 2, 3, 1), jnp.float32), 299)
        rows = np.asarray(y)[:, ::23].transpose(0, 3, 1, 2)
        assert worst(rows, data[f"{case}/out_rows_every_23_f32"]) < 1e-6


@pytest.mark.golden
def test_the_weights_are_those_of_the_rule(golden, tensors):
    known = json.loads((golden / "fid/inception_v3.weights_check.json").read_text())
    for name in list(known)[::40]:
        assert f"{zlib.crc32(tensors[name].tobytes()):08x}" == known[name]["crc32"]


@pytest.mark.golden
def test_every_tensor_of_inception_is_used_once(tensors):
    found = dict(convert.parameters("inception", tensors))
    assert len(found) == len(convert.shapes_of("inception", InceptionConfig()))
    assert convert.recognise("inception", tensors, InceptionConfig()) == "fidelity"
    del found["Mixed_5b.branch1x1.bn.bias"]
    with pytest.raises(ValueError, match=r"Mixed_5b\.branch1x1\.bn\.bias: missing"):
        convert.recognise("inception", found, InceptionConfig())


def by_hand(x, kernel, stride=1):
    """A convolution [h, w, c] in float64, each output by itself; zeros around as TensorFlow's SAME has them."""
    k, (h, w, c) = kernel.shape[0], x.shape
    out = [-(-n // stride) for n in (h, w)]
    sides = [max((m - 1) * stride + k - n, 0) for m, n in zip(out, (h, w), strict=True)]
    x = np.pad(x, [*((s // 2, s - s // 2) for s in sides), (0, 0)])
    y = np.zeros((*out, kernel.shape[-1]))
    for i, j in np.ndindex(*out):
        patch = x[i * stride : i * stride + k, j * stride : j * stride + k]
        alone = kernel.shape[2] == 1 and c > 1  # every channel by itself
        y[i, j] = (patch * kernel[:, :, 0]).sum((0, 1)) if alone else np.tensordot(patch, kernel, 3)
    return y


def test_efficientnet_against_numpy():
    """A tiny one, on images of the size that it sees: nothing is resized."""
    p = tiny.random_params(efficientnet.NETWORK.init, TINY)
    p = jax.tree_util.tree_map_with_path(lambda path, a: np.abs(a) + 0.5 if path[-1].key == "var" else a, p)
    images = np.random.default_rng(1).integers(0, 256, (1, 12, 12, 3), np.uint8)
    found = jax.jit(efficientnet.EfficientNet(TINY).apply)({"params": p}, images)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)

    def layer(x, params, name, stride=1, relu=True):
        norm = params[f"{name}_norm"]
        y = by_hand(x, params[name]["kernel"], stride)
        y = (y - norm["mean"]) / np.sqrt(norm["var"] + 1e-3) * norm["scale"] + norm["bias"]
        return np.clip(y, 0, 6) if relu else y

    x = layer((images[0] - 127.0) / 128, p, "stem", 2)
    for i, (_, stride, expansion, _) in enumerate(TINY.blocks):
        block = p[f"block_{i}"]
        y = layer(x, block, "expand") if expansion > 1 else x
        y = layer(layer(y, block, "depthwise", stride), block, "project", relu=False)
        x = x + y if y.shape == x.shape else y
    expected = layer(x, p, "head").mean((0, 1))
    assert worst(np.asarray(found["features"][0]), expected) < 1e-5
    logits = expected @ p["logits"]["kernel"] + p["logits"]["bias"]
    assert worst(np.asarray(found["logits"][0]), logits) < 1e-5


def test_efficientnet_to_its_published_names_and_back():
    params = tiny.random_params(efficientnet.NETWORK.init, TINY)
    named = convert.to_reference("efficientnet", params, TINY, "pytorch")
    assert named["_blocks.1._depthwise_conv.weight"].shape == (8, 1, 5, 5)
    assert "_blocks.0._expand_conv.weight" not in named
    named |= {"_bn0.num_batches_tracked": np.zeros((), np.int64)}
    tiny.assert_trees_equal(convert.from_reference("efficientnet", named, TINY), params)


@pytest.mark.skipif("RCM_EFFICIENTNET" not in os.environ, reason="names the published efficientnet-lite0-*.pth")
def test_the_published_efficientnet():
    """Logits of a smooth picture, as PyTorch gives them with the same file."""
    config = EfficientNetConfig()
    params = convert.from_reference("efficientnet", open_tensors(os.environ["RCM_EFFICIENTNET"]), config)
    assert sum(x.size for x in jax.tree.leaves(params)) == 4_694_024
    rows, columns = np.mgrid[:224, :224] / 223
    picture = np.stack([rows, columns, (rows + columns) / 2], -1)
    images = np.round(picture * 255).astype(np.uint8)[None]
    found = jax.jit(efficientnet.EfficientNet(config).apply)({"params": params}, images)
    assert found["features"].shape == (1, 1280)
    np.testing.assert_allclose(found["logits"][0, :4], PUBLISHED_LOGITS, rtol=1e-4)


PUBLISHED_LOGITS = [-0.4372716, -0.3183075, 0.5512519, -0.2889805]  # float64 of PyTorch 2.13

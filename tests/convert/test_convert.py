"""Conversion of Wan checkpoints: every tensor of the real ones, round trips, what is refused, and memory."""

import dataclasses
import json
import math
import os
import time
import weakref
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert import table, wan
from rcm_jax.models import init
from rcm_jax.models.wan import PUBLISHED, WanConfig
from rcm_jax.parallel.sharding import RULES, MeshConfig, make_mesh, partition_spec
from tests.tiny import cases, stem
from tests.wan import KINDS, TINY, golden_config

LAYOUTS = ("official", "rcm", "diffusers")
replace = dataclasses.replace


# --- The real checkpoints, by name and shape

CHECKPOINTS = {
    "wan2.1_t2v_1.3B": "wan-1.3b",
    "wan2.1_t2v_14B": "wan-14b",
    "wan2.1_i2v_14B": "wan-i2v-14b",
    "wan2.2_i2v_A14B": "wan2.2-i2v-a14b",
    "wan2.2_ti2v_5B": "wan2.2-ti2v-5b",
}


def recorded_checkpoints():
    """(file, layout, config) of every Wan network in the index."""
    for path in cases("checkpoint_index/*wan2.*_*v_*B.json"):
        family = path.stem.partition("_")[0]
        layout = family if family in LAYOUTS else "official"
        yield path, layout, PUBLISHED[CHECKPOINTS[path.stem.removeprefix(f"{layout}_")]]


def checkpoint_id(value):
    return "" if isinstance(value, WanConfig) else stem(value)


def abstract(shapes, dtype=jnp.bfloat16):
    return {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, shape in shapes.items()}


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize(("path", "layout", "config"), list(recorded_checkpoints()), ids=checkpoint_id)
def test_every_tensor_of_the_real_checkpoints_has_one_place(path, layout, config):
    names = json.loads(path.read_text())
    entries = convert.entries("wan", config)
    assert {name: list(entry.shape) for name, entry in entries[layout].items()} == names
    assert convert.recognise("wan", abstract(names), config) == layout
    places = [(entry.rule.ours, entry.layer) for entry in entries[layout].values()]
    assert len(set(places)) == len(places)
    recorded = json.loads((path.parent / "index.json").read_text())[path.stem]
    assert recorded["params"] == sum(map(math.prod, names.values())) == parameters(config)
    described = wan.described(config, layout)
    assert recorded["config"].items() <= described.items() if layout != "rcm" else not described


def boxed_leaves(config):
    """[(path, boxed abstract leaf)] of the parameters."""
    boxed = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    return jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def parameters(config):
    return sum(math.prod(leaf.value.shape) for _, leaf in boxed_leaves(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_has_known_axes_and_every_large_one_is_split(name):
    mesh, whole = make_mesh(MeshConfig(data=1, fsdp=4, seq=2)), {}
    for path, leaf in boxed_leaves(PUBLISHED[name]):
        assert isinstance(leaf, nn.Partitioned) and set(leaf.names) <= set(RULES), path
        assert len(leaf.names) == leaf.value.ndim and leaf.value.dtype == jnp.float32, path
        assert ("layers" in leaf.names) == (path[0].key == "blocks"), path
        spec = partition_spec(leaf.names, leaf.value.shape, mesh)
        if not any(spec):
            whole[jax.tree_util.keystr(path)] = 4 * math.prod(leaf.value.shape)
    assert max(whole.values()) <= 4 * 2**20  # bytes; the largest are biases of all layers
    assert sum(whole.values()) <= 32 * 2**20


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("wan_dit/*.diffusers.config.json"), ids=stem)
def test_the_described_config_is_that_of_diffusers(path):
    config = golden_config(path.with_name(path.name.replace(".diffusers", "")))
    described = wan.described(config, "diffusers")
    recorded = json.loads(path.read_text())
    del recorded["rope_max_seq_len"]  # tables of constants, short ones there
    assert recorded.items() <= described.items()
    assert json.loads(json.dumps(described)) == described


# --- Round trips


def filled(config, layout="official", dtype=np.float32, seed=0):
    """Random tensors of a layout."""
    rng = np.random.default_rng(seed)
    entries = convert.entries("wan", config)[layout]
    return {name: rng.normal(size=entry.shape).astype(dtype) for name, entry in entries.items()}


def assert_same(a, b):
    """The same names, dtypes, and values to the bit."""
    assert sorted(a) == sorted(b)
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes(), name


def assert_round_trips(tensors, config):
    """official → ours → diffusers → ours → rcm → ours → official, to the bit."""
    params = convert.from_reference("wan", tensors, config)
    for layout in ("diffusers", "rcm", "official"):
        there = convert.to_reference("wan", params, config, layout)
        assert convert.recognise("wan", there, config) == layout
        again = convert.from_reference("wan", there, config)
        assert_same(flatten_dict(again, sep="/"), flatten_dict(params, sep="/"))
        params = again
    assert_same(there, tensors)


def official(tensors, config):
    """Tensors of any layout in the official one; the golden files have rcm's."""
    return convert.to_reference("wan", convert.from_reference("wan", tensors, config), config, "official")


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize("path", cases("wan_dit/*.npz"), ids=stem)
def test_recorded_weights_round_trip_to_the_bit(path):
    config, weights = golden_config(path.with_suffix(".config.json")), load_file(path.with_suffix(".safetensors"))
    assert convert.recognise("wan", weights, config) == "rcm"
    params = convert.from_reference("wan", weights, config)
    assert_same(convert.to_reference("wan", params, config, "rcm"), weights)
    assert_round_trips(official(weights, config), config)


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("wan_dit/*.diffusers.safetensors"), ids=stem)
def test_weights_of_diffusers_are_the_same_parameters(path):
    stem_of_both = path.name.removesuffix(".diffusers.safetensors")
    config = golden_config(path.with_name(f"{stem_of_both}.config.json"))
    theirs, weights = load_file(path), load_file(path.with_name(f"{stem_of_both}.safetensors"))
    assert convert.recognise("wan", theirs, config) == "diffusers"
    params = convert.from_reference("wan", weights, config)
    assert_same(flatten_dict(convert.from_reference("wan", theirs, config)), flatten_dict(params))
    assert_same(convert.to_reference("wan", params, config, "diffusers"), theirs)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_round_trip_to_the_bit(kind, dtype):
    assert_round_trips(filled(KINDS[kind], dtype=dtype), KINDS[kind])


@st.composite
def configs(draw):
    """Small networks whose sizes are all their own."""
    heads, small = draw(st.integers(1, 3)), st.integers(1, 4)
    kind = draw(st.sampled_from(["t2v", "i2v"]))
    out_dim = draw(small)
    return WanConfig(
        dim=2 * heads * draw(small),
        ffn_dim=draw(st.integers(1, 9)),
        num_heads=heads,
        num_layers=draw(st.integers(1, 12)),  # "blocks.10." must not come before "blocks.2."
        model_type=kind,
        in_dim=out_dim if kind == "t2v" else out_dim + draw(small),
        out_dim=out_dim,
        text_dim=draw(small),
        freq_dim=2 * draw(small),
        patch_size=tuple(draw(st.integers(1, 3)) for _ in range(3)),
        clip_dim=0 if kind == "t2v" else draw(st.integers(0, 5)),
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 99))
def test_networks_of_any_sizes_round_trip(config, seed):
    assert_round_trips(filled(config, seed=seed), config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", table.PREFIXES)
def test_a_prefix_that_all_tensors_share_is_dropped(prefix, layout):
    tensors = filled(TINY, layout)
    prefixed = {prefix + name: tensor for name, tensor in tensors.items()}
    params = (convert.from_reference("wan", t, TINY) for t in (tensors, prefixed))
    assert_same(*(flatten_dict(p) for p in params))


def test_layers_and_axes_go_where_they_belong():
    """Our kernels are [in, out] and stacked; a patch of ours is frames, rows, columns, then channels."""
    config = replace(TINY, num_layers=11)
    tensors = filled(config)
    params = convert.from_reference("wan", tensors, config)
    for i in (0, 2, 10):
        expected = tensors[f"blocks.{i}.ffn.0.weight"].T
        np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][i], expected)
        np.testing.assert_array_equal(params["blocks"]["modulation"][i], tensors[f"blocks.{i}.modulation"][0])
    kernel = params["patch_in"]["kernel"].reshape(1, 2, 2, 4, 24)
    np.testing.assert_array_equal(kernel[0, 1, 0, 3], tensors["patch_embedding.weight"][:, 3, 0, 1, 0])
    flat = convert.to_reference("wan", params, config, "rcm")["patch_embedding.weight"]
    np.testing.assert_array_equal(flat, tensors["patch_embedding.weight"].reshape(24, 16))


# --- Dtypes


def test_the_dtype_asked_for_is_that_of_all_parameters():
    params = convert.from_reference("wan", filled(TINY, dtype=ml_dtypes.bfloat16), TINY, dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_values_too_large_for_float16_are_refused():
    tensors = filled(TINY)
    assert convert.from_reference("wan", tensors, TINY, dtype="float16")["patch_in"]["bias"].dtype == np.float16
    tensors["blocks.1.norm3.bias"][3:5] = 7e4
    with pytest.raises(ValueError, match=r"blocks\.1\.norm3\.bias: 2 of 24 values are too large for float16"):
        convert.from_reference("wan", tensors, TINY, dtype="float16")


def test_layers_of_several_dtypes_take_one_that_holds_them_all():
    tensors = filled(TINY)
    for i, dtype in enumerate((np.float16, ml_dtypes.bfloat16)):
        tensors[f"blocks.{i}.ffn.0.weight"] = tensors[f"blocks.{i}.ffn.0.weight"].astype(dtype)
    tensors["patch_embedding.bias"] = tensors["patch_embedding.bias"].astype(np.float16)
    params = convert.from_reference("wan", tensors, TINY)
    assert params["blocks"]["mlp"]["up"]["kernel"].dtype == np.float32  # of float16 and bfloat16
    assert params["patch_in"]["bias"].dtype == np.float16
    for i in range(2):
        expected = tensors[f"blocks.{i}.ffn.0.weight"].T
        np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][i], expected.astype(np.float32))


# --- What is refused


def changed(change):
    """Tensors of TINY in the official layout, after a change in place."""
    tensors = filled(TINY)
    change(tensors)
    return tensors


def dropped(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(**shapes):
    return lambda tensors: tensors.update({name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()})


NEAREST = r"the {} tensors are no wan of this config; nearest is the layout 'official', with {} problems:\n"
PROBLEMS = {
    "missing": (dropped("head.head.bias"), [r"- head\.head\.bias: missing, of shape \[16\]$"]),
    "missing in every layer": (
        dropped("blocks.0.ffn.0.bias", "blocks.1.ffn.0.bias"),
        [r"- blocks\.\{0-1\}\.ffn\.0\.bias: missing, of shape \[32\]$"],
    ),
    "unexpected": (put(**{"head.more": ((3, 2), "float32")}), [r"- head\.more: unexpected, of shape \[3, 2\]$"]),
    "a layer too many": (
        put(**{"blocks.2.norm3.bias": ((24,), "float32")}),
        [r"- blocks\.2\.norm3\.bias: unexpected, of shape \[24\]$"],
    ),
    "shape": (
        put(**{"patch_embedding.weight": ((24, 5, 1, 2, 2), "float32")}),
        [r"- patch_embedding\.weight: shape \[24, 5, 1, 2, 2\], must be \[24, 4, 1, 2, 2\]$"],
    ),
    "transposed": (
        put(**{f"blocks.{i}.ffn.0.weight": ((24, 32), "float32") for i in range(2)}),
        [r"- blocks\.\{0-1\}\.ffn\.0\.weight: shape \[24, 32\], must be \[32, 24\]$"],
    ),
    "dtype": (
        put(**{"head.head.bias": ((16,), "int8")}),
        [r"- head\.head\.bias: dtype int8, must be one of float64, float32, float16, bfloat16$"],
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_tensors_that_do_not_fit_are_listed(name):
    change, lines = PROBLEMS[name]
    for line in lines:
        with pytest.raises(ValueError, match=line):
            convert.from_reference("wan", changed(change), TINY)


def test_all_problems_are_listed_at_once():
    names = ("missing", "missing in every layer", "unexpected", "shape", "transposed")
    tensors = changed(lambda tensors: [PROBLEMS[name][0](tensors) for name in names])
    with pytest.raises(ValueError) as caught:
        convert.recognise("wan", tensors, TINY)
    first, *lines = str(caught.value).splitlines()
    count = len(filled(TINY)) - 3 + 1
    assert first == (
        f"the {count} tensors are no wan of this config; nearest is the layout 'official', with 7 problems:"
    )
    assert sorted(lines) == sorted(PROBLEMS[name][1][0].rstrip("$").replace("\\", "") for name in names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_nearest_layout_is_named(layout):
    tensors = filled(TINY, layout)
    tensors.pop(next(name for name in tensors if name.endswith("bias")))
    with pytest.raises(ValueError, match=f"nearest is the layout '{layout}', with 1 problems"):
        convert.from_reference("wan", tensors, TINY)


def test_a_checkpoint_of_another_config_is_refused():
    with pytest.raises(
        ValueError, match=r"blocks\.\{0-1\}\.cross_attn\.k_img\.weight: unexpected, of shape \[24, 24\]"
    ):
        convert.from_reference("wan", filled(KINDS["i2v_clip"]), KINDS["i2v"])
    with pytest.raises(ValueError, match=r"weight: shape \[24, 9, 1, 2, 2\], must be \[24, 4, 1, 2, 2\]"):
        convert.from_reference("wan", filled(KINDS["i2v"]), KINDS["t2v"])
    with pytest.raises(ValueError, match=r"the 0 tensors are no wan"):
        convert.from_reference("wan", {}, TINY)


def test_two_networks_in_one_file_are_told_apart():
    tensors = filled(TINY)
    both = {prefix + name: tensor for prefix in ("net.", "net_ema.") for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"several prefixes, net\., net_ema\.: choose one network by its prefix"):
        convert.from_reference("wan", both, TINY)
    stray = {f"net.{name}": tensor for name, tensor in tensors.items()} | {"head.head.bias": np.zeros(16, np.float32)}
    with pytest.raises(ValueError, match=r"several prefixes, net\., none \(head\.head\.bias, …\): choose"):
        convert.from_reference("wan", stray, TINY)


def test_layers_that_share_a_problem_are_named():
    config = replace(TINY, num_layers=12)
    tensors = filled(config)
    for i in (0, 3, 4, 5, 11):
        del tensors[f"blocks.{i}.norm3.bias"]
    with pytest.raises(ValueError, match=r"blocks\.\{0,3-5,11\}\.norm3\.bias: missing, of shape \[24\]$"):
        convert.from_reference("wan", tensors, config)


def test_an_unknown_layout_is_refused():
    params = convert.from_reference("wan", filled(TINY), TINY)
    with pytest.raises(ValueError, match="layout 'comfy' is none of official, rcm, diffusers"):
        convert.to_reference("wan", params, TINY, "comfy")


def test_parameters_of_another_config_are_refused_with_every_difference():
    flat = flatten_dict(convert.from_reference("wan", filled(TINY), TINY), sep="/")
    flat["more"] = np.zeros(3)
    flat["head"] = flat.pop("patch_out/bias")
    flat["patch_in/bias"] = np.zeros(25)
    with pytest.raises(ValueError, match="the parameters are not wan of this config: ") as caught:
        convert.to_reference("wan", unflatten_dict(flat, sep="/"), TINY, "official")
    assert str(caught.value).partition(": ")[2].split("; ") == [
        "head is (16,), must be absent",
        "more is (3,), must be absent",
        "patch_in/bias is (25,), must be (24,)",
        "patch_out/bias is missing, must be (16,)",
    ]


def test_a_table_that_forgets_or_repeats_a_parameter_is_refused():
    rule = table.Rule("a/kernel", "a.weight", table.MATRIX)
    shapes = {"a/kernel": (2, 3), "b": (4,)}
    with pytest.raises(ValueError, match=r"exactly once: \['b'\]"):
        table.entries_of_rules([rule], shapes)
    with pytest.raises(ValueError, match=r"exactly once: \['a/kernel'\]"):
        table.entries_of_rules([rule, rule], {"a/kernel": (2, 3)})


# --- Memory


class Counted:
    """A tensor that is read on demand and tells how often; what it gave is watched, not held."""

    log: ClassVar[list] = []  # of all instances, in order of reading

    def __init__(self, name, array):
        self.name, self.shape, self.dtype, self._array = name, array.shape, array.dtype, array

    def __array__(self, dtype=None, copy=None):
        read = self._array.copy()
        alive = sum(held() is not None for _, held in Counted.log)
        Counted.log.append((self.name, weakref.ref(read)))
        assert alive == 0, f"{alive} tensors are held while {self.name} is read"
        return read


@pytest.fixture
def log():
    Counted.log.clear()
    yield Counted.log
    Counted.log.clear()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_read_once_each_and_let_go(log, layout):
    tensors, done = filled(KINDS["i2v_clip"], layout), []
    lazy = {name: Counted(name, tensor) for name, tensor in tensors.items()}
    params = convert.from_reference("wan", lazy, KINDS["i2v_clip"], progress=done.append)
    assert sorted(name for name, _ in log) == sorted(tensors)
    assert not any(held() is not None for _, held in log)
    assert sum(done) == sum(tensor.nbytes for tensor in tensors.values()) and len(done) == len(tensors)
    assert_same(flatten_dict(params), flatten_dict(convert.from_reference("wan", tensors, KINDS["i2v_clip"])))


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_is_read_before_everything_fits(log, name):
    lazy = {name: Counted(name, tensor) for name, tensor in changed(PROBLEMS[name][0]).items()}
    with pytest.raises(ValueError, match="nearest is the layout 'official'"):
        convert.from_reference("wan", lazy, TINY)
    assert log == []


def test_tensors_written_are_views_but_for_the_flattened_patch():
    params = convert.from_reference("wan", filled(TINY), TINY)
    leaves = jax.tree.leaves(params)
    for layout in LAYOUTS:
        tensors = convert.to_reference("wan", params, TINY, layout)
        own = {name for name, array in tensors.items() if not any(np.shares_memory(array, leaf) for leaf in leaves)}
        assert own == ({"patch_embedding.weight"} if layout == "rcm" else set())


# --- What a file may do to the one who names it


@pytest.mark.parametrize("tensors", [{}, {"\x1b[31m" + "x" * 1000: 0}])
def test_a_prefix_that_no_tensor_has_is_refused_in_one_line(tensors):
    message = r"^of [01] tensors none begins with 'net\.'; the first is (not there$|\\x1b)"
    with pytest.raises(ValueError, match=message) as caught:
        convert.under_prefix(tensors, "net")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is no JSON: RecursionError"),
        ("[]", "its kind is 'None'"),
        ('{"kind": ["wan"]}', r"its kind is '\['wan'\]'"),
        ('{"kind": "%s"}' % ("x" * 100_000), r"its kind is 'x*… \(100,000 characters\)'"),
        ('{"kind": "wan", "dim": {"%s": 1}}' % ("x" * 100_000), "missing key ffn_dim"),
        ('{"kind": "wan", "%s": 1}' % ("x" * 100_000), "unknown key xxx"),
        ('{"kind": "wan", "kind": "edm"}', "named twice: kind"),
    ],
)
def test_a_model_that_is_no_config_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path}[^\n]*{message}") as caught:
        convert.named(str(path))
    assert len(str(caught.value)) < 1500
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"^{path} is a FIFO, not a file$"):
        convert.named(str(path))


def test_what_is_wrong_with_very_many_tensors_is_told_in_short_and_soon():
    tensors = {f"blocks.{i}.{'x' * (i % 400)}": np.zeros(0) for i in range(20_000)}
    tensors |= {f"blocks.{i}.y": np.zeros(0) for i in range(100_000)} | {f"blocks.{'9' * 5000}.y": np.zeros(0)}
    start = time.process_time()
    with pytest.raises(ValueError, match=r"(?s)120001 tensors are no wan.*\n- [\d,]+ more$") as caught:
        table.recognise(tensors, {"only": {}}, "wan")
    assert time.process_time() - start < 10 and len(str(caught.value)) < 100_000

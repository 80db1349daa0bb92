"""The Wan network: the reference's numbers, its tangents, what must not change a number, and what it refuses."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels import attention
from rcm_jax.models import init, network_of
from rcm_jax.models.layers import REMAT_POLICIES, patchify, rope_tables, unpatchify
from rcm_jax.models.wan import Block, Wan
from tests import tiny
from tests.tiny import assert_trees_close, cases, columns, relative, stem, x64
from tests.wan import KINDS, TINY, channels_first, channels_last, golden_config, golden_params, inputs, random_params

# The claims do not depend on XLA's optimisations, and compiling takes half the time without them.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

replace = dataclasses.replace
CLIP = KINDS["i2v_clip"]  # has every kind of layer


# --- Recorded values


def input_sets(pattern="wan_dit/*.npz", suffix="jvp_f64"):
    """(file, prefix of its arrays) of every recorded set of inputs that has such an array."""
    return [
        (p, name.removesuffix(suffix)) for p in cases(pattern) for name in np.load(p).files if name.endswith(suffix)
    ]


def set_id(value):
    return stem(value).strip("_")


def recorded_network(path, dtype):
    """(config, params) beside an .npz."""
    config = golden_config(path.with_suffix(".config.json"), dtype=dtype, time_dtype=dtype)
    return config, golden_params(path.with_suffix(".safetensors"), config, dtype)


def recorded_inputs(data, prefix, dtype):
    """((x, t, cond), (dx, dt)) in our layout."""
    found = {name.removeprefix(prefix): jnp.asarray(data[name], dtype) for name in data if name.startswith(prefix)}
    cond = {"text": found["crossattn_emb"]}
    if "y" in found:
        cond["y"] = channels_last(found["y"])
    if "clip_features" in found:
        cond["clip_features"] = found["clip_features"]
    primals = channels_last(found["x"]), columns(found["timesteps"]), cond
    return primals, (channels_last(found["tangent_x"]), columns(found["tangent_t"]))


def apply(config, params, x, t, cond):
    return Wan(config).apply({"params": params}, x, t, **cond)


@functools.cache
def value_and_tangent(config):
    """Compiled (params, x, t, cond, dx, dt) -> (value, tangent)."""

    def call(params, x, t, cond, dx, dt):
        return jax.jvp(lambda x, t: apply(config, params, x, t, cond), (x, t), (dx, dt))

    return jax.jit(call)


# float64: rounding. float32: a third of what the recording suggests for an implementation with float32 sinusoids.
TOLERANCES = {"float64": (1e-12, 1e-12), "float32": (1.5e-5, 3e-5)}


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("path", "prefix"), input_sets(), ids=set_id)
def test_output_and_tangents_are_those_of_the_reference(path, prefix, dtype):
    data = dict(np.load(path))
    with x64() if dtype == "float64" else contextlib.nullcontext():
        config, params = recorded_network(path, dtype)
        primals, (dx, dt) = recorded_inputs(data, prefix, dtype)
        f = functools.partial(value_and_tangent(config), params, *primals)
        out, tangent = f(dx, dt)
        actual = {"out": out, "jvp": tangent, "jvp_x_only": f(dx, 0 * dt)[1], "jvp_t_only": f(0 * dx, dt)[1]}
    assert out.dtype == tangent.dtype == dtype
    for name, value in actual.items():
        if f"{prefix}{name}_f64" in data:
            tolerance = TOLERANCES[dtype][name != "out"]
            assert relative(channels_first(value), data[f"{prefix}{name}_f64"]) < tolerance, name


@functools.partial(jax.jit, static_argnums=0)
def stages(config, params, x, t, text):
    """What the reference recorded on the way through a text-to-video network, block after block."""
    names = {"time_out": "time_embedding", "time_projection": "time_projection", "text_out": "text_embedding"}
    _, state = Wan(config).apply(
        {"params": params}, x, t, text, capture_intermediates=lambda module, _: bool(module.name), mutable=True
    )
    outputs = {name: state["intermediates"][name]["__call__"][0] for name in (*names, "patch_in")}
    found = {names[name]: value for name, value in outputs.items() if name in names}
    turns = rope_tables((x.shape[1], x.shape[2] // 2, x.shape[3] // 2), config.dim // config.num_heads, x.dtype)
    shared = outputs["time_projection"].reshape(-1, 6, config.dim), outputs["text_out"], None, *turns
    h = outputs["patch_in"]
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        h, _ = Block(config).apply({"params": layer}, h, *shared)
        found[f"block{i}"] = h
    return found


@pytest.mark.golden
@pytest.mark.parametrize(("path", "prefix"), input_sets(suffix="dbg_block0_f64"), ids=set_id)
def test_embeddings_and_every_block_are_those_of_the_reference(path, prefix):
    data = dict(np.load(path))
    with x64():
        config, params = recorded_network(path, "float64")
        (x, t, cond), _ = recorded_inputs(data, prefix, "float64")
        found = stages(config, params, x, t, cond["text"])
    for name, value in found.items():
        assert relative(value, data[f"{prefix}dbg_{name}_f64"]) < 1e-12, name


# --- What must change nothing, and what must change something


def direction(x, t):
    """A tangent of x and t."""
    return jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), jnp.ones_like(t)


def objective(config, params, x, t, cond):
    """Like the consistency loss: of the value and its stopped tangent. Returns (loss, (value, tangent))."""
    f, df = jax.jvp(lambda x, t: apply(config, params, x, t, cond), (x, t), direction(x, t))
    return jnp.sum(jnp.sin(f) * jax.lax.stop_gradient(f + df)), (f, df)


@functools.cache
def everything(config):
    """(value, tangent), gradient of a plain loss and of one with a tangent, at random parameters of CLIP."""

    def call(params, arguments):
        plain = jax.grad(lambda p: jnp.sum(apply(config, p, *arguments) ** 2))(params)
        consistency, values = jax.grad(lambda p: objective(config, p, *arguments), has_aux=True)(params)
        return values, plain, consistency

    return jax.jit(call)(random_params(CLIP), inputs(CLIP))


@pytest.mark.smoke
@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_neither_values_nor_tangents_nor_gradients(remat):
    values, *gradients = everything(CLIP)
    other_values, *other_gradients = everything(replace(CLIP, remat=remat))
    assert_trees_close(other_values, values, rtol=1e-6, atol=1e-6)  # to the bit on the machines we saw
    for other, gradient in zip(other_gradients, gradients, strict=True):  # sums of float32 in another order
        jax.tree.map(lambda a, b: np.testing.assert_array_less(relative(a, b), 2e-6), other, gradient)


def test_all_three_attentions_are_computed_as_the_config_says(monkeypatch):
    monkeypatch.setitem(
        attention.IMPLEMENTATIONS, "blockwise", attention.Implementation()
    )  # what "auto" stands for here
    jax.eval_shape(lambda key: init(replace(CLIP, attention="reference"), key), jax.random.key(0))
    with pytest.raises(TypeError, match="'NoneType'"):
        jax.eval_shape(lambda key: init(CLIP, key), jax.random.key(0))


def test_no_gradient_is_zero():
    _, plain, consistency = everything(CLIP)
    assert all(jnp.linalg.norm(g) > 0 for g in jax.tree.leaves((plain, consistency)))


def network(f, params, x, t):
    return f(params, x, t)


def tangent(f, params, x, t):
    return jax.jvp(lambda x, t: f(params, x, t), (x, t), (x, t))


def plain_gradient(f, params, x, t):
    return jax.grad(lambda p: jnp.sum(f(p, x, t) ** 2))(params)


def consistency_gradient(f, params, x, t):
    def loss(p):
        value, moved = jax.jvp(lambda x, t: f(p, x, t), (x, t), (x, t))
        return jnp.sum(jnp.sin(value) * jax.lax.stop_gradient(value + moved))

    return jax.grad(loss)(params)


@functools.cache
def traced(kind, remat, transform):
    """The jaxpr of a transform of f(params, x, t), with attention kernels marked."""
    config = replace(KINDS[kind], remat=remat)
    x, t, cond = inputs(config)
    with pytest.MonkeyPatch.context() as patch:
        tiny.mark_attention_kernels(patch)
        f = functools.partial(transform, lambda params, x, t: apply(config, params, x, t, cond))
        return jax.make_jaxpr(f)(random_params(KINDS[kind]), x, t)


TRACED = [("t2v", "save_attention"), ("i2v", "none"), *(("i2v_clip", remat) for remat in REMAT_POLICIES)]
ATTENTIONS = {"t2v": 2, "i2v": 2, "i2v_clip": 3}  # of a block


@pytest.mark.parametrize("transform", [tangent, plain_gradient, consistency_gradient])
@pytest.mark.parametrize(("kind", "remat"), TRACED)
def test_saved_attention_is_not_computed_again(kind, remat, transform):
    n = ATTENTIONS[kind]
    again = remat == "full" and transform is not tangent
    assert tiny.count_attention_kernels(traced(kind, remat, transform)) == {
        "forward": 2 * n if again else n,
        "tangent": 0 if transform is plain_gradient else n,
        "backward": 0 if transform is tangent else n,
    }


@pytest.mark.parametrize("transform", [tangent, consistency_gradient])
@pytest.mark.parametrize(("kind", "remat"), TRACED)
def test_tangents_cost_nothing_for_text_and_image_tokens(kind, remat, transform):
    """Their keys and values have none: the kernel takes q, k, v, o, lse and q̇; k̇ and v̇ in self-attention alone."""
    found = tiny.equations(traced(kind, remat, transform).jaxpr)
    operands = [len(e.invars) for path, e in found if e.params.get("name") == "attention_tangent" and "scan" in path]
    assert sorted(operands) == [6] * (ATTENTIONS[kind] - 1) + [8]


@pytest.mark.parametrize(("kind", "expected"), [("i2v", 4), ("i2v_clip", 8)])
def test_text_and_image_tokens_are_projected_once_in_a_tangent(kind, expected):
    """Products that give [b, text or image tokens, ...]: as many in a jvp as in the network."""

    def products(transform):
        found = [
            e for _, e in tiny.equations(traced(kind, "none", transform).jaxpr) if e.primitive.name == "dot_general"
        ]
        shapes = [e.outvars[0].aval.shape for e in found]
        return sum(len(shape) == 3 and shape[1] in (TINY.text_len, 5) for shape in shapes)

    assert products(tangent) == products(network) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_agree_with_central_differences_in_float64(kind):
    config = replace(KINDS[kind], dtype="float64", time_dtype="float64")
    params = random_params(KINDS[kind])
    with x64():
        x, t, cond = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), inputs(config))
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        dx, dt = direction(x, t)
        f, h = functools.partial(value_and_tangent(config), params), 1e-4
        for along_x, along_t in [(dx, 0 * dt), (0 * dx, dt), (dx, dt)]:
            exact = f(x, t, cond, along_x, along_t)[1]
            ahead, behind = (f(x + s * along_x, t + s * along_t, cond, dx, dt)[0] for s in (h, -h))
            assert relative(exact, (ahead - behind) / (2 * h)) < 1e-7  # h²·F''' from truncation


forward = jax.jit(apply, static_argnums=0)


def test_output_depends_on_every_input_and_on_places():
    params, (x, t, cond) = random_params(CLIP), inputs(CLIP)
    f = functools.partial(forward, CLIP, params)
    out = f(x, t, cond)
    assert relative(f(1.1 * x, t, cond), out) > 1e-3
    assert relative(f(x, t + 10, cond), out) > 1e-3
    for name in ("text", "y", "clip_features"):
        assert relative(f(x, t, cond | {name: cond[name][..., ::-1]}), out) > 1e-3, name
    for axis, patch in ((1, 1), (2, 2), (3, 2)):
        moved = f(jnp.roll(x, patch, axis), t, cond | {"y": jnp.roll(cond["y"], patch, axis)})
        assert relative(jnp.roll(moved, -patch, axis), out) > 1e-4, axis


def test_samples_of_a_batch_do_not_mix():
    params, (x, t, cond) = random_params(CLIP), inputs(CLIP)
    out = forward(CLIP, params, x, t, cond)
    changed = forward(CLIP, params, x.at[0].add(1.0), t.at[0].add(1.0), cond)
    np.testing.assert_array_equal(changed[1:], out[1:])
    swapped = forward(CLIP, params, *jax.tree.map(lambda a: a[::-1], (x, t, cond)))
    np.testing.assert_allclose(swapped[::-1], out, rtol=1e-6, atol=1e-6)


def test_text_may_be_shorter_and_is_not_masked():
    """As in the reference, every token given is attended to: zeros are not nothing."""
    params, (x, t, cond) = random_params(CLIP), inputs(CLIP)
    padded = cond | {"text": cond["text"].at[:, 4:].set(0)}
    short = cond | {"text": cond["text"][:, :4]}
    assert relative(forward(CLIP, params, x, t, short), forward(CLIP, params, x, t, padded)) > 1e-3


def test_a_patch_is_a_pixel_of_more_channels():
    """A network without patches on an odd grid, given patches as channels, has the same parameters and numbers."""
    small = replace(TINY, patch_size=(1, 1, 1), in_dim=16, out_dim=16)
    x, t, cond = inputs(TINY, grid=(3, 10, 14))
    params, pixels = random_params(TINY), (2, 3, 5, 7, 16)
    apart = forward(small, params, patchify(x, (1, 2, 2)).reshape(pixels), t, cond)
    expected = forward(TINY, params, x, t, cond)
    joined = unpatchify(apart.reshape(2, 105, 16), (1, 2, 2), x.shape)
    np.testing.assert_allclose(joined, expected, rtol=1e-5, atol=1e-5)


# --- Dtypes


@functools.cache
def in_dtypes(dtype, time_dtype, param_dtype="float32"):
    """(value, tangent in x and t, tangent in t) of TINY."""
    params = jax.tree.map(lambda p: p.astype(param_dtype), random_params(TINY))
    x, t, cond = inputs(TINY)
    f = functools.partial(value_and_tangent(replace(TINY, dtype=dtype, time_dtype=time_dtype)), params, x, t, cond)
    dx, dt = direction(x, t)
    return *f(dx, dt), f(0 * dx, dt)[1]


def errors(*dtypes):
    """Relative errors of in_dtypes against float32."""
    results = in_dtypes(*dtypes)
    assert {a.dtype for a in results} == {jnp.dtype("float32")}
    return [relative(a, b) for a, b in zip(results, in_dtypes("float32", "float32"), strict=True)]


def test_bfloat16_blocks_give_a_float32_output_near_that_of_float32():
    assert all(0 < error < 0.02 for error in errors("bfloat16", "float32"))  # 8 bits, two blocks


def test_parameters_may_be_bfloat16():
    """As a frozen teacher's are."""
    assert all(0 < error < 0.03 for error in errors("bfloat16", "float32", "bfloat16"))


def test_a_bfloat16_time_embedding_makes_the_tangent_worse():
    assert TINY.time_dtype == "float32"
    assert errors("bfloat16", "bfloat16")[2] > 1.3 * errors("bfloat16", "float32")[2]  # 8.3e-3, 5.3e-3


@pytest.mark.parametrize(("time_dtype", "expected"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_products_outside_bfloat16_blocks_have_the_dtypes_of_the_policy(time_dtype, expected):
    config = replace(TINY, dtype="bfloat16", time_dtype=time_dtype)
    closed = jax.make_jaxpr(functools.partial(apply, config))(random_params(TINY), *inputs(TINY))
    found = {}
    for path, e in tiny.equations(closed.jaxpr):
        if e.primitive.name == "dot_general":
            outside = "scan" not in path
            found.setdefault((outside, e.outvars[0].aval.shape if outside else None), set()).add(
                str(e.invars[0].aval.dtype)
            )
    assert found.pop((True, (2, 24))) == {expected}  # time_in, time_out
    assert found.pop((True, (2, 144))) == {expected}  # time_projection
    assert found.pop((True, (2, 12, 16))) == {"float32"}  # patch_out
    assert found.pop((True, (2, 12, 24))) == found.pop((True, (2, 6, 24))) == {"bfloat16"}  # patch_in, text
    assert found.pop((False, None)) <= {"bfloat16", "float32"} and not found  # attention's products are float32


# --- What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads 5 does not divide dim 24"),
        ({"num_heads": 8}, r"dim/num_heads 3 must be even"),
        ({"freq_dim": 15}, "freq_dim is 15: it must be a multiple of 2"),
        ({"ffn_dim": 0}, "ffn_dim is 0: it must be"),
        ({"num_layers": -1}, "num_layers is -1: it must be"),
        ({"dtype": "float33"}, "dtype is 'float33': it must be one of float32, bfloat16, float16, float64"),
        ({"time_dtype": "int8"}, "time_dtype is 'int8': it must be one of float32, bfloat16, float16, float64"),
        ({"remat": "some"}, "remat is 'some': it must be one of none, full, save_attention, save_products"),
        ({"attention": "cudnn"}, "attention is 'cudnn': it must be one of auto, reference, blockwise, triton"),
        ({"model_type": "v2v"}, "model_type is 'v2v': it must be one of t2v, i2v"),
        ({"clip_dim": 10}, "clip_dim 10 does not fit model_type 't2v'"),
        ({"model_type": "i2v", "in_dim": 6, "clip_dim": -1}, "clip_dim is -1: it must be"),
        ({"model_type": "i2v"}, "in_dim 4 and out_dim 4 do not fit model_type 'i2v'"),
        ({"in_dim": 6}, "in_dim 6 and out_dim 4 do not fit model_type 't2v'"),
        ({"patch_size": 2}, r"patch_size must be tuple\[int, int, int\], got 2"),
        ({"patch_size": (1, 2.0, 2)}, r"patch_size\[1\] must be int, got 2.0"),
        ({"eps": -1.0}, "eps is -1.0: it must be from 1e-30"),
        ({"t5_tokens": 7}, "t5_tokens 7 must be text_len 6, or not given"),
        ({"patch_size": (2, 2)}, r"patch_size must be tuple\[int, int, int\], got \(2, 2\)"),
        ({"patch_size": (1, 0, 2)}, r"patch_size\[1\] is 0: it must be from 1"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_with_their_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_fields_of_a_json_file_make_the_same_config():
    assert replace(TINY, patch_size=[1, 2, 2], t5_tokens=6) == replace(TINY, t5_tokens=6)
    assert network_of(TINY).module is Wan
    assert hash(TINY) == hash(replace(TINY))


WANTED = {
    "t2v": r"this network \(model_type 't2v', clip_dim 0\) takes x and text(\n|$)",
    "i2v": r"this network \(model_type 'i2v', clip_dim 0\) takes x, text and y(\n|$)",
    "i2v_clip": r"this network \(model_type 'i2v', clip_dim 10\) takes x, text and y, and clip_features(\n|$)",
}


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("t2v", {"y": shaped(2, 2, 4, 6, 4)}, WANTED["t2v"]),
        ("t2v", {"clip_features": shaped(2, 5, 10)}, WANTED["t2v"]),
        ("i2v", {"y": None}, WANTED["i2v"]),
        ("i2v", {"clip_features": shaped(2, 5, 10)}, WANTED["i2v"]),
        ("i2v_clip", {"y": None}, WANTED["i2v_clip"]),
        ("i2v_clip", {"clip_features": None}, WANTED["i2v_clip"]),
        ("i2v_clip", {"clip_features": shaped(2, 5, 9)}, r"\[b, tokens, 10\], got \(2, 5, 9\)"),
        ("i2v_clip", {"clip_features": shaped(2, 10)}, r"\[b, tokens, 10\], got \(2, 10\)"),
        ("t2v", {"x": shaped(2, 2, 4, 6, 3)}, r"sum to in_dim 4 on the same .*, got x \(2, 2, 4, 6, 3\)(\n|$)"),
        ("i2v", {"y": shaped(2, 2, 4, 6, 4)}, r"sum to in_dim 9 .* x \(2, 2, 4, 6, 4\), y \(2, 2, 4, 6, 4\)"),
        ("i2v", {"y": shaped(2, 1, 4, 6, 5)}, r"the same \[b, t, h, w\], got x \(2, 2, 4, 6, 4\), y \(2, 1, 4, 6, 5\)"),
        ("t2v", {"text": shaped(2, 7, 8)}, r"text must be \[b, at most 6, 8\], got \(2, 7, 8\)"),
        ("t2v", {"text": shaped(2, 6, 9)}, r"text must be \[b, at most 6, 8\], got \(2, 6, 9\)"),
        ("t2v", {"t": shaped(2, 1)}, r"its times t \[b\] or \[b, frames\], got \(2, 2, 4, 6, 4\) and \(2, 1\)"),
        ("t2v", {"t": shaped(1)}, r"its times t \[b\] or \[b, frames\], got \(2, 2, 4, 6, 4\) and \(1,\)"),
        ("t2v", {"x": shaped(2, 4, 6, 4)}, r"x must be \[b, t, h, w, c\].*got \(2, 4, 6, 4\) and \(2,\)"),
        ("t2v", {"text": shaped(6, 8)}, r"text must be \[b, at most 6, 8\], got \(6, 8\)"),
        ("t2v", {"x": shaped(2, 2, 5, 6, 4)}, "patch 1×2×2 does not divide the 2×5×6 frames, rows and columns"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_their_shapes(kind, change, message):
    x, t, cond = inputs(KINDS[kind])
    arguments = {"x": x, "t": t} | cond | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: Wan(KINDS[kind]).apply({"params": p}, **arrays(arguments)), random_params(KINDS[kind]))


def arrays(arguments):
    """Zeros where only a shape was given."""
    struct = jax.ShapeDtypeStruct
    return {k: jnp.zeros(v.shape, v.dtype) if isinstance(v, struct) else v for k, v in arguments.items()}

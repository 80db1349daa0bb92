"""The Cosmos network: the reference's numbers, its tangents, its samples, and what it refuses."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax import models
from rcm_jax.method import denoiser, samplers
from rcm_jax.models.cosmos import CosmosConfig
from tests import tiny
from tests.cosmos import TINY, apply, golden_config, golden_params, inputs, random_params
from tests.tiny import cases, columns, relative, stem
from tests.wan import channels_first, channels_last, precision

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
replace = dataclasses.replace

# float64: rounding, reached 2e-15. float32: the suggested ones are 5e-6 and 1e-5.
TOLERANCES = {"float64": (1e-13, 1e-13), "float32": (5e-6, 1e-5)}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES)


def input_sets(suffix="jvp_f64"):
    """(file, prefix of its arrays) of every recorded set of inputs."""
    paths = [path for path in cases("cosmos_dit/*.npz") if path.with_suffix(".safetensors").exists()]
    return [(p, name.removesuffix(suffix)) for p in paths for name in np.load(p).files if name.endswith(suffix)]


def recorded_network(path, dtype):
    """(config, params) beside an .npz."""
    config = golden_config(path.with_suffix(".config.json"), dtype=dtype, time_dtype=dtype)
    return config, golden_params(path.with_suffix(".safetensors"), config, dtype)


@functools.cache
def value_and_tangent(config):
    """Compiled (params, x, t, cond, dx, dt) -> (value, tangent)."""

    def call(params, x, t, cond, dx, dt):
        return jax.jvp(lambda x, t: apply(config, params, x, t, cond), (x, t), (dx, dt))

    return jax.jit(call)


@pytest.mark.golden
@pytest.mark.smoke
@each_dtype
@pytest.mark.parametrize(("path", "prefix"), input_sets(), ids=lambda value: stem(value).strip("_"))
def test_value_and_tangent_are_those_of_the_reference(path, prefix, dtype):
    data = np.load(path)
    with precision(dtype):
        config, params = recorded_network(path, dtype)
        found = {name.removeprefix(prefix): jnp.asarray(data[name], dtype) for name in data if name.startswith(prefix)}
        cond = {"text": found["crossattn_emb"], "padding_mask": found["padding_mask"][:, 0]}
        x, dx = channels_last(found["x"]), channels_last(found["tangent_x"])
        t, dt = columns(found["timesteps"]), columns(found["tangent_t"])
        value, tangent = value_and_tangent(config)(params, x, t, cond, dx, dt)
    assert value.dtype == dtype
    for ours, name, bound in zip((value, tangent), ("out", "jvp"), TOLERANCES[dtype], strict=True):
        assert relative(channels_first(ours), data[f"{prefix}{name}_f64"]) < bound, name


@pytest.mark.golden
@each_dtype
@pytest.mark.parametrize("path", cases("cosmos_dit/text2image_sampling.npz"), ids=stem)
def test_few_step_samples_are_those_of_the_reference(path, dtype):
    """Its sampler has x_sigma = x0 + sigma·noise, cos t of ours times as much, and so starts from sin t·noise."""
    data = np.load(path)
    sigmas = (80.0, 3.6, 1.5574, 0.684)
    (network,) = [p for p in cases("cosmos_dit/*.npz") if p.with_suffix(".safetensors").exists()]
    with precision(dtype):
        config, params = recorded_network(network, dtype)
        F = denoiser.from_rectified_flow(functools.partial(apply, config))
        cond = {"text": jnp.asarray(data["crossattn_emb"], dtype)}
        first, rest = channels_last(data["init_noise"]), channels_last(data["step_noise"])
        for n in sorted(int(key[9:]) for key in data if re.fullmatch(r"distill_n\d+", key)):
            times = np.arctan(sigmas[:n]).astype(dtype)
            noise = jnp.concatenate([np.sin(times[0]) * first[None], rest[: n - 1]]).astype(dtype)
            x0 = jax.jit(functools.partial(samplers.few_step, F))(params, noise, times, cond)
            bound = 1e-5 if dtype == "float32" else 1e-12
            assert relative(channels_first(x0), data[f"distill_n{n}_f64"]) < bound, n


def test_no_mask_is_a_mask_of_zeros_and_a_mask_of_another_size_is_resized():
    x, t, cond = inputs()
    params = random_params()
    plain = apply(TINY, params, x, t, cond)
    mask = jnp.zeros((2, 4, 6)).at[:, :, 4:].set(1)
    masked = apply(TINY, params, x, t, cond | {"padding_mask": mask})
    np.testing.assert_array_equal(plain, apply(TINY, params, x, t, cond | {"padding_mask": jnp.zeros((2, 8, 12))}))
    assert np.any(plain != masked)
    large = mask.repeat(8, axis=1).repeat(8, axis=2)
    np.testing.assert_array_equal(masked, apply(TINY, params, x, t, cond | {"padding_mask": large}))


def test_what_is_computed_again_changes_no_number():
    x, t, cond = inputs()
    value = jax.jit(functools.partial(apply, TINY))(random_params(), x, t, cond)
    for remat in ("full", "save_attention", "save_products"):
        again = jax.jit(functools.partial(apply, replace(TINY, remat=remat)))(random_params(), x, t, cond)
        np.testing.assert_allclose(again, value, rtol=1e-5, atol=1e-6)


def test_narrow_blocks_leave_time_and_output_in_float32():
    x, t, cond = inputs()
    narrow = apply(replace(TINY, dtype="bfloat16"), random_params(), x, t, cond)
    assert narrow.dtype == jnp.float32
    assert 1e-4 < relative(narrow, apply(TINY, random_params(), x, t, cond)) < 0.1


@pytest.mark.parametrize(("name", "other"), [("patch_temporal", 2), ("use_adaln_lora", False), ("pos_emb_cls", "rope")])
def test_what_is_not_built_is_refused_by_name(name, other):
    with pytest.raises(ValueError, match=f"{name} is {other!r}: it must be .*, for nothing else is supported"):
        replace(TINY, **{name: other})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=jnp.zeros((2, 1, 4, 6, 3))), r"x must be \[b, t, h, w, 4\]"),
        (dict(x=jnp.zeros((2, 1, 4, 18, 4))), "more than the .* of max_frames, max_img_h and max_img_w"),
        (dict(x=jnp.zeros((2, 1, 5, 6, 4))), "patch 1×2×2 does not divide"),
        (dict(text=jnp.zeros((2, 5, 9))), r"text must be \[b, tokens, 8\]"),
        (dict(padding_mask=jnp.zeros((2, 1, 4, 6))), r"padding_mask must be \[b, H, W\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_numbers(changes, message):
    x, t, cond = inputs()
    x = changes.pop("x", x)
    with pytest.raises(ValueError, match=message):
        apply(replace(TINY, max_img_w=16), random_params(), x, t, cond | changes)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be even, and 12 at least"):
        CosmosConfig(model_channels=20, num_blocks=1, num_heads=2)


# --- video to world

VIDEO = replace(TINY, in_channels=5, known_frames=2)


@pytest.mark.golden
@pytest.mark.smoke
@each_dtype
@pytest.mark.parametrize("path", cases("cosmos_video/*.npz"), ids=stem)
def test_frames_behind_known_ones_and_their_tangents_are_those_of_the_reference(path, dtype):
    theirs, data = json.loads(path.with_suffix(".config.json").read_text()), np.load(path)
    ratios = dict(zip("thw", theirs["rope_scale"], strict=True))
    config = CosmosConfig(
        model_channels=theirs["num_attention_heads"] * theirs["attention_head_dim"], num_blocks=theirs["num_layers"],
        num_heads=theirs["num_attention_heads"], in_channels=5, out_channels=4, known_frames=2,
        crossattn_emb_channels=theirs["text_embed_dim"], adaln_lora_dim=theirs["adaln_lora_dim"], dtype=dtype,
        time_dtype=dtype, **{f"rope_{axis}_extrapolation_ratio": ratio for axis, ratio in ratios.items()},
    )  # fmt: skip
    with precision(dtype):
        params = golden_params(path.with_suffix(".diffusers.safetensors"), config, dtype)
        given = {name: jnp.asarray(data[name], dtype) for name in data if not name.endswith("_f64")}
        cond = {"text": given["text"], "known": channels_last(given["known"])}
        x, dx = channels_last(given["x"]), channels_last(given["tangent_x"])
        value, tangent = value_and_tangent(config)(params, x, given["t"], cond, dx, given["tangent_t"])
    bounds = (1e-6, 1e-6) if dtype == "float64" else TOLERANCES[dtype]  # diffusers computes sines of times in float32
    for ours, name, bound in zip((value, tangent), ("v", "jvp"), bounds, strict=True):
        assert relative(channels_first(ours), data[f"{name}_f64"]) < bound, name


def test_every_known_frame_counts_and_none_is_answered():
    x, t, cond = inputs(VIDEO, grid=(3, 4, 6))
    known = jnp.asarray(np.random.default_rng(5).normal(size=(2, 2, 4, 6, 4)), jnp.float32)
    params = random_params(VIDEO)
    answer = apply(VIDEO, params, x, t, cond | {"known": known})
    assert answer.shape == x.shape
    for frame in range(2):
        other = apply(VIDEO, params, x, t, cond | {"known": known.at[:, frame].add(1)})
        assert relative(other, answer) > 1e-3
    whole = models.token_grid(VIDEO, (3, 4, 6, 4))
    assert whole == (5, 2, 3)


@pytest.mark.parametrize("known", [None, jnp.zeros((2, 1, 4, 6, 4)), jnp.zeros((2, 2, 4, 4, 4))])
def test_other_known_frames_are_refused(known):
    x, t, cond = inputs(VIDEO, grid=(3, 4, 6))
    with pytest.raises(ValueError, match=r"known must be \(2, 2, 4, 6, 4\), the frames before x"):
        apply(VIDEO, random_params(VIDEO), x, t, cond | {"known": known})
    with pytest.raises(ValueError, match="in_channels 4 must be 5"):
        replace(TINY, known_frames=1)

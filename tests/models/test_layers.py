"""Layers on their own: patches, norms, sinusoids, rotary embedding, and blocks in one scan."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.models.layers import (
    REMAT_POLICIES,
    LayerNorm,
    RMSNorm,
    layer_norm,
    patchify,
    rope_angles,
    rope_tables,
    rotate_pairs,
    sinusoids,
    stack,
    unpatchify,
)
from tests import tiny
from tests.tiny import cases, stem, x64

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((2, 1, 8, 8, 1), (1, 2, 2)),
        ((3, 2, 4, 6, 5), (1, 2, 2)),
        ((1, 3, 6, 9, 2), (3, 3, 3)),
        ((2, 5, 4, 7, 3), (1, 1, 1)),
        ((1, 4, 6, 5, 2), (2, 3, 1)),
    ],
)
def test_unpatchify_undoes_patchify(shape, patch):
    x = np.arange(np.prod(shape)).reshape(shape)
    tokens = patchify(x, patch)
    assert tokens.shape == (shape[0], np.prod(shape[1:4]) // np.prod(patch), np.prod(patch) * shape[4])
    np.testing.assert_array_equal(unpatchify(tokens, patch, shape), x)


def test_tokens_are_patches_frame_by_frame_and_row_by_row():
    x = np.arange(16).reshape(1, 1, 4, 4, 1)
    by_rows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(patchify(x, (1, 2, 2))[0], by_rows)
    frames = np.concatenate([x, 16 + x], axis=1)
    np.testing.assert_array_equal(patchify(frames, (1, 2, 2))[0], np.concatenate([by_rows, 16 + np.array(by_rows)]))
    np.testing.assert_array_equal(
        patchify(frames, (2, 2, 2))[0], np.concatenate([by_rows, 16 + np.array(by_rows)], axis=1)
    )


def test_channels_of_a_pixel_stay_together():
    x = np.arange(12).reshape(1, 1, 2, 2, 3)
    np.testing.assert_array_equal(patchify(x, (1, 2, 2)).ravel(), np.arange(12))


@pytest.mark.parametrize("patch", [(2, 2, 3), (1, 3, 3), (1, 2, 2)])
def test_a_patch_that_does_not_divide_is_refused_with_all_sizes(patch):
    wanted = "patch {}×{}×{} does not divide the 3×8×9 frames, rows and columns".format(*patch)
    with pytest.raises(ValueError, match=wanted):
        patchify(jnp.zeros((1, 3, 8, 9, 1)), patch)


def test_layer_norm_has_mean_0_and_variance_1_in_float32():
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
    y = layer_norm(x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(-1), 1, atol=1e-4)


@pytest.mark.parametrize("epsilon", [1e-6, 1.0])
def test_layer_norm_module_scales_and_shifts(epsilon):
    x = (np.random.default_rng(0).normal(size=(3, 8)) + 4).astype(jnp.bfloat16).astype(np.float64)
    scale, bias = np.arange(8) + 1.0, np.arange(8) - 4.0
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias
    with x64():
        y = LayerNorm(epsilon).apply({"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}, x)
        np.testing.assert_allclose(y, expected, rtol=1e-13)
    y = LayerNorm(epsilon).apply({"params": {"scale": scale, "bias": bias}}, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=0.06)  # entries up to 16, with 8 bits


def test_rms_norm_scales_to_rms_1_and_keeps_the_dtype():
    x = 7 * jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
    norm = RMSNorm()
    y = norm.apply(nn.meta.unbox(norm.init(jax.random.key(0), x)), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(y.astype(jnp.float32) ** 2, -1)), 1, atol=1e-2)  # bfloat16


def test_rms_norm_by_its_formula():
    x, scale = np.random.default_rng(0).normal(size=(3, 8)), np.arange(8) + 1.0
    with x64():
        y = RMSNorm(0.5).apply({"params": {"scale": jnp.asarray(scale)}}, x)
        np.testing.assert_allclose(y, x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * scale, rtol=1e-13)


def test_sinusoids_are_float32_cosines_then_sines():
    t, frequencies = jnp.asarray([0.5, 1.5], jnp.bfloat16), jnp.asarray([1.0, 16.0])
    y = sinusoids(t, frequencies)
    assert y.dtype == jnp.float32
    angles = np.outer([0.5, 1.5], [1.0, 16.0])
    np.testing.assert_allclose(y, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-6)


# --- Rotary embedding


@pytest.mark.parametrize(("head_dim", "pairs"), [(128, (22, 21, 21)), (12, (2, 2, 2)), (16, (4, 2, 2)), (4, (2, 0, 0))])
def test_time_has_the_pairs_that_height_and_width_leave(head_dim, pairs):
    assert [angles.shape for angles in rope_angles((3, 4, 5), head_dim)] == list(zip((3, 4, 5), pairs, strict=True))


def test_angles_fall_from_a_radian_per_position():
    time, rows, _ = rope_angles((2, 3, 4), 24)  # 8 features of each axis
    np.testing.assert_allclose(time[1], [1, 1e-1, 1e-2, 1e-3])
    np.testing.assert_allclose(rows, np.outer([0, 1, 2], [1, 1e-1, 1e-2, 1e-3]))


ANGLES = "_dbg_rope_freqs_f64"
RECORDED = [(path, name) for path in cases("wan_dit/*.npz") for name in np.load(path).files if name.endswith(ANGLES)]


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize(("path", "name"), RECORDED, ids=stem)
def test_angles_are_those_of_the_reference(path, name):
    data = np.load(path)
    expected, shape = data[name], data[name.replace(ANGLES, "_x")].shape
    with x64():
        cos, sin = rope_tables((shape[2], shape[3] // 2, shape[4] // 2), 2 * expected.shape[1], jnp.float64)
    np.testing.assert_allclose(cos, np.cos(expected), rtol=0, atol=1e-14)
    np.testing.assert_allclose(sin, np.sin(expected), rtol=0, atol=1e-14)


def test_rotation_is_multiplication_by_a_complex_number():
    rng = np.random.default_rng(0)
    x, angles = rng.normal(size=(2, 5, 3, 8)), rng.normal(size=(5, 4))
    with x64():
        y = np.asarray(rotate_pairs(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles)))
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(y[..., 0::2] + 1j * y[..., 1::2], expected, rtol=1e-14)


def test_rotation_computes_in_the_dtype_of_its_tables_and_returns_that_of_x():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 12), jnp.bfloat16)
    cos, sin = rope_tables((1, 2, 3), 12, jnp.float32)
    y = rotate_pairs(x, cos, sin)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, rotate_pairs(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16))


def test_scores_depend_on_the_distance_of_tokens_alone():
    rng = np.random.default_rng(0)
    q, k = (np.broadcast_to(rng.normal(size=12), (1, 6, 1, 12)) for _ in range(2))
    with x64():
        cos, sin = rope_tables((6, 1, 1), 12, jnp.float64)
        q, k = (rotate_pairs(jnp.asarray(x), cos, sin)[0, :, 0] for x in (q, k))
        scores = np.asarray(q @ k.T)
    for distance in range(-5, 6):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-12)


def test_no_table_of_a_real_video_becomes_a_constant_of_the_program():
    closed = jax.make_jaxpr(lambda: rope_tables((21, 30, 52), 128, jnp.float32))()
    assert sum(np.size(c) for c in closed.consts) <= 2 * (21 + 30 + 52) * 22


# --- Blocks in one scan


class Toy(nn.Module):
    """A block with a shared argument."""

    @nn.compact
    def __call__(self, x, shift):
        return jnp.tanh(nn.Dense(x.shape[-1], name="dense")(x) + shift), None


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_a_stack_is_a_loop_over_layers_that_differ(remat):
    layers = stack(Toy, 3, remat)()
    x, shift = jax.random.normal(jax.random.key(1), (2, 4)), jnp.arange(4.0)
    params = layers.init(jax.random.key(0), x, shift)["params"]
    assert params["dense"]["kernel"].shape == (3, 4, 4)
    assert len(np.unique(params["dense"]["kernel"])) == 48  # a key for each layer
    expected = x
    for i in range(3):
        expected, _ = Toy().apply({"params": jax.tree.map(lambda p, i=i: p[i], params)}, expected, shift)
    np.testing.assert_allclose(layers.apply({"params": params}, x, shift)[0], expected, rtol=1e-6, atol=1e-6)


def test_every_remat_policy_is_tested():
    assert set(REMAT_POLICIES) == {"none", "full", "save_attention", "save_products"}

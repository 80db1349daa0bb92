"""The EDM2 network: the reference's numbers and tangents, its weights in training, what sCM adds, what it refuses."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file

from rcm_jax import convert, models
from rcm_jax.method import denoiser
from rcm_jax.models import edm2_unet, layers
from rcm_jax.models.edm2_unet import NETWORK, PUBLISHED, Edm2Config, Logvar, Place, normalised, places
from rcm_jax.parallel.sharding import MeshConfig, batch_sharding, make_mesh, partition_spec, state_sharding
from tests import tiny
from tests.edm2 import TINY, apply, golden_case, inputs, labels, random_params
from tests.tiny import cases, relative, stem
from tests.wan import PRECISIONS, precision

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
replace = dataclasses.replace
SIGMA_DATA = 0.5  # of the reference's images; those of ours have 1

# Values and tangents. Suggested are 1e-5 and 2e-5 in float32, 1e-10 in float64.
TOLERANCES = {"float32": (1e-5, 2e-5), "float64": (1e-12, 1e-12)}


def largest(a, b) -> float:
    """max|a − b| / max|b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def channels_last(x, dtype):
    return jnp.asarray(np.moveaxis(x, 1, -1), dtype)


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


@functools.cache
def value_and_tangent(config):
    """Compiled (params, x, t, cond, dx, dt) -> (value, tangent)."""

    def call(params, x, t, cond, dx, dt):
        return jax.jvp(lambda x, t: apply(config, params, x, t, cond), (x, t), (dx, dt))

    return jax.jit(call)


value = jax.jit(apply, static_argnums=0)


def denoised(F, params, data, cond, dtype):
    """D of a recorded case by a network's own function, in the reference's units."""
    times = jnp.arctan(jnp.asarray(data["sigma"], dtype) / SIGMA_DATA)
    x_t = jnp.cos(times)[:, None, None, None] * channels_last(data["x_sigma"], dtype) / SIGMA_DATA
    velocity = denoiser.from_edm(F, NETWORK.time_scale, SIGMA_DATA)
    return SIGMA_DATA * denoiser.denoise(velocity, params, x_t, times, cond)


def recorded():
    return [path for path in cases("edm2_unet/*.npz") if path.with_suffix(".config.json").exists()]


# --- The reference


@pytest.mark.golden
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("path", recorded(), ids=stem)
def test_values_and_tangents_are_those_of_the_reference(path, dtype):
    """Where activations are clipped, too (edm2_uncond)."""
    data = np.load(path)
    with precision(dtype):
        config, params = golden_case(path, dtype)
        cond = {"label": labels(data["class_labels"])} if config.label_dim else {"label": np.zeros(4, np.int32)}
        call = functools.partial(value_and_tangent(config), params)
        x, dx = channels_last(data["x"], dtype), channels_last(data["dx"], dtype)
        t, dt = (jnp.asarray(data[name], dtype) for name in ("c_noise", "dc_noise"))
        F, dF = call(x, t, cond, dx, dt)
        tangents = {"jvp": dF, "jvp_x": call(x, t, cond, dx, 0 * dt)[1], "jvp_c": call(x, t, cond, 0 * dx, dt)[1]}
        D = denoised(lambda _, x, t, cond: call(x, t, cond, dx, dt)[0], params, data, cond, dtype)
        c_noise = jnp.log(jnp.asarray(data["sigma"], dtype)) / 4
        logvar = Logvar(config).apply({"params": params["logvar"]}, c_noise)
    assert F.dtype == D.dtype == logvar.dtype == dtype
    values = {"F": channels_first(F), "D": channels_first(D), "logvar": logvar[:, None, None, None]}
    for name, ours in values.items():
        assert largest(ours, data[f"{name}_f64"]) < TOLERANCES[dtype][0], name
    for name, ours in tangents.items():
        assert largest(channels_first(ours), data[f"{name}_f64"]) < TOLERANCES[dtype][1], name


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("edm2_unet/*.after_train_forward.safetensors"), ids=stem)
def test_a_training_step_starts_from_normalised_weights_and_has_their_gradient(path):
    case = path.with_name(path.name.replace(".after_train_forward.safetensors", ".npz"))
    data, after = np.load(case), load_file(path)
    config, params = golden_case(case)
    params = jax.jit(normalised)(params)
    ours = convert.to_reference("edm2", params, config, "official")
    for name, tensor in after.items():
        assert largest(ours[name], tensor) < 1e-6, name

    def loss(params):
        D = denoised(functools.partial(apply, config), params, data, {"label": labels(data["class_labels"])}, "float32")
        logvar = Logvar(config).apply({"params": params["logvar"]}, jnp.asarray(data["c_noise"]))
        return jnp.sum(D * channels_last(data["grad_cotangent"], "float32")) + jnp.sum(logvar), (D, logvar)

    grads, (D, logvar) = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert largest(channels_first(D), data["train_D_f32"]) < 1e-5
    assert largest(logvar, data["train_logvar_f32"][:, 0, 0, 0]) < 1e-5
    grads = convert.to_reference("edm2", grads, config, "official")
    bound = 2.4e-4  # the reference's own error in float32
    for name in (name for name in data.files if name.startswith("train_grad/")):
        assert largest(grads[name.removeprefix("train_grad/")], data[name]) < bound, name
    norms = dict(zip(data["train_grad_norms_names"], data["train_grad_norms"], strict=True))
    for name, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(np.float64(grads[name])), norm, rtol=bound, err_msg=name)
    buffers = grads.keys() - norms.keys()
    assert len(buffers) == 4 and not any(np.any(grads[name]) for name in buffers)


@pytest.mark.golden
def test_positional_features_and_the_second_norm_are_those_recorded(golden):
    times, norm = np.load(golden / "scm/time_embeddings.npz"), np.load(golden / "scm/double_normalisation.npz")
    with tiny.x64():
        features = edm2_unet.positional(jnp.asarray(times["t"]), 16)
        np.testing.assert_allclose(features, np.sqrt(2) * times["positional_16_endpoint0/cos_sin"], atol=1e-14)
        for name in ("s", "b"):
            np.testing.assert_allclose(edm2_unet.pixel_norm(norm[name]), norm[f"pnorm_{name}"], rtol=1e-12)


# --- What sCM adds


def test_guidance_adds_nothing_until_it_is_trained():
    x, t, cond = inputs()
    fresh = random_params() | {"guidance_gain": jnp.zeros(())}
    plain = value(TINY, fresh, x, t, cond)
    guided = cond | {"guidance": jnp.array([1.0, 1.8])}
    np.testing.assert_array_equal(value(TINY, fresh, x, t, guided), plain)
    assert relative(value(TINY, random_params(), x, t, guided), plain) > 1e-3
    initial = nn.meta.unbox(jax.eval_shape(lambda key: models.init(TINY, key), jax.random.key(0)))
    assert initial["emb_guidance"]["kernel"].shape == (8, 16)
    with pytest.raises(ValueError, match="without an input for it: set guidance_input"):
        apply(replace(TINY, guidance_input=False), random_params(), x, t, guided)


def test_double_normalisation_is_a_pixel_norm_of_the_scale(monkeypatch):
    x, t, cond = inputs()
    once = value(replace(TINY, double_norm=False), random_params(), x, t, cond)
    assert relative(value(TINY, random_params(), x, t, cond), once) > 1e-3
    monkeypatch.setattr(edm2_unet, "pixel_norm", lambda x: x)
    np.testing.assert_array_equal(value(replace(TINY, clip_act=255.0), random_params(), x, t, cond), once)


def test_the_tangent_under_dropout_is_the_difference_quotient():
    with tiny.x64():
        config = replace(TINY, dtype="float64")
        x, t, cond = inputs(config, dtype="float64")
        params = jax.tree.map(lambda p: p.astype("float64"), random_params())
        cond["guidance"] = jnp.array([1.2, 1.9])
        cond["dropout"] = {"key": jnp.arange(4, dtype=jnp.uint32).reshape(2, 2), "rate": jnp.array([0.3, 0.5])}
        dx, dt = jnp.cos(x), jnp.array([1.0, -0.7])
        call, h = value_and_tangent(config), 1e-5
        F, dF = call(params, x, t, cond, dx, dt)
        ends = [call(params, x + s * dx, t + s * dt, cond, dx, dt)[0] for s in (h, -h)]
        assert relative((ends[0] - ends[1]) / (2 * h), dF) < 1e-7
        np.testing.assert_array_equal(F, call(params, x, t, cond, dx, dt)[0])
        none = cond | {"dropout": cond["dropout"] | {"rate": jnp.zeros(2)}}
        assert relative(F, call(params, x, t, none, dx, dt)[0]) > 1e-2


@pytest.mark.parametrize("resolution", [None, 4, 2])
def test_blocks_of_at_most_the_given_resolution_drop_each_its_own(resolution, monkeypatch):
    found = []
    monkeypatch.setattr(layers, "dropped", lambda x, how, place: found.append((x.shape[1], how, place)) or x)
    x, t, cond = inputs()
    config = replace(TINY, dropout_resolution=resolution)
    cond["dropout"] = {"key": jnp.zeros((2, 2), jnp.uint32), "rate": jnp.full(2, 0.5)}
    jax.eval_shape(functools.partial(apply, config), random_params(), x, t, cond)
    assert [place for *_, place in found] == list(range(len(places(config))))
    assert [how is not None for _, how, _ in found] == [size <= (resolution or 8) for size, *_ in found]


# --- Precision, memory, shapes


def test_narrow_blocks_leave_embedding_and_output_in_float32():
    x, t, cond = inputs()
    narrow = value(replace(TINY, dtype="bfloat16"), random_params(), x, t, cond)
    assert narrow.dtype == jnp.float32
    assert 1e-4 < relative(narrow, value(TINY, random_params(), x, t, cond)) < 0.1


def test_blocks_that_are_computed_again_give_the_same_numbers():
    x, t, cond = inputs()
    again = replace(TINY, remat="full")
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(apply(again, p, x, t, cond))))(random_params())
    kept = [eqn for _, eqn in tiny.equations(jaxpr.jaxpr) if eqn.primitive.name in ("checkpoint", "remat2")]
    assert len(kept) >= len(places(again))
    plain = value(TINY, random_params(), x, t, cond)
    assert relative(value(again, random_params(), x, t, cond), plain) < 1e-5


def test_zeros_have_finite_derivatives_of_first_and_second_order():
    def first(x, dx):
        return jnp.sum(jax.jvp(lambda x: edm2_unet.unit(x, -1), (x,), (dx,))[1])

    assert np.all(np.isfinite(jax.grad(first)(jnp.zeros((2, 3)), jnp.ones((2, 3)))))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "512" in name])
def test_every_large_parameter_of_a_published_network_is_split(name):
    mesh = AbstractMesh((1, 64, 1), ("data", "fsdp", "seq"))
    boxed = jax.eval_shape(lambda key: models.init(PUBLISHED[name], key), jax.random.key(0))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    whole = [leaf.value.size for leaf in leaves if not any(partition_spec(leaf.names, leaf.value.shape, mesh))]
    assert sum(whole) < 2**16


def test_a_mesh_that_splits_parameters_and_tokens_changes_no_number():
    x, t, cond = inputs(batch=8)
    plain = value(TINY, random_params(), x, t, cond)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
    boxed = jax.eval_shape(lambda key: models.init(TINY, key), jax.random.key(0))
    params = jax.device_put(random_params(), state_sharding(boxed, mesh))
    with jax.set_mesh(mesh):
        assert relative(value(TINY, params, *jax.device_put((x, t, cond), batch_sharding(mesh))), plain) < 1e-5


def test_a_network_takes_other_sizes_than_its_own_and_no_label():
    x, t, cond = inputs()
    wide = jnp.zeros((2, 4, 6, 2))
    assert jax.eval_shape(functools.partial(apply, TINY), random_params(), wide, t, cond).shape == wide.shape
    null = value(TINY, random_params(), x, t, {"label": jnp.full(2, 3)})
    np.testing.assert_array_equal(value(TINY, random_params(), x, t, {}), null)
    assert relative(value(TINY, random_params(), x, t, cond), null) > 1e-3


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 8, 7, 2), (8, 8, 2)])
def test_images_that_do_not_fit_are_refused_with_the_numbers(shape):
    with pytest.raises(ValueError, match=r"x must be \[b, h, w, 2\] with h and w multiples of 2, got"):
        apply(TINY, random_params(), jnp.zeros(shape), jnp.zeros(2), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(channel_mult=()), r"channel_mult is \(\)"),
        (dict(label_dim=-1), "label_dim is -1"),
        (dict(num_blocks=0), "num_blocks is 0"),
        (dict(img_resolution=9), "img_resolution 9 must be a multiple of 2"),
        (dict(embedding_type="sines"), "is 'sines': it must be one of fourier, positional"),
        (dict(remat="some"), "remat is 'some': it must be one of"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_the_record_says_what_training_must_know(monkeypatch):
    assert (NETWORK.parametrization, NETWORK.time_scale, NETWORK.patch(TINY)) == ("edm", 0.25, None)
    assert NETWORK.optional == ("guidance", "dropout") and NETWORK.normalised is normalised
    assert TINY.num_classes == 3 and NETWORK.smallest(TINY) == (2, 2, 2)
    monkeypatch.setattr(edm2_unet, "unit", lambda kernel: "normalised")
    for name, leaf in flatten_dict(normalised(random_params()), sep="/").items():
        assert isinstance(leaf, str) == name.endswith("kernel"), name
    assert Place("dec_4x4_in0", 4, 192, attention=True) in places(Edm2Config(4, 3, 0, channel_mult=(1,)))

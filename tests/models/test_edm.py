"""The U-Nets of EDM: the reference's numbers and tangents, and what the sCM paper changes in them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax import convert, models
from rcm_jax.method import denoiser
from rcm_jax.models import edm_unet
from rcm_jax.models.edm_unet import EdmConfig, Fourier, GroupNorm, modulated, pixel_norm, positional_embedding
from tests import tiny
from tests.edm import SCM, SMALL, apply, channels_first, channels_last, golden_config, golden_params, inputs, labels_of
from tests.edm import random_params as drawn
from tests.tiny import cases, relative, stem, x64
from tests.wan import precision

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
replace = dataclasses.replace

SIGMA_DATA = 0.5
# Of F and D, of tangents, of tangents with random frequencies. float64: 5e-15 reached; float32: the suggested ones.
TOLERANCES = {"float64": (1e-12, 1e-12, 1e-12), "float32": (1e-5, 2e-5, 2e-4)}


def error(a, b) -> float:
    """max|a − b|/max|b|."""
    assert a.shape == b.shape
    return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


@functools.cache
def value_and_tangent(config):
    """Compiled (params, x, t, label, augment, dx, dt) -> (value, tangent, {module: output})."""

    def call(params, x, t, label, augment, dx, dt):
        def network(x, t):
            module, kept = edm_unet.EdmUNet(config), {"mutable": ["intermediates"], "capture_intermediates": True}
            out, state = module.apply({"params": params}, x, t, label, augment=augment, **kept)
            return out, {name: of["__call__"][0] for name, of in state["intermediates"].items() if name[:3] != "__c"}

        return jax.jvp(network, (x, t), (dx, dt), has_aux=True)

    return jax.jit(call)


def networks():
    return [path for path in cases("edm_unet/*.npz") if path.with_suffix(".safetensors").exists()]


@pytest.mark.golden
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("path", networks(), ids=stem)
def test_values_tangents_and_every_block_are_those_of_the_reference(path, dtype):
    data = np.load(path)
    with precision(dtype):
        config = golden_config(path.with_suffix(".config.json"), dtype=dtype)
        params = golden_params(path.with_suffix(".safetensors"), config, dtype)
        given = {name: jnp.asarray(data[name], dtype) for name in data if data[name].dtype == np.float32}
        x, dx, x_sigma = (channels_last(given[name]) for name in ("x", "dx", "x_sigma"))
        label = labels_of(given["class_labels"]) if config.label_dim else None
        augment = given.get("augment_labels", jnp.zeros((len(given["x"]), 0)))
        t, dt, sigma = given["c_noise"], given["dc_noise"], given["sigma"]
        network = functools.partial(value_and_tangent(config), params)
        value, tangent_x, blocks = network(x, t, label, augment, dx, 0 * dt)
        tangent_c = network(x, t, label, augment, 0 * dx, dt)[1]
        plain = network(x, t, label, 0 * augment, dx, dt)[0]

        def net(params, x, t, cond):
            return network(x, t, label, augment, dx, dt)[0]

        F = denoiser.from_edm(net, sigma_data=SIGMA_DATA)
        trig = jnp.arctan(sigma / SIGMA_DATA)  # c_in·x has unit variance
        x_trig = jnp.cos(trig)[:, None, None, None] * x_sigma / SIGMA_DATA
        D = SIGMA_DATA * denoiser.denoise(F, params, x_trig, trig, {})
    # A float32 t near pi/2 tells a large sigma to 5e-6 only, which random frequencies raise a hundredfold.
    told = np.asarray(sigma) < (10 if dtype == "float32" and config.embedding_type == "fourier" else np.inf)
    found = {"F": value, "D": D, "jvp": tangent_x + tangent_c, "jvp_x": tangent_x, "jvp_c": tangent_c}
    found |= {"F_noaug": plain} if "F_noaug_f64" in data else {}
    value_bound, positional, fourier = TOLERANCES[dtype]
    tangent_bound = positional if config.embedding_type == "positional" else fourier
    assert value.dtype == dtype
    for name, ours in found.items():
        bound = tangent_bound if name.startswith("jvp") else value_bound
        rows = told if name == "D" else slice(None)
        assert error(channels_first(ours)[rows], data[f"{name}_f64"][rows]) < bound, name
    recorded = [name for name in data if name.startswith("block/") and "aux_residual" not in name]
    assert recorded
    for name in recorded:  # stored as float32
        ours = channels_first(blocks[name.removeprefix("block/").replace(".", "_")])[:1]
        assert error(ours, data[name]) < 1e-5, name


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("scm/time_embeddings.npz"), ids=stem)
def test_time_embeddings_are_those_of_the_reference(path):
    data = np.load(path)
    with x64():
        t = jnp.asarray(data["t"])
        for channels in (8, 16):
            for endpoint in (0, 1):
                embed = functools.partial(positional_embedding, channels=channels, endpoint=bool(endpoint))
                value, tangent = jax.jvp(embed, (t,), (jnp.ones_like(t),))
                name = f"positional_{channels}_endpoint{endpoint}"
                assert error(value, data[f"{name}/cos_sin"]) < 1e-12
                assert error(jnp.roll(value, channels // 2, axis=-1), data[f"{name}/sin_cos"]) < 1e-12
                assert error(tangent, data[f"{name}/d_dt_cos_sin"]) < 1e-12
        for scale in (0.02, 16):
            params = {"freqs": scale * jnp.asarray(data["fourier_unit_freqs"])}
            assert error(Fourier(16).apply({"params": params}, t), data[f"fourier_scale{scale}/cos_sin"]) < 1e-12


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("scm/double_normalisation.npz"), ids=stem)
def test_double_normalisation_is_that_of_the_paper(path):
    data = np.load(path)
    with x64():
        x, dx = (channels_last(data[name]) for name in ("x", "dx"))
        s, b, ds, db = (jnp.asarray(data[name])[:, None, None] for name in ("s", "b", "ds", "db"))
        ones = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}  # two groups
        norms = {"group_norm": lambda x: GroupNorm(1e-6).apply({"params": ones}, x), "pixel_norm": pixel_norm}
        for name, norm in norms.items():
            assert error(channels_first(norm(x)), data[f"{name}_x"]) < 1e-12

            y = jax.jit(lambda *xsb, norm=norm: modulated(norm(xsb[0]), *xsb[1:], True))
            value, tangent = jax.jvp(y, (x, s, b), (dx, ds, db))
            assert error(channels_first(value), data[f"y_{name}"]) < 1e-12
            assert error(channels_first(tangent), data[f"jvp_{name}"]) < 1e-10
        assert error(pixel_norm(s)[:, 0, 0], data["pnorm_s"]) < 1e-12


# --- What the sCM paper changes

compiled = jax.jit(apply, static_argnums=0)


def test_the_scale_of_guidance_adds_nothing_at_first_and_something_later():
    x, t, label = inputs()
    s, params = jnp.float32([1.2, 1.9]), drawn()
    start = jax.tree.map(jnp.zeros_like, params["map_guidance"])
    without = compiled(SMALL, params, x, t, label)
    np.testing.assert_array_equal(compiled(SMALL, params | {"map_guidance": start}, x, t, label, guidance=s), without)
    moved = compiled(SMALL, params, x, t, label, guidance=s)
    assert np.all(np.abs(moved - without).max((1, 2, 3)) > 1e-3)
    plain = replace(SMALL, guidance_input=False)
    assert convert.shapes_of("edm", SMALL).keys() - convert.shapes_of("edm", plain) == {"map_guidance/kernel"}
    with pytest.raises(ValueError, match="set guidance_input=True"):
        apply(plain, params, x, t, label, guidance=s)


def dropout(rate, batch=2):
    return {"key": jnp.arange(2 * batch, dtype=jnp.uint32).reshape(batch, 2), "rate": jnp.full(batch, rate)}


def test_dropout_is_an_input_and_its_tangent_that_of_what_it_leaves():
    with x64():
        config = replace(SMALL, dtype="float64")
        params = jax.tree.map(lambda p: jnp.asarray(p, "float64"), drawn())
        x, t, label = inputs(dtype="float64")

        @jax.jit
        def line(h, drops):
            """The network and its tangent at a place of a line."""
            dx = jnp.cos(x)
            call = functools.partial(apply, config, params, label=label, dropout=drops)
            return jax.jvp(lambda h: call(x + h * dx, t + h), (h,), (jnp.ones_like(h),))

        drops, h = dropout(0.4), 1e-5
        value, tangent = line(0.0, drops)
        difference = (line(h, drops)[0] - line(-h, drops)[0]) / (2 * h)
        np.testing.assert_array_equal(line(0.0, drops)[0], value)
        undropped = line(0.0, dropout(0.0))[0]
        without = compiled(config, params, x, t, label)
    assert relative(tangent, difference) < 1e-8
    assert relative(undropped, without) < 1e-14
    assert relative(value, without) > 1e-2


@pytest.mark.parametrize(("largest", "resolutions"), [(4, {4}), (None, {4, 8})])
def test_only_low_resolutions_drop_each_block_at_its_own_place(monkeypatch, largest, resolutions):
    calls = []
    spy = lambda x, given, place: calls.append((x.shape[1], given is not None, place)) or x  # noqa: E731
    monkeypatch.setattr(edm_unet, "dropped", spy)
    config = replace(SMALL, **SCM | {"dropout_resolution": largest})
    jax.eval_shape(functools.partial(apply, config), drawn(config), *inputs(config), dropout=dropout(0.4))
    assert {size for size, drops, _ in calls if drops} == resolutions
    calls = calls[-10:]  # before them are those of drawing the parameters
    assert [place for *_, place in calls] == list(range(10))


# --- Computation


def test_remat_changes_no_value_every_parameter_has_a_gradient_and_bfloat16_changes_little():
    x, t, label = inputs()
    s, again = jnp.float32([1.2, 1.9]), replace(SMALL, remat="full")

    @jax.jit
    def gradient(params):
        def loss(params):
            out = apply(again, params, x, t, label, guidance=s)
            return jnp.mean(out**2), out

        return jax.grad(loss, has_aux=True)(params)

    out = compiled(SMALL, drawn(), x, t, label, guidance=s)
    there, same = gradient(drawn())
    np.testing.assert_allclose(same, out, rtol=1e-5, atol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(there))
    jaxpr = jax.make_jaxpr(functools.partial(apply, again))(drawn(), x, t, label)
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("remat2") == 5  # the blocks
    low = compiled(replace(SMALL, dtype="bfloat16"), drawn(), x, t, label, guidance=s)
    assert low.dtype == jnp.float32 and 0 < relative(low, out) < 0.05


def test_random_frequencies_are_not_trained():
    def loss(params):
        return jnp.sum(Fourier(8).apply({"params": params}, jnp.float32([0.3])) ** 3)

    assert not np.any(jax.grad(loss)({"freqs": jnp.arange(4.0)})["freqs"])


BOUNDS = {  # half the width of the uniform initial values, of a kernel with these inputs and outputs, and of its bias
    "SongUNet": lambda i, o: {"": (6 / (i + o)) ** 0.5, "attention": (1.2 / (i + o)) ** 0.5, "last": 1e-5, "bias": 0},
    "DhariwalUNet": lambda i, o: {"": i**-0.5, "attention": i**-0.5, "last": 0, "bias": i**-0.5},
}


@pytest.mark.parametrize("model_type", BOUNDS)
def test_initial_values_are_those_of_the_reference(model_type):
    changes = {"model_channels": 64, "adaptive_scale": None, "double_norm": False, "model_type": model_type}
    config = replace(SMALL, **changes, guidance_input=False)
    params = jax.jit(lambda key: nn.meta.unbox(models.init(config, key)))(jax.random.key(0))
    block = params["dec_4x4_in0"]
    for name, kind in (("conv0", ""), ("affine", ""), ("qkv", "attention")):
        kernel, bias = (np.asarray(block[name][leaf]) for leaf in ("kernel", "bias"))
        i, o = kernel[..., 0].size, kernel[..., 0, :].size
        bounds = BOUNDS[model_type](i, o)
        np.testing.assert_allclose(np.abs(kernel).max(), bounds[kind], rtol=2e-2)
        np.testing.assert_allclose(kernel.std(), bounds[kind] / 3**0.5, rtol=2e-2)
        np.testing.assert_allclose(np.abs(bias).max(), bounds["bias"], rtol=0.1)
    last = BOUNDS[model_type](1, 1)["last"]
    xavier = (6 / (9 * 128)) ** 0.5
    np.testing.assert_allclose(np.abs(block["conv1"]["kernel"]).max(), last * xavier, rtol=2e-2)
    out = params["dec_4x4_aux_conv" if model_type == "SongUNet" else "out_conv"]["kernel"]
    assert np.abs(out).max() <= last and bool(last) == bool(np.any(out))
    if model_type == "DhariwalUNet":  # labels are normal, of unit variance
        np.testing.assert_allclose(np.std(params["map_label"]["kernel"]), 1, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_type": "skip"}, "encoder_type is 'skip': it must be one of standard, residual"),
        ({"model_type": "UNet"}, "model_type is 'UNet': it must be one of SongUNet, DhariwalUNet"),
        ({"adaptive_scale": False}, "double_norm .* needs adaptive_scale=True"),
        ({"channel_mult": (1, 2, 2, 2)}, "img_resolution 4 cannot be halved"),
        ({"channel_mult": ()}, r"channel_mult is \(\): it must be one value or more"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter \(1, 2, 1\) must have an even number"),
        ({"label_dim": -1}, "label_dim is -1"),
        ({"model_type": "DhariwalUNet", "embedding_type": "fourier"}, "a DhariwalUNet has .*'positional'"),
        ({"num_blocks": 0}, "num_blocks is 0"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_inputs_of_another_size_and_channels_without_groups_are_refused():
    x, t, label = inputs()
    with pytest.raises(ValueError, match=r"x must be \[b, 4, 4, 3\] and t \[b\], got \(2, 2, 4, 3\) and \(2,\)"):
        apply(SMALL, drawn(), x[:, :2], t, label)
    odd = EdmConfig(img_resolution=4, model_channels=10, channel_mult=(3,), num_blocks=1)
    with pytest.raises(ValueError, match="30 channels cannot be 7 equal groups"):
        convert.shapes_of("edm", odd)

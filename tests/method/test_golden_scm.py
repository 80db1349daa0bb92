"""sCD, sCT and their samplers with the reference's network, a tiny DDPM++ of EDM: recorded values and gradients.

The recorded data have deviation sigma_d = 0.5. Ours have 1: x, dx/dt, g before its norm is limited, and the derivative
of sigma_d·F are ours times sigma_d; F, the limited g and the losses are the same, with c/sigma_d for c.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert.edm import config_of
from rcm_jax.method import denoiser, samplers, trigflow, weighting
from rcm_jax.method.objectives import scm
from rcm_jax.models.edm_unet import EdmUNet
from tests import tiny
from tests.conftest import GOLDEN
from tests.tiny import cases, stem
from tests.wan import PRECISIONS, precision

pytestmark = pytest.mark.golden
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

FOLDER = GOLDEN / "scm"
SINGLE, GRADIENT = 1e-5, 1e-4  # suggested in float32: of values; of every tensor of a gradient
DOUBLE = 1e-10
each_precision = pytest.mark.parametrize("dtype", PRECISIONS)


def error(ours, theirs) -> float:
    """As the recorded errors are counted."""
    ours = np.asarray(ours, np.float64)
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def last(x, dtype):
    """Images [..., c, h, w], of our deviation, as ours."""
    return jnp.asarray(np.moveaxis(x / 0.5, -3, -1), dtype)


def first(x):
    """Ours as theirs."""
    return np.moveaxis(np.asarray(x), -1, -3)


@functools.cache
def config(dtype):
    kwargs = json.loads((FOLDER / "network.config.json").read_text())
    return config_of(kwargs, dtype=dtype)


@functools.cache
def params(name, dtype):
    loaded = convert.from_reference("edm", load_file(FOLDER / f"{name}.safetensors"), config(dtype))
    with jax.ensure_compile_time_eval():  # arrays, also where the first call is inside a trace
        return jax.tree.map(lambda a: jnp.asarray(a, dtype), loaded)


def velocity(dtype, parametrization=denoiser.from_trigflow):
    module = EdmUNet(config(dtype))
    return parametrization(lambda p, x, t, cond: module.apply({"params": p}, x, t, **cond))


def inputs(dtype):
    """x0, unit noise, t, labels and the weights w of the recorded batch."""
    data = np.load(FOLDER / "inputs.npz")
    assert float(data["sigma_d"]) == 0.5 and float(data["c"]) == 0.1
    t = jnp.asarray(data["t"], dtype)
    return last(data["x0"], dtype), last(data["z"], dtype), t, labels(data), jnp.asarray(data["w_phi"], dtype)


def labels(data):
    """Of one-hot rows; one of zeros is no class."""
    one_hot = data["class_labels"]
    return {"label": jnp.asarray(np.where(one_hot.any(axis=1), one_hot.argmax(axis=1), one_hot.shape[1]), jnp.int32)}


def followed(path, dtype, F):
    """(x_t, F_T) of a recorded case."""
    x0, eps, t, cond, _ = inputs(dtype)
    x_t = trigflow.diffuse(x0, eps, t)
    if "_sct_" in path.stem:
        return x_t, trigflow.target(x0, eps, t)
    guidance = float(np.load(FOLDER / "inputs.npz")["guidance"]) if "cfg" in path.stem else 1.0
    uncond = {"label": jnp.int32(config(dtype).label_dim)}
    return x_t, denoiser.guided(F, guidance)(params("teacher", dtype), x_t, t, (cond, uncond))


@each_precision
@pytest.mark.parametrize("path", cases("scm/equations_*_r*.npz"), ids=stem)
def test_the_papers_loss_its_tangent_and_the_gradient_of_every_tensor(path, dtype):
    with precision(dtype):
        data, F = np.load(path), velocity(dtype)
        _, _, t, cond, w = inputs(dtype)
        x_t, F_T = jax.jit(lambda: followed(path, dtype, F))()
        size, r = x_t[0].size, float(data["r"])

        def mean_loss(p):
            F_theta, dF = scm.jvp_derivative(F, p, x_t, t, cond, F_T)
            g = scm.tangent(x_t, t, F_theta, dF, F_T, r=r, warmup_form="scm")
            values, metrics = scm.loss(F, p, x_t, t, cond, F_T, r=r, warmup_form="scm", constant=0.2)
            losses = weighting.adaptive(values, w, size)
            return jnp.mean(losses), (F_theta, dF, g, metrics["tangent_norm"], values, losses)

        grads, found = jax.jit(jax.grad(mean_loss, has_aux=True))(params("student", dtype))
        bound = SINGLE if dtype == "float32" else DOUBLE
        F_theta, dF, g, norm, values, losses = found
        theirs = {"F": first(F_theta), "jvp": 0.5 * first(dF), "g_raw": 0.5 * first(g), "sq": values, "loss": losses}
        theirs |= {"g_raw_norm": 0.5 * norm, "x_t": 0.5 * first(x_t), "dxt_dt": 0.5 * first(F_T)}
        for name, value in theirs.items():
            assert error(value, data[name]) < bound, name
        assert (
            "g" in data and error(0.5 * first(g) / (data["g_raw_norm"][:, None, None, None] + 0.1), data["g"]) < bound
        )
        recorded = path.parent / f"{path.stem}.grads.safetensors"
        named = convert.to_reference("edm", grads, config(dtype), "official")
        norms = dict(zip(data["grad_names"], data["grad_norms"], strict=True)) if "grad_names" in data else {}
        assert {name.removeprefix("model.") for name in norms} <= {name.removeprefix("model.") for name in named}
        if recorded.exists():
            for name, gradient in load_file(recorded).items():
                ours = next(named[key] for key in (name, f"model.{name}", name.removeprefix("model.")) if key in named)
                if np.max(np.abs(gradient)):
                    # Those of a normalised bias are 0 but for rounding: error counts against the largest of the tensor.
                    assert error(ours, gradient) < (GRADIENT if dtype == "float32" else 1e-6), name


@each_precision
def test_one_step_two_steps_ddim_and_heun_are_those_of_the_paper_and_of_edm(dtype):
    with precision(dtype):
        data, F = np.load(FOLDER / "sampling.npz"), velocity(dtype)
        noise = jnp.stack([last(data["z1"], dtype), last(data["z2"], dtype)])
        cond, student, bound = labels(data), params("student", dtype), SINGLE if dtype == "float32" else DOUBLE
        times = np.array([data["t_max"], data["t_mid"]])
        np.testing.assert_allclose(samplers.student_times(80 / 0.5, (1.1,)), times, rtol=1e-7)
        for k, name in ((1, "one_step_f64"), (2, "two_step_f64")):
            x0 = jax.jit(lambda noise, k=k: samplers.few_step(F, student, noise[:k], jnp.asarray(times[:k]), cond))(
                noise
            )
            assert error(0.5 * first(x0), data[name]) < bound, name
        teacher, start = params("teacher", dtype), noise[0]
        grid = data["ddim8_t"]
        x = jax.jit(lambda x: samplers.euler(F, teacher, x, grid.astype(dtype), cond))(start)
        assert error(0.5 * first(x), data["ddim8_f64"][-1]) < bound
        # Their Heun starts from 80·z1/sigma_d at sigma 80: cos t·80/sigma_d·z1 in TrigFlow, which is sin t·z1/sigma_d.
        t = np.append(np.arctan(np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18) ** 7 / 0.5), 0)
        np.testing.assert_allclose(samplers.edm_times(18, 160.0, 0.004, 7.0), t, rtol=2e-7)
        x = jax.jit(lambda x: samplers.heun(F, teacher, np.sin(t[0]) * x, t, cond))(start)
        assert error(0.5 * first(x), data["teacher_heun18_f64"]) < bound


@pytest.mark.parametrize("path", cases("scm/fastgen/fastgen_paper_flags_*_it10000.npz"), ids=stem)
def test_fastgen_with_the_papers_flags_has_our_tangent_and_loss_for_an_edm_network(path):
    """Its network is given ln(sigma)/4, so that F = −F_edm, and its w is minus a learned log variance."""
    with precision("float64"):
        data, F = np.load(path), velocity("float64", denoiser.from_edm)
        _, _, t, cond, _ = inputs("float64")
        x_t, F_T = jax.jit(lambda: followed(path, "float64", F))()
        student = params("student", "float64")
        F_theta, dF = jax.jit(lambda p: scm.jvp_derivative(F, p, x_t, t, cond, F_T))(student)
        values, _ = jax.jit(
            lambda p: scm.loss(F, p, x_t, t, cond, F_T, r=float(data["r"]), warmup_form="scm", constant=0.2)
        )(student)
        w = -data["logvar"][:, 0]
        losses = weighting.adaptive(values, w, x_t[0].size)
    assert error(first(F_theta), data["F_theta"]) < DOUBLE
    assert error(first(dF), data["F_theta_jvp"]) < DOUBLE
    assert error(losses, data["loss"]) < DOUBLE

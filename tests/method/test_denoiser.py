"""Networks of other conventions as TrigFlow velocities, and guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.method import denoiser
from tests.tiny import x64

X = jnp.asarray([[1.0, -2.0], [0.5, 0.3], [-1.5, 2.0]])
T = jnp.asarray([0.2, 0.9, 1.4])


def test_trigflow_network_is_given_scaled_time_and_predicts_f_itself():
    F = denoiser.from_trigflow(lambda params, x, time, cond: params * x + time[:, None] + cond, time_scale=3.0)
    np.testing.assert_allclose(F(2.0, X, T, 1.0), 2 * X + 3 * T[:, None] + 1, rtol=1e-6)


def test_rectified_flow_network_is_given_its_own_sample_and_time():
    seen = {}

    def net(params, x, time, cond):
        seen.update(x=x, time=time)
        return jnp.zeros_like(x)

    denoiser.from_rectified_flow(net, 1000.0)(None, X, T, None)
    sigma = np.tan(np.asarray(T, np.float64))
    np.testing.assert_allclose(seen["time"], 1000 * sigma / (1 + sigma), rtol=1e-5)
    np.testing.assert_allclose(seen["x"], X / (np.cos(T) + np.sin(T))[:, None], rtol=1e-6)


@pytest.mark.golden
def test_edm_network_is_minus_the_velocity_and_is_given_a_quarter_of_log_sigma(golden):
    """The recorded numbers have sigma_d = 0.5: dividing data and noise levels by it gives ours."""
    data = np.load(golden / "scm/trigflow_conversions.npz")
    sigma_d = float(data["sigma_d"])
    seen = {}

    def net(params, x, time, cond):
        seen.update(x=x, time=time)
        return jnp.asarray(data["edm_F"])

    with x64():
        t, x = jnp.asarray(data["t"]), jnp.asarray(data["x_t"]) / sigma_d
        F = denoiser.from_edm(net)
        velocity = F(None, x, t, None)
        clean = denoiser.denoise(F, None, x, t, None)
    np.testing.assert_allclose(velocity, data["trig_F"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.asarray(clean) * sigma_d, data["trig_D"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.asarray(clean) * sigma_d, data["edm_D"], rtol=0, atol=1e-12)
    # c_in·x_sigma = x_t/sigma_d
    c_in = data["edm_c_in"][:, None, None, None]
    np.testing.assert_allclose(seen["x"], c_in * data["edm_x"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(seen["time"], data["edm_c_noise"], rtol=0, atol=1e-12)


def test_edm_time_is_finite_at_half_pi_in_float32():
    seen = {}

    def net(params, x, time, cond):
        seen.update(time=time)
        return x

    denoiser.from_edm(net)(None, X[:1], jnp.asarray([np.pi / 2], jnp.float32), None)
    assert np.isfinite(seen["time"]).all()


# --- guidance


class Counting:
    """A velocity that remembers the batch sizes it was called with."""

    def __init__(self):
        self.batches = []

    def __call__(self, params, x, t, cond):
        assert x.shape[0] == t.shape[0] == cond["label"].shape[0]
        self.batches.append(x.shape[0])
        return x * (1 + cond["label"][:, None]) + t[:, None]


COND, UNCOND = {"label": jnp.array([1, 2, 3])}, {"label": np.int64(10)}


@pytest.mark.smoke
@pytest.mark.parametrize("w", [0.0, 0.5, 5.0])
def test_guidance_is_uncond_plus_w_times_the_difference_in_one_call(w):
    F = Counting()
    guided = denoiser.guided(F, w)(None, X, T, (COND, UNCOND))
    assert F.batches == [6]
    conditional = X * (1 + COND["label"][:, None]) + T[:, None]
    unconditional = X * 11 + T[:, None]
    np.testing.assert_allclose(guided, unconditional + w * (conditional - unconditional), rtol=1e-5, atol=1e-5)


def test_guidance_1_is_the_conditional_network_in_one_call_of_the_batch_alone():
    F = Counting()
    guided = denoiser.guided(F, 1.0)(None, X, T, (COND, UNCOND))
    assert F.batches == [3]
    np.testing.assert_array_equal(guided, F(None, X, T, COND))


def test_guidance_leaves_alone_what_uncond_lacks():
    """Image to video: the first frame of every sample stays its own."""

    def F(params, x, t, cond):
        return cond["text"] + cond["y"]

    text, y = jnp.array([1.0, 2.0]), jnp.array([10.0, 100.0])
    guided = denoiser.guided(F, 5.0)(None, jnp.zeros(2), jnp.ones(2), ({"text": text, "y": y}, {"text": np.zeros(())}))
    np.testing.assert_allclose(guided, 5 * text + y)


def test_guidance_keeps_the_dtype_of_the_condition():
    seen = []

    def F(params, x, t, cond):
        seen.append(cond["text"])
        return x

    text = jnp.ones((3, 4, 2), jnp.bfloat16)
    denoiser.guided(F, 2.0)(None, X, T, ({"text": text}, {"text": np.zeros((4, 2))}))
    assert seen[0].dtype == jnp.bfloat16
    assert seen[0].shape == (6, 4, 2)
    np.testing.assert_array_equal(seen[0][3:], 0)

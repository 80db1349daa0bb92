"""The first frame as a network of image to video takes it."""

import jax
import numpy as np
import pytest

from configs import wan_1_3b
from rcm_jax.media import vae
from rcm_jax.media.first_frame import check_conditions, first_frame
from rcm_jax.models import network_of, wan
from rcm_jax.util.config import revise
from tests import tiny, wan_vae

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
I2V = revise(wan_1_3b.tiny(wan_1_3b.EXPERIMENT).model, {"model_type": "i2v", "in_dim": 12})
CONFIG = wan_vae.TINY


@pytest.mark.parametrize("t", [1, 3])
def test_the_mask_comes_first_then_the_latents_of_the_frame_and_of_grey(t):
    params = wan_vae.random_params()
    frame = np.tanh(wan_vae.normal(16, 24, 3))
    y = first_frame(CONFIG, params, frame, t)
    assert (y.shape, y.dtype) == ((t, 2, 3, 4 + CONFIG.z_dim), np.float32)
    np.testing.assert_array_equal(y[0, ..., :4], 1)
    np.testing.assert_array_equal(y[1:, ..., :4], 0)
    pixels = np.concatenate([frame[None], np.zeros((4 * t - 4, 16, 24, 3), np.float32)])
    np.testing.assert_allclose(y[..., 4:], vae.encode(CONFIG, params, pixels[None])[0], rtol=1e-5, atol=1e-5)
    other = first_frame(CONFIG, params, -frame, t)
    assert np.abs(other[0, ..., 4:] - y[0, ..., 4:]).max() > 0.1
    np.testing.assert_allclose(first_frame(CONFIG, params, frame, t, tile=3), y, rtol=1e-5, atol=1e-5)


def test_it_has_the_shape_that_the_network_asks_for():
    config = revise(CONFIG, {"z_dim": 4, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4})
    params = jax.eval_shape(lambda: wan_vae.random_params(config))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    y = first_frame(config, params, np.zeros((32, 48, 3), np.float32), 2)
    asked = network_of(I2V).conditions(I2V, (2, 4, 6, 4))["y"]
    assert (y.shape, y.dtype) == (asked.shape, asked.dtype)
    check_conditions(I2V, (2, 4, 6, 4), {"y": y.shape})


def test_published_networks_and_what_a_set_has():
    shape, y = (20, 60, 104, 16), {"y": (20, 60, 104, 20)}
    check_conditions(wan.PUBLISHED["wan-1.3b"], shape, {})
    check_conditions(wan.PUBLISHED["wan2.2-i2v-a14b"], shape, y)
    clip = {"clip_features": (257, 1280)}
    check_conditions(wan.PUBLISHED["wan-i2v-14b"], shape, y | clip)
    lacks = r"clip_features \[257, 1280\], but this set has y .*is y \(first_frame\); CLIP's features of it are --clip$"
    with pytest.raises(ValueError, match=lacks):
        check_conditions(wan.PUBLISHED["wan-i2v-14b"], shape, y)
    with pytest.raises(ValueError, match=r"takes y .*, but this set has y .*, clip_features \[257, 1280\]; .*--clip$"):
        check_conditions(wan.PUBLISHED["wan2.2-i2v-a14b"], shape, y | clip)
    with pytest.raises(ValueError, match=r"takes y \[20, 60, 104, 20\], but this set has nothing; the first frame"):
        check_conditions(wan.PUBLISHED["wan2.2-i2v-a14b"], shape, {})
    with pytest.raises(ValueError, match=r"takes nothing, but this set has y \[20, 60, 104, 20\]"):
        check_conditions(wan.PUBLISHED["wan-1.3b"], shape, y)
    with pytest.raises(ValueError, match=r"takes y \[20, 60, 104, 20\], but this set has y \[20, 60, 104, 18\]"):
        check_conditions(wan.PUBLISHED["wan2.2-i2v-a14b"], shape, {"y": (20, 60, 104, 18)})

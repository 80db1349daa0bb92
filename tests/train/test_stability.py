"""What is watched: means by time, and the derivative against a difference."""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.method import denoiser
from rcm_jax.method.objectives import Given
from rcm_jax.train import stability
from rcm_jax.train.metrics import Window
from tests import tiny


def test_metrics_by_time_are_sums_and_counts_and_an_empty_part_has_no_mean():
    t = jnp.array([0.0, 0.3, 0.5, jnp.pi / 2])
    metrics = {name: jnp.array([1.0, 2.0, 3.0, 4.0]) for name in ("tangent_norm", "loss")}
    parts = stability.by_time(metrics, t)
    assert set(parts) == {f"tangent_norm/t{k}" for k in range(4)}
    window = Window()
    window.add(parts)
    window.add(stability.by_time({"tangent_norm": jnp.array([9.0])}, jnp.array([0.1])))
    window.add({"probe": jnp.ones(())})
    assert window.read() == {"probe": 1, "tangent_norm/t0": 4, "tangent_norm/t1": 3, "tangent_norm/t3": 4}


def probe_of(F):
    params = jnp.float32(3.0)
    batch = {"x0": jax.random.normal(jax.random.key(0), (4, 6)), "cond": {}}
    velocities = denoiser.Velocities(F, lambda params, x, t, cond: -0.3 * x, F)
    given = Given(velocities, params, None, tiny.Teacher(params, {}), batch, jax.random.key(1))
    return stability.probe(tiny.scm_config(), given)


def test_the_probe_finds_a_right_derivative_right_and_a_wrong_one_wrong():
    def smooth(params, x, t, cond):
        return jnp.sin(params * x) + jnp.cos(2 * t)[:, None]

    def wrong(params, x, t, cond):
        return smooth(params, x, jax.lax.stop_gradient(t), cond)

    right = probe_of(smooth)
    assert set(right) == {f"probe/jvp_error/t={t}" for t in stability.PROBED}
    assert max(right.values()) < 1e-3
    assert min(np.array(list(probe_of(wrong).values()))) > 0.1

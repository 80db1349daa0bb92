"""From a network to the TrigFlow velocity F that every loss and sampler sees.

A velocity is a pure function F(params, x [b, ...], t [b], cond) -> [b, ...], with t in [0, pi/2] and cond any pytree
of arrays [b, ...]. A network is net(params, x, time [b], cond) in its own convention of input, time and output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rcm_jax.method import trigflow
from rcm_jax.method.trigflow import Batch, Times

Velocity = Callable[[Any, Batch, Times, Any], Batch]


class Velocities(NamedTuple):
    """F of each network of a distillation; the teacher's takes cond = (cond, uncond) and applies the guidance."""

    student: Velocity
    teacher: Velocity
    fake_score: Velocity


def from_trigflow(net, time_scale: float = 1.0) -> Velocity:
    """The network predicts F itself; it is given time_scale·t."""
    return lambda params, x, t, cond: net(params, x, time_scale * t, cond)


def from_rectified_flow(net, time_scale: float = 1.0) -> Velocity:
    """(3) The network predicts v = eps − x0 at x_rf, and is given time_scale·tau (Wan 1000, Cosmos 1)."""

    def velocity(params, x, t, cond):
        x_rf, tau = trigflow.to_rectified_flow(x, t)
        return trigflow.from_rectified_flow(x, net(params, x_rf, time_scale * tau, cond), t)

    return velocity


def from_edm(net, time_scale: float = 0.25, sigma_data: float = 0.5) -> Velocity:
    """F = −F_edm exactly (sigma = sigma_data·tan t, c_in·x_sigma = x_t); the network is given time_scale·ln sigma.

    EDM and EDM2 have time_scale 1/4; sigma_data is the deviation of the data that they were trained on, ours is 1.
    """
    return lambda params, x, t, cond: -net(params, x, time_scale * jnp.log(sigma_data * jnp.abs(jnp.tan(t))), cond)


PARAMETRIZATIONS = {"trigflow": from_trigflow, "rectified_flow": from_rectified_flow, "edm": from_edm}


def denoise(F: Velocity, params, x: Batch, t: Times, cond) -> Batch:
    """(2) f(x, t) = c·x − s·F(x, t): the predicted clean sample."""
    return trigflow.denoise(x, F(params, x, t, cond), t)


def without(cond: dict, uncond: dict) -> dict:
    """The conditions of guidance's second call: cond [b, ...] with those that uncond has (without b) in their place.

    What uncond lacks stays as it is: the first frame of image to video, where the text alone is guided.
    """
    return cond | {name: jnp.broadcast_to(u, cond[name].shape).astype(cond[name].dtype) for name, u in uncond.items()}


def with_dropout(F: Velocity, key, rate: float) -> Velocity:
    """F whose network drops activations at a rate, by the condition "dropout": the same ones in every call."""

    def velocity(params, x, t, cond):
        keys = jax.random.bits(key, (x.shape[0], 2), jnp.uint32)
        dropout = {"key": keys, "rate": jnp.full(x.shape[:1], rate, jnp.float32)}
        return F(params, x, t, cond | {"dropout": dropout})

    return velocity


def guided(F: Velocity, guidance: float | None) -> Velocity:
    """Classifier-free guidance F_u + w·(F_c − F_u) in one batched call of 2b.

    The returned velocity takes cond = (cond, uncond), see `without`. guidance: w; None: every sample has its own, the
    condition "guidance" [b], which the network itself is not given.
    w = 1 is the conditional network alone, at no extra cost. (Cosmos' own sampler counts w from 0: its w is ours − 1.)
    """
    if guidance == 1.0:
        return lambda params, x, t, conds: F(params, x, t, conds[0])

    def velocity(params, x, t, conds):
        cond, uncond = conds
        w = guidance
        if w is None:
            w = trigflow.expand(cond["guidance"], x)
            cond = {name: value for name, value in cond.items() if name != "guidance"}
        both = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, without(cond, uncond))
        F_c, F_u = jnp.split(F(params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), both), 2)
        return F_u + w * (F_c - F_u)

    return velocity


def by_noise_level(high: Velocity, low: Velocity, boundary: float) -> Velocity:
    """Two experts (Wan2.2): high answers at rectified-flow times tau >= boundary, low below; params = (high's, low's).

    One of the two runs, chosen by the first time of the batch: the times of a call must all be equal, as those of a
    sampler's step are. boundary in [0, 1]: 0.9 for image to video.
    """

    def velocity(params, x, t, cond):
        noisy = trigflow.rectified_flow_time(t[0]) >= boundary
        return jax.lax.cond(noisy, lambda: high(params[0], x, t, cond), lambda: low(params[1], x, t, cond))

    return velocity

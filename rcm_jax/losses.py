"""The losses of the method. Each returns (loss [b], metrics {name: [b]}); sums over all non-batch axes.

Equation numbers as in the README; sources: sCM (arXiv 2410.11081), rCM (arXiv 2510.08431), DMD2 (arXiv 2405.14867).
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from rcm_jax import denoiser, trigflow

WARMUP_FORMS = ("paper", "code")


def diffusion(F, x0, eps, t):
    """(8) ‖F − (c·eps − s·x0)‖² [b]: TrigFlow (flow matching) pretraining, and the critic on the student's samples.

    F, x0, eps [b, ...], t [b]. Equals ‖x0 − f‖²/s² without the division.
    """
    loss = sum_squares(F - trigflow.velocity(x0, eps, t))
    return loss, {"loss": loss}


def scm(F: denoiser.Velocity, params, x_t, t, cond, F_teacher, *, r, warmup_form="paper", constant=0.1):
    """(4)–(6) Continuous-time consistency loss with a normalised tangent.

    x_t, F_teacher [b, ...]; t [b]; r in [0, 1] the tangent warm-up (may be traced). One jax.jvp gives F, which carries
    the gradient, and dF, which does not: there is no second student forward. A sample whose F or tangent is not
    finite contributes 0 and has 1 in the metric "nonfinite".
    """
    cs = jnp.cos(t) * jnp.sin(t)
    F_theta, dF = jax.jvp(lambda x, t: F(params, x, t, cond), (x_t, t), (trigflow.expand(cs, x_t) * F_teacher, cs))
    F_fixed, dF = stop_gradient((F_theta, dF))
    g = tangent(x_t, t, F_fixed, dF, F_teacher, r=r, warmup_form=warmup_form)
    norm = jnp.sqrt(sum_squares(g))
    finite = jnp.isfinite(norm) & jnp.isfinite(sum_squares(F_fixed))
    # Masked before it meets F: 0·NaN in the backward pass would take the whole batch along.
    g = jnp.where(trigflow.expand(finite, g), g / trigflow.expand(norm + constant, g), 0.0)
    loss = jnp.where(finite, sum_squares(F_theta - F_fixed - g), 0.0)
    metrics = {
        "loss": loss,
        "tangent_norm": jnp.where(finite, norm, 0.0),
        "nonfinite": 1.0 - finite,
        "teacher_gap": jnp.where(finite, jnp.sqrt(sum_squares(F_fixed - F_teacher)), 0.0),
    }
    return loss, metrics


def tangent(x_t, t, F, dF, F_teacher, *, r, warmup_form):
    """(5) g = −c·sqrt(1 − r²s²)·(F − F_T) − (r·c·s·x_t + r·dF), before normalisation; dF already carries c·s.

    warmup_form "paper" multiplies the whole second part by r, "code" (official HEAD) only c·s·x_t; equal at r=1.
    """
    if warmup_form not in WARMUP_FORMS:
        raise ValueError(f"warmup_form {warmup_form!r} is none of {', '.join(WARMUP_FORMS)}")
    t = trigflow.expand(t, x_t)
    c, s = jnp.cos(t), jnp.sin(t)
    r_jvp = r if warmup_form == "paper" else 1.0
    # sqrt(1 − r²s²) written without cancellation at r = 1, t near pi/2, where it is c
    root = jnp.sqrt(c**2 + (1 - r**2) * s**2)
    return -c * root * (F - F_teacher) - (r * c * s * x_t + r_jvp * dF)


def dmd(x0, x_t, t, F_teacher, F_fake):
    """(7) Distribution matching: ‖x0 − sg[x0 − (f_fake − f_T)/w]‖², w = max(mean|x0 − f_T|, 1e-5) per sample.

    x0 [b, ...] the student's sample (carries the gradient), x_t its diffusion to t [b], F_teacher (guided) and F_fake
    at (x_t, t). The gradient in x0 is 2·(f_fake − f_T)/w.
    """
    f_teacher = trigflow.denoise(x_t, F_teacher, t)
    f_fake = trigflow.denoise(x_t, F_fake, t)
    weight = jnp.maximum(jnp.mean(jnp.abs(x0 - f_teacher), axis=tuple(range(1, x0.ndim))), 1e-5)
    target = stop_gradient(x0 - (f_fake - f_teacher) / trigflow.expand(weight, x0))
    loss = sum_squares(x0 - target)
    return loss, {"loss": loss, "weight": stop_gradient(weight)}


def sum_squares(x):
    """‖x‖² per sample: [b, ...] -> [b]."""
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))

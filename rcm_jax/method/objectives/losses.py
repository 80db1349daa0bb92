"""The losses of the method. Each returns (loss [b], metrics {name: [b]}); sums over all non-batch axes.

Equation numbers as in the README; sources: sCM (arXiv 2410.11081), rCM (arXiv 2510.08431), DMD2 (arXiv 2405.14867).
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from rcm_jax.method import denoiser, trigflow

WARMUP_FORMS = ("paper", "code", "scm")
STEP = 1e-4  # h of the finite differences, in t


def diffusion(F, x0, eps, t):
    """(8) ‖F − (c·eps − s·x0)‖² [b]: TrigFlow (flow matching) pretraining, and the critic on the student's samples.

    F, x0, eps [b, ...], t [b]. Equals ‖x0 − f‖²/s² without the division.
    """
    loss = sum_squares(F - trigflow.velocity(x0, eps, t))
    return loss, {"loss": loss}


def scm(
    F: denoiser.Velocity, params, x_t, t, cond, F_teacher, *, r, warmup_form="paper", derivative="jvp", limit="norm"
):
    """(4)–(6) Continuous-time consistency loss ‖F − sg[F] − sg[g]‖² with a limited tangent g.

    x_t, F_teacher [b, ...]; t [b]; r in [0, 1] the tangent warm-up (may be traced); derivative in DERIVATIVES, limit in
    LIMITS. A sample whose F or tangent is not finite contributes 0 and has 1 in the metric "nonfinite". The metric
    "residual" is the root mean square of c·df/dt along F_teacher: 0 for a perfect consistency function of a teacher.
    """
    F_theta, dF = DERIVATIVES[derivative](F, params, x_t, t, cond, F_teacher)
    F_fixed, dF = stop_gradient((F_theta, dF))
    g = tangent(x_t, t, F_fixed, dF, F_teacher, r=r, warmup_form=warmup_form)
    norm = jnp.sqrt(sum_squares(g))
    finite = jnp.isfinite(norm) & jnp.isfinite(sum_squares(F_fixed))
    # Masked before it meets F: 0·NaN in the backward pass would take the whole batch along.
    g = jnp.where(trigflow.expand(finite, g), LIMITS[limit](g, trigflow.expand(norm, g)), 0.0)
    loss = jnp.where(finite, sum_squares(F_theta - F_fixed - g), 0.0)
    c_df = tangent(x_t, t, F_fixed, dF, F_teacher, r=1.0, warmup_form=warmup_form)
    metrics = {
        "loss": loss,
        "tangent_norm": jnp.where(finite, norm, 0.0),
        "nonfinite": 1.0 - finite,
        "teacher_gap": jnp.where(finite, jnp.sqrt(sum_squares(F_fixed - F_teacher)), 0.0),
        "residual": jnp.where(finite, jnp.sqrt(sum_squares(c_df) / x_t[0].size), 0.0),
    }
    return loss, metrics


# (6); clipping to [−1, 1], the alternative of the sCM paper (section 4.1); and nothing: (g, its norm) -> g
LIMITS = {
    "norm": lambda g, norm: g / (norm + 0.1),
    "clip": lambda g, norm: jnp.clip(g, -1.0, 1.0),
    "none": lambda g, norm: g,
}


def jvp_derivative(F: denoiser.Velocity, params, x_t, t, cond, F_teacher):
    """(4) (F, dF) by one jax.jvp along (c·s·F_T, c·s): dF [b, ...] carries the factor c·s, here and below."""
    cs = jnp.cos(t) * jnp.sin(t)
    return jax.jvp(lambda x, t: F(params, x, t, cond), (x_t, t), (trigflow.expand(cs, x_t) * F_teacher, cs))


def semi_derivative(F: denoiser.Velocity, params, x_t, t, cond, F_teacher):
    """jvp in x alone, a finite difference in t: for networks whose time embedding has no usable derivative."""
    cs = trigflow.expand(jnp.cos(t) * jnp.sin(t), x_t)
    F_theta, dF = jax.jvp(lambda x: F(params, x, t, cond), (x_t,), (cs * F_teacher,))
    earlier = F(stop_gradient(params), x_t, t - STEP, cond)
    return F_theta, dF + cs * backward_difference(F_theta, earlier)


def discrete_derivative(F: denoiser.Velocity, params, x_t, t, cond, F_teacher):
    """A finite difference along the PF-ODE: no forward mode at all."""
    cs = trigflow.expand(jnp.cos(t) * jnp.sin(t), x_t)
    F_theta = F(params, x_t, t, cond)
    earlier = F(stop_gradient(params), trigflow.euler(x_t, F_teacher, t, t - STEP), t - STEP, cond)
    return F_theta, cs * backward_difference(F_theta, earlier)


def backward_difference(F, earlier):
    """(cos h·F(t) − F(t − h))/sin h, as the official code has it: dF/dt to first order in h."""
    return (math.cos(STEP) * F - earlier) / math.sin(STEP)


DERIVATIVES = {"jvp": jvp_derivative, "semi": semi_derivative, "discrete": discrete_derivative}


def tangent(x_t, t, F, dF, F_teacher, *, r, warmup_form):
    """(5) g = −c·sqrt(1 − r²s²)·(F − F_T) − (r·c·s·x_t + r·dF), before normalisation; dF already carries c·s.

    warmup_form "paper" multiplies the whole second part by r, "code" (official HEAD) only c·s·x_t; "scm", of the sCM
    paper, is "paper" with c² in the place of c·sqrt(1 − r²s²). All are equal at r = 1.
    """
    if warmup_form not in WARMUP_FORMS:
        raise ValueError(f"warmup_form {warmup_form!r} is none of {', '.join(WARMUP_FORMS)}")
    t = trigflow.expand(t, x_t)
    c, s = jnp.cos(t), jnp.sin(t)
    r_jvp = 1.0 if warmup_form == "code" else r
    # sqrt(1 − r²s²) written without cancellation at r = 1, t near pi/2, where it is c
    root = c if warmup_form == "scm" else jnp.sqrt(c**2 + (1 - r**2) * s**2)
    return -c * root * (F - F_teacher) - (r * c * s * x_t + r_jvp * dF)


def dcm(F: denoiser.Velocity, params, x_t, times, cond, teacher_F):
    """Discrete-time consistency: ‖f(x_t, times[0]) − sg[f(x_u, times[-1])]‖², x_u by Euler steps of the teacher.

    x_t [b, ...] at times[0]; times [k + 1, b], decreasing; teacher_F(x, t) -> [b, ...], guided. The steps are straight
    in t, x − (t − u)·F_T, as in the official code, not along the circle of (2): they agree as the interval shrinks.
    """
    x = x_t
    for t, u in itertools.pairwise(times):
        x = x - trigflow.expand(t - u, x) * teacher_F(x, t)
    target = denoiser.denoise(F, stop_gradient(params), x, times[-1], cond)
    loss = sum_squares(denoiser.denoise(F, params, x_t, times[0], cond) - stop_gradient(target))
    finite = jnp.isfinite(loss)
    loss = jnp.where(finite, loss, 0.0)
    return loss, {"loss": loss, "nonfinite": 1.0 - finite}


def adaptive(loss, log_weight, size: int):
    """e^w/D·loss − w [b]: the adaptive weighting of the sCM paper (equation 8), for D = size numbers in a sample."""
    return jnp.exp(log_weight) / size * loss - log_weight


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

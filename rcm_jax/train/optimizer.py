"""AdamW as the official runs use it, and the power EMA."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up of the learning rate; decay_steps > 0 adds a cosine to final_scale × learning_rate.

    All counts are updates of this network, not training iterations.
    """

    learning_rate: float = 1e-6
    b1: float = 0.0
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_steps: int = 0
    final_scale: float = 0.0

    def __post_init__(self):
        if 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps {self.decay_steps} must be over warmup_steps {self.warmup_steps}, or 0")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW; with b1 = 0 it keeps no first moment: 4 bytes less per parameter and the same numbers.

    The first update already has learning rate learning_rate/warmup_steps, not 0.
    """
    if config.b1 == 0.0:  # Adam's own bias-corrected second moment is all that is left
        scale = optax.scale_by_rms(decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)
    else:
        scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.chain(
        scale, optax.add_decayed_weights(config.weight_decay), optax.scale_by_learning_rate(schedule(config))
    )


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate at update n = 0, 1, ….: linear to its peak, then constant or a cosine over decay_steps."""
    peak, warmup = config.learning_rate, max(config.warmup_steps, 1)
    later = optax.constant_schedule(peak)
    if config.decay_steps:
        later = optax.cosine_decay_schedule(peak, config.decay_steps - config.warmup_steps, config.final_scale)
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
    return optax.join_schedules([rise, later], [config.warmup_steps])


def power_ema_exponent(std: float) -> float:
    """gamma, the largest real root of [1, 7, 16 − s⁻², 12 − s⁻²] for relative width s (EDM2, arXiv 2312.02696)."""
    if not 0 < std < 0.28:
        raise ValueError(f"EMA width {std} must be above 0 and below 0.28 (the paper has 0.05, the official code 0.1)")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(np.max(roots.real[np.abs(roots.imag) < 1e-9]))


def power_ema_beta(n, gamma: float):
    """beta_n = (1 − 1/(n+1))^(gamma+1) for the n-th update of the network, n = 0, 1, …; beta_0 = 0."""
    n = jnp.asarray(n, jnp.float32)
    return (n / (n + 1)) ** (gamma + 1)

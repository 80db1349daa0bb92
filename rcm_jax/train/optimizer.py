"""AdamW as the official runs of rCM use it, RAdam as those of sCM, and their learning rates."""

from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from rcm_jax.util.ranges import Natural, NotNegative, Positive, Probability, Share, among, config

CONSTANTS = ("freqs", "phases")  # leaves that networks keep as they were drawn


@config
class OptimizerConfig:
    """AdamW or RAdam (`kind`), with linear warm-up of the learning rate. After it the rate stays, or one of:

    decay_steps > 0: a cosine to final_scale × learning_rate. decay_after > 0: learning_rate/√(max(n/decay_after, 1)) at
    update n = 0, 1, …, as EDM2 (arXiv 2312.02696). All counts are updates of this network, not training iterations.
    """

    learning_rate: Positive = 1e-6
    b1: Share = 0.0
    b2: Share = 0.999
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    warmup_steps: Natural = 100
    decay_steps: Natural = 0
    final_scale: Probability = 0.0
    decay_after: Natural = 0
    kind: Annotated[str, among(lambda: OPTIMIZERS)] = "adamw"  # or "radam"

    def __post_init__(self):
        if 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps {self.decay_steps} must be over warmup_steps {self.warmup_steps}, or 0")
        if self.decay_steps and self.decay_after:
            raise ValueError(
                f"decay_steps {self.decay_steps} is a cosine and decay_after {self.decay_after} a root: set one to 0"
            )


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """With b1 = 0 it keeps no first moment: 4 bytes less per parameter and the same numbers."""
    if config.b1 == 0.0:  # Adam's own bias-corrected second moment is all that is left
        return optax.scale_by_rms(decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def radam(config: OptimizerConfig) -> optax.GradientTransformation:
    """RAdam (arXiv 1908.03265): the rectified step where its ρ_n > 5, and before that the first moment alone.

    As torch.optim.RAdam, but that there eps is added to √v_n before the bias correction, here after it: its eps is here
    eps/√(1 − b2ⁿ), which matters only for gradients near eps. Its decoupled_weight_decay=True is our weight_decay.
    """
    return optax.scale_by_radam(b1=config.b1, b2=config.b2, eps=config.eps)


OPTIMIZERS = {"adamw": adamw, "radam": radam}


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer of that kind; its weight decay is decoupled, as AdamW's.

    The first update already has learning rate learning_rate/warmup_steps, not 0.
    """
    return optax.chain(
        OPTIMIZERS[config.kind](config),
        decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config)),
    )


def decayed_weights(rate: float) -> optax.GradientTransformation:
    """optax.add_decayed_weights, but of CONSTANTS, which have no gradient either."""

    def update(updates, state, params):
        def decay(path, u, p):
            return u if path and getattr(path[-1], "key", None) in CONSTANTS else u + rate * p

        return jax.tree_util.tree_map_with_path(decay, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update)  # pyright: ignore[reportArgumentType]


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate at update n = 0, 1, ….: linear to its peak, then constant, a cosine over decay_steps or a root.

    EDM2's is this with warmup_steps = rampup_Mimg·10⁶/batch_size and decay_after = ref_batches, but that its warm-up
    begins with 0 and is one update behind: its rate at update n + 1 is ours at n until the warm-up ends.
    """
    peak, warmup = config.learning_rate, max(config.warmup_steps, 1)
    later = optax.constant_schedule(peak)
    if config.decay_steps:
        later = optax.cosine_decay_schedule(peak, config.decay_steps - config.warmup_steps, config.final_scale)
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
    rate = optax.join_schedules([rise, later], [config.warmup_steps])
    if not config.decay_after:
        return rate
    return lambda n: rate(n) / jnp.sqrt(jnp.maximum(n / config.decay_after, 1))

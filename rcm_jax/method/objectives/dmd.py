"""Distribution matching, the reverse divergence: the student's term, the fake score's, and the rollouts of both."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from rcm_jax.method import trigflow
from rcm_jax.method.denoiser import Velocities
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives import losses
from rcm_jax.method.objectives.consistency import TimeDistribution, check_scale
from rcm_jax.method.rollout import fixed_times, random_times, rollout
from rcm_jax.train.optimizer import OptimizerConfig

LENGTHS = ("drawn", "cycled")


@dataclasses.dataclass(frozen=True)
class DmdConfig:
    """DMD2 (arXiv 2405.14867) on the student's own rollouts of 1 to max_rollout steps."""

    time: TimeDistribution  # p_D, of the score time and of random mid times
    fake_score: OptimizerConfig
    scale: float = 1.0  # lambda = this over the consistency's; grows like sqrt(2e6/D) for small D
    update_freq: int = 5  # one student step in so many iterations
    max_rollout: int = 4
    rollout_length: str = "drawn"  # uniformly, or "cycled" with the updates as in the official code
    mid_times: tuple[float, ...] = ()  # of the rollout, max_rollout − 1 falling times; empty: random

    def __post_init__(self):
        check_scale(self.scale)
        if self.update_freq < 2 or self.max_rollout < 1:
            raise ValueError(
                f"update_freq {self.update_freq} must be at least 2, or the fake score is never trained, "
                f"and max_rollout {self.max_rollout} at least 1"
            )
        if self.rollout_length not in LENGTHS:
            raise ValueError(f"rollout_length {self.rollout_length!r} is none of {', '.join(LENGTHS)}")
        if self.mid_times:
            falling = (jnp.pi / 2, *self.mid_times, 0.0)
            falls = all(t > u for t, u in itertools.pairwise(falling))
            if len(self.mid_times) != self.max_rollout - 1 or not falls:
                raise ValueError(
                    f"mid_times must be max_rollout − 1 = {self.max_rollout - 1} times that fall between pi/2 and 0, "
                    f"got {list(self.mid_times)}; or none, for random ones"
                )


def student_loss(config: DmdConfig, velocities: Velocities, params, fake_params, teacher, batch, key, count):
    """(7) at the student's own rollout: (loss [b], metrics); the gradient passes through the last f of the rollout."""
    keys = named_keys(key, "rollout", "time", "noise")
    cond = batch["cond"]
    x0 = draw_rollout(config, velocities.student, params, batch, keys["rollout"], count)
    t = config.time.sample(keys["time"], x0.shape[:1])
    x_t = trigflow.diffuse(jax.lax.stop_gradient(x0), jax.random.normal(keys["noise"], x0.shape), t)
    F_teacher = velocities.teacher(teacher.params, x_t, t, (cond, teacher.uncond))
    F_fake = velocities.fake_score(fake_params, x_t, t, cond)
    return losses.dmd(x0, x_t, t, F_teacher, F_fake)


def critic_loss(config: DmdConfig, velocities: Velocities, student_params, fake_params, batch, key, count):
    """(8) of the fake score on the student's rollout: (loss [b], metrics)."""
    keys = named_keys(key, "rollout", "time", "noise")
    x0 = jax.lax.stop_gradient(draw_rollout(config, velocities.student, student_params, batch, keys["rollout"], count))
    t = config.time.sample(keys["time"], x0.shape[:1])
    eps = jax.random.normal(keys["noise"], x0.shape)
    F = velocities.fake_score(fake_params, trigflow.diffuse(x0, eps, t), t, batch["cond"])
    return losses.diffusion(F, x0, eps, t)


def draw_rollout(config: DmdConfig, F, params, batch, key, count):
    """A rollout of n steps (n traced) on the conditions of the batch; `count` is that of the updates so far."""
    keys = named_keys(key, "length", "times", "noise")
    shape = batch["x0"].shape
    if config.rollout_length == "cycled":
        n = count % config.max_rollout + 1
    else:
        n = jax.random.randint(keys["length"], (), 1, config.max_rollout + 1)
    if config.mid_times:
        times = fixed_times(config.mid_times, shape[0])
    else:
        times = random_times(keys["times"], config.time, config.max_rollout, shape[0])
    noise = jax.random.normal(keys["noise"], (config.max_rollout, *shape))
    return rollout(F, params, noise, times, n, batch["cond"])

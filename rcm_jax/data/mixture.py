"""A labelled mixture of Gaussians in the plane: data whose diffusion teacher is known in closed form."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import logsumexp

from rcm_jax.data.dataset import Dataset
from rcm_jax.util.ranges import Finite, Natural, Positive, Seed, between, config, some

HELD_OUT = 8_192


@config
class MixtureConfig:
    """k isotropic modes, in any unit: they are standardised.

    Mode i has a share of all data that goes as weights[i], the mean means[i], the deviation stds[i] in each coordinate,
    and is of the class labels[i], 0 to C − 1.
    """

    weights: Annotated[tuple[Positive, ...], some]
    means: tuple[tuple[Finite, Finite], ...]
    stds: tuple[Positive, ...]
    labels: tuple[Natural, ...]
    examples: Annotated[int, between(1, 10**8)] = 65_536  # for training
    seed: Seed = 0

    def __post_init__(self):
        sizes = {name: len(getattr(self, name)) for name in ("weights", "means", "stds", "labels")}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"a mixture needs one weight, mean, std and label for each of its modes, got {sizes}")
        if set(self.labels) != set(range(1 + max(self.labels))):
            raise ValueError(f"labels must be 0 to C − 1, each class with a mode, got {list(self.labels)}")


class Mixture(NamedTuple):
    """k modes whose weights have sum 1, such that the data have mean 0 and variance 1.

    The variance is the mean of those of the two coordinates: both are scaled by the same number.
    """

    weights: Float[np.ndarray, " k"]
    means: Float[np.ndarray, "k 2"]
    stds: Float[np.ndarray, " k"]
    labels: Int[np.ndarray, " k"]

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def standardise(config: MixtureConfig) -> Mixture:
    """The mixture in its own unit, float64."""
    weights, means, stds = (np.asarray(values, np.float64) for values in (config.weights, config.means, config.stds))
    weights = weights / weights.sum()
    means = means - weights @ means
    unit = np.sqrt(weights @ (stds**2 + np.mean(means**2, axis=1)))
    return Mixture(weights, means / unit, stds / unit, np.asarray(config.labels))


def velocity(mixture: Mixture, x: Float[Array, "b 2"], t: Float[Array, " b"], label: Int[Array, " b"]) -> Array:
    """The exact TrigFlow velocity E[c·eps − s·x0 | x_t = x] of a class, in the shape and dtype of x.

    The label num_classes, the null class, stands for all modes. A mode of mean mu and deviation sigma has, with
    v = c²·sigma² + s², E[x0 | x] = mu + (c·sigma²/v)·(x − c·mu) and E[eps | x] = (s/v)·(x − c·mu), hence
        F = (c·s·(1 − sigma²)/v)·(x − c·mu) − s·mu;
    modes are weighted by their shares of the density at x. Nothing is divided by s or c: t may be 0 and pi/2.
    """
    log_weights, means, variances = (
        jnp.asarray(values, x.dtype) for values in (np.log(mixture.weights), mixture.means, mixture.stds**2)
    )
    c, s = jnp.cos(t)[:, None], jnp.sin(t)[:, None]
    v = c**2 * variances + s**2
    # One [b, k] array for each coordinate: several times as fast on a CPU as [b, k, 2].
    offsets = [x[:, i, None] - c * means[:, i] for i in range(2)]
    log_shares = log_weights - jnp.log(v) - sum(offset**2 for offset in offsets) / (2 * v)
    shares = jax.nn.softmax(jnp.where(_of_class(mixture, label), log_shares, -jnp.inf))
    slopes = shares * (c * s * (1 - variances) / v)
    linear = jnp.stack([jnp.sum(slopes * offset, axis=1) for offset in offsets], axis=1)
    mean = jnp.matmul(shares, means, precision=jax.lax.Precision.HIGHEST)
    return (linear - s * mean).astype(x.dtype)


def sample(mixture: Mixture, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n examples: x0 [n, 2] float32, label [n] int32, and the mode [n] that each was drawn from."""
    mode = rng.choice(len(mixture.weights), n, p=mixture.weights)
    x0 = mixture.means[mode] + mixture.stds[mode, None] * rng.standard_normal((n, 2))
    return x0.astype(np.float32), mixture.labels[mode].astype(np.int32), mode


def log_density(mixture: Mixture, x: Float[np.ndarray, "n 2"], label: int | None = None) -> Float[np.ndarray, " n"]:
    """log p(x | label) of points x in float64; of all modes without a label."""
    labels = np.array([mixture.num_classes if label is None else label])
    mass = mixture.weights[_of_class(mixture, labels)[0]].sum()
    return logsumexp(_log_terms(mixture, x, labels.repeat(len(x))), axis=1) - np.log(mass)


def mode_of(mixture: Mixture, x: Float[np.ndarray, "n 2"], label: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The most probable mode, among those of its class, of each of x with its label."""
    return np.argmax(_log_terms(mixture, x, np.asarray(label)), axis=1)


def load(config: MixtureConfig) -> Dataset:
    """config.examples for training and HELD_OUT others, the same every time, with their exact velocity."""
    mixture = standardise(config)

    def examples(split: int, n: int) -> dict:
        x0, label, _ = sample(mixture, np.random.default_rng([config.seed, split]), n)
        return {"x0": x0, "cond": {"label": label}}

    return Dataset(
        train=examples(0, config.examples),
        test=examples(1, HELD_OUT),
        uncond={"label": np.int32(mixture.num_classes)},
        num_classes=mixture.num_classes,
        view="scatter",
        velocity=lambda params, x, t, cond: velocity(mixture, x, t, cond["label"]),
    )


def _log_terms(mixture: Mixture, x, label) -> np.ndarray:
    """log of weight·density of each mode at x [n, 2], [n, k] float64; −inf for modes not of class label [n]."""
    offset = np.asarray(x, np.float64)[:, None] - mixture.means
    variances = mixture.stds**2
    terms = np.log(mixture.weights / (2 * np.pi * variances)) - np.sum(offset**2, axis=-1) / (2 * variances)
    return np.where(_of_class(mixture, label), terms, -np.inf)


def _of_class(mixture: Mixture, label):
    """Whether a mode is of the class label [n], [n, k]: every mode is of the null class."""
    return (mixture.labels == label[:, None]) | (label[:, None] == mixture.num_classes)

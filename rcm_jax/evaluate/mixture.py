"""How near samples of points in the plane are to data, class by class; and those of a Gaussian mixture to its exact
teacher, sample by sample, as distributions, mode by mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.data.mixture import Mixture, mode_of, velocity
from rcm_jax.evaluate.arrays import as_labels, as_samples, distance_blocks
from rcm_jax.method import denoiser

STEPS = 300  # of the Runge-Kutta method; see exact_map
WIDTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the kernels of mmd, each half of the one before
MMD_SAMPLES = 2_000  # of each class and side, at most
DIRECTIONS = 128


def exact_map(mixture: Mixture, guidance: float, noise, labels, sigma_max: float = np.inf) -> np.ndarray:
    """What the guided PF-ODE makes of unit noise [n, 2] at t = arctan(sigma_max) for labels [n]: x0 [n, 2] float64.

    dx/dt = F_u + w·(F_c − F_u) of the exact velocities, F_u that of all modes, by the classical Runge-Kutta method on a
    grid that is finer where t nears the smallest deviation of a mode. Halving the steps moves a sample by less than
    1e-6 (root mean square) for the mixture of configs/mixture.py, at guidance 1 as at 3.
    """
    noise = as_samples("noise", noise)
    labels = as_labels("labels", labels, len(noise))
    if bad := sorted(set(labels.tolist()) - set(range(mixture.num_classes + 1))):
        raise ValueError(f"labels must be 0 to {mixture.num_classes - 1}, or {mixture.num_classes} for all, got {bad}")
    scale = 2 * mixture.stds.min()
    times = scale * np.sinh(np.linspace(np.arcsinh(np.arctan(sigma_max) / scale), 0, STEPS + 1))

    def F(params, x, t, cond):
        return velocity(mixture, x, t, cond["label"])

    with jax.enable_x64(True):
        return np.asarray(_runge_kutta(denoiser.guided(F, guidance), mixture.num_classes, noise, times, labels))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _runge_kutta(F: denoiser.Velocity, null: int, x, times, labels):
    """x [n, 2] at times[0] -> [n, 2] at times[-1]."""
    conds = {"label": labels}, {"label": jnp.asarray(null, labels.dtype)}

    def derivative(x, t):
        return F(None, x, jnp.full(x.shape[:1], t), conds)

    def step(x, interval):
        t, u = interval
        h = u - t
        k1 = derivative(x, t)
        k2 = derivative(x + h / 2 * k1, t + h / 2)
        k3 = derivative(x + h / 2 * k2, t + h / 2)
        k4 = derivative(x + h * k3, u)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What samples are measured against, for the labels [n] asked for: the exact teacher of a mixture, at one guidance.

    target [n, 2] is its answer to the noise that the samples start from, independent [n, 2] to other noise. Of data
    that are no mixture (None) these are training points and held-out ones.
    """

    mixture: Mixture | None
    labels: np.ndarray
    target: np.ndarray
    independent: np.ndarray


def make_reference(
    mixture: Mixture, guidance: float, noise, labels, sigma_max: float = np.inf, seed: int = 0
) -> Reference:
    """The reference for samples of labels [n] that start from unit noise [n, 2] at t = arctan(sigma_max).

    Raises:
      ValueError: wrong shapes, labels that are not integers, a class with one sample, noise that is not finite.
    """
    noise = as_samples("noise", noise)
    labels = as_labels("labels", labels, len(noise))
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(f"class {classes[counts.argmin()]} has one sample; at least 2 of every class are needed")
    other = np.random.default_rng([seed, 1]).standard_normal(noise.shape)  # default_rng(seed) may have made noise
    both = exact_map(mixture, guidance, np.concatenate([noise, other]), np.tile(labels, 2), sigma_max)
    target, independent = np.split(both, 2)
    return Reference(mixture, labels, target, independent)


def data_reference(train, test, most: int, seed: int = 0) -> Reference:
    """The reference of data (points [n, 2], labels [n]): as many training as held-out points of each class.

    Of C classes each has at most `most`/C. ValueError for a class that has fewer than 2 points in train or test.
    """
    rng, parts, classes = np.random.default_rng(seed), [], np.unique(test[1])
    for label in classes:
        target, independent = (rng.permutation(points[labels == label]) for points, labels in (train, test))
        n = min(len(target), len(independent), most // len(classes))
        if n < 2:
            sizes = f"{len(target)} training and {len(independent)} held-out points"
            raise ValueError(f"class {label} has {sizes}; at least 2 of each are needed, of at most {most} in all")
        parts.append((np.full(n, label), target[:n], independent[:n]))
    labels, target, independent = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = rng.permutation(len(labels))  # in a picture, no class covers the others
    return Reference(None, labels[order], target[order], independent[order])


def evaluate(samples, reference: Reference) -> dict[str, float]:
    """Metrics of samples [n, 2] in the order of the reference's labels; lengths in standard deviations of the data.

    Without a mixture they are mmd and sliced_wasserstein.
    map_error: root mean square of ‖sample − target‖, for samples that start from the reference's noise.
    mmd: squared maximum mean discrepancy, unbiased (it may be below 0); sliced_wasserstein: see there. Both are against
      the independent set, class by class, averaged over classes by their shares of the labels.
    mode_kl: KL(teacher ‖ samples) of the shares of the modes, each sample counted for the most probable mode of its
      class. Half a sample is added to every count, so that a lost mode weighs much but not infinitely.
    modes_lost: how many modes that the teacher reaches have less than a tenth of its share.
    variance: variance within a mode over the teacher's, averaged over modes by their shares of the samples; modes where
      either has fewer than 2 samples do not count.

    Raises:
      ValueError: another shape than the reference's, NaN or infinite values.
    """
    samples = as_samples("samples", samples)
    target, labels = reference.target, reference.labels
    if samples.shape != target.shape:
        raise ValueError(f"samples are {samples.shape}, the reference is {target.shape}: one sample for each label")
    classes, counts = np.unique(labels, return_counts=True)
    pairs = [(samples[labels == label], reference.independent[labels == label]) for label in classes]
    distances = {
        name: float(np.average([distance(a, b) for a, b in pairs], weights=counts))
        for name, distance in DISTANCES.items()
    }
    if reference.mixture is None:
        return distances
    theirs, their_variances = modes(reference.mixture, target, labels)
    ours, our_variances = modes(reference.mixture, samples, labels)
    p, q = ((n + 0.5) / (n + 0.5).sum() for n in (theirs, ours))
    both = (ours > 1) & (theirs > 1)
    ratios = our_variances[both] / their_variances[both]
    return {
        "map_error": float(np.sqrt(np.mean(np.sum((samples - target) ** 2, axis=1)))),
        **distances,
        "mode_kl": float(np.sum(p * np.log(p / q))),
        "modes_lost": float(np.sum(ours < theirs / 10)),
        "variance": float(np.average(ratios, weights=ours[both])) if both.any() else np.nan,
    }


def modes(mixture: Mixture, samples, labels) -> tuple[np.ndarray, np.ndarray]:
    """(counts [k], variances [k]) of the samples [n, 2] of each mode, the most probable one of their class's.

    A variance is about the samples' own mean, and the mean of both coordinates'; NaN for fewer than 2 samples.
    """
    nearest = mode_of(mixture, samples, labels)
    groups = [samples[nearest == k] for k in range(len(mixture.weights))]
    variances = [group.var(axis=0, ddof=1).mean() if len(group) > 1 else np.nan for group in groups]
    return np.array([len(group) for group in groups]), np.array(variances)


def mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy of a [n, f] and b [m, f], unbiased (Gretton et al., JMLR 2012, lemma 6).

    The kernel is the mean over WIDTHS h of exp(−‖x − y‖²/(2h²)). The first MMD_SAMPLES of each are compared.
    """
    a, b = a[:MMD_SAMPLES], b[:MMD_SAMPLES]
    n, m = len(a), len(b)
    # A sample's kernel with itself is 1, and is left out.
    return float(
        (_kernel_sum(a, a) - n) / (n * (n - 1))
        + (_kernel_sum(b, b) - m) / (m * (m - 1))
        - 2 * _kernel_sum(a, b) / (n * m)
    )


def _kernel_sum(a, b) -> float:
    total = 0.0
    for _, distances in distance_blocks(a, b):
        kernel = np.exp(distances**2 / (-2 * WIDTHS[0] ** 2))
        total += kernel.sum()
        for _ in WIDTHS[1:]:  # half the width is the fourth power
            kernel = kernel**2
            kernel = kernel**2
            total += kernel.sum()
    return total / len(WIDTHS)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """1-Wasserstein distance of the projections of a [n, 2] and b [n, 2], mean over DIRECTIONS even directions."""
    angles = np.pi / DIRECTIONS * np.arange(DIRECTIONS)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    a, b = (np.sort((x @ directions).T, axis=1) for x in (a, b))
    return float(np.mean(np.abs(a - b)))


# Of points of one class, samples and others: (a [n, 2], b [m, 2]) -> a number. A new metric of points is a line here.
DISTANCES = {"mmd": mmd, "sliced_wasserstein": sliced_wasserstein}

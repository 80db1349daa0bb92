"""All metrics of a set of samples, and tables of several sets."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from rcm_jax.evaluate.arrays import as_images, as_labels, flat
from rcm_jax.evaluate.classifier import Classifier, train_classifier
from rcm_jax.evaluate.diversity import within_class_distance
from rcm_jax.evaluate.frechet import frechet_distance
from rcm_jax.evaluate.neighbours import neighbour_metrics

Rows = Mapping[str, Mapping[str, float | None]]

# metric → two lines of heading, number format, and the side that is better (noise raises diversity, too: neither)
COLUMNS = {
    "FID": ("", "FID", ".3f", "low"),
    "Fréchet distance (efficientnet-lite0)": ("Fréchet distance", "(efficientnet-lite0)", ".3f", "low"),
    "Fréchet distance (pixels)": ("Fréchet distance", "(pixels)", ".4f", "low"),
    "inception score": ("inception", "score", ".3f", "high"),
    "its deviation": ("its", "deviation", ".3f", None),
    "frechet_features": ("FD", "features", ".3f", "low"),
    "frechet_pixels": ("FD", "pixels", ".3f", "low"),
    "accuracy": ("", "accuracy", ".3f", "high"),
    "precision": ("", "precision", ".3f", "high"),
    "recall": ("", "recall", ".3f", "high"),
    "density": ("", "density", ".3f", "high"),
    "coverage": ("", "coverage", ".3f", "high"),
    "diversity": ("", "diversity", ".3f", None),
    "frechet_features_ratio": ("FD features", "ratio", ".2f", "low"),
    "frechet_pixels_ratio": ("FD pixels", "ratio", ".2f", "low"),
    "diversity_ratio": ("diversity", "ratio", ".2f", None),
    "map_error": ("map", "error", ".3f", "low"),
    "mmd": ("", "MMD²", ".4f", "low"),
    "sliced_wasserstein": ("sliced", "Wasserstein", ".3f", "low"),
    "mode_kl": ("modes", "KL", ".4f", "low"),
    "modes_lost": ("modes", "lost", ".1f", "low"),
    "variance": ("variance", "ratio", ".2f", None),
    "rms_to_teacher": ("rms to", "teacher", ".3f", "low"),
    "mean": ("", "mean", ".3f", None),
    "std": ("", "std", ".3f", None),
    "min": ("", "min", ".2f", None),
    "max": ("", "max", ".2f", None),
    "std_over_examples": ("std over", "examples", ".3f", None),
    "frame_change": ("change by", "frame", ".3f", None),
    "nonfinite": ("share", "not finite", ".2g", "low"),
}
RATIOS = ("frechet_features", "frechet_pixels", "diversity")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What samples are measured against: held-out real images, and the classifier that looks at both.

    images [n, h, w, c] float32 and features [n, f] float64 are the held-out split, accuracy the classifier's on it
    (the ceiling for samples), k the neighbour that sets the balls of precision, recall, density and coverage.
    """

    classifier: Classifier
    images: np.ndarray
    features: np.ndarray
    accuracy: float
    k: int


def make_reference(
    train_images, train_labels, test_images, test_labels, key: jax.Array, *, k: int = 5, **training
) -> Reference:
    """Trains the classifier on the training split and measures it on the held-out one.

    Images [n, h, w, c], labels [n] integers from 0. Samples must come in the same pixel units.
    `training` goes to train_classifier (steps, batch_size, ...).

    Raises:
      ValueError: wrong shapes, labels out of range, k + 1 > held-out images, NaN or infinite values.
    """
    images = as_images("test_images", test_images)
    if not 1 <= k < len(images):
        raise ValueError(f"k = {k} neighbours need at least {k + 1} held-out images, got {len(images)}; lower k")
    num_classes = 1 + max(int(np.max(train_labels)), int(np.max(test_labels)))
    classifier = train_classifier(train_images, train_labels, num_classes, key, **training)
    return Reference(classifier, images, classifier.features(images), classifier.accuracy(images, test_labels), k)


class Seen(NamedTuple):
    """What a metric of samples may use: pixels [n, h·w·c] in standard deviations, features [n, f], images [n, h, w, c]
    and the classes [n] asked for."""

    pixels: np.ndarray
    features: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    reference: Reference


# What is measured of images: Seen -> a number, or several by name. A new one is a line here (and one in COLUMNS, for
# another heading than its name).
METRICS = {
    "frechet_features": lambda seen: frechet_distance(seen.features, seen.reference.features),
    "frechet_pixels": lambda seen: frechet_distance(
        seen.pixels, flat(seen.reference.images) / seen.reference.classifier.deviation
    ),
    "accuracy": lambda seen: seen.reference.classifier.accuracy(seen.images, seen.labels),
    "neighbours": lambda seen: neighbour_metrics(seen.reference.features, seen.features, seen.reference.k),
    "diversity": lambda seen: within_class_distance(seen.pixels, seen.labels),
}


def evaluate_samples(samples, labels, reference: Reference) -> dict[str, float]:
    """Metrics of samples [n, h, w, c], asked for as classes `labels` [n].

    frechet_features, frechet_pixels: squared Fréchet distances to the held-out images (lower is better; they shrink
    with n, so use one n for all rows). accuracy: share that the classifier takes for the class asked for. precision,
    recall, density, coverage: in the classifier's features. diversity: within-class distance in pixels. Distances in
    pixels are in standard deviations of the training set's. For a row of real images pass the training split.

    Raises:
      ValueError: another image shape than the reference's, wrong labels, fewer than k + 1 samples, a class with a
        single sample, NaN or infinite values.
    """
    samples = as_images("samples", samples)
    if samples.shape[1:] != reference.images.shape[1:]:
        raise ValueError(
            f"samples are {samples.shape[1:]} [h, w, c], the reference images {reference.images.shape[1:]}; "
            "resize the samples or make a reference of their size"
        )
    labels = as_labels("labels", labels, len(samples))
    features = reference.classifier.features(samples)
    unit = reference.classifier.deviation
    pixels = flat(samples) / unit
    seen, found = Seen(pixels, features, samples, labels, reference), {}
    for name, metric in METRICS.items():
        value = metric(seen)
        found |= value if isinstance(value, dict) else {name: value}
    return found


def table(rows: Rows, relative_to: str) -> dict[str, dict[str, float | None]]:
    """Copies rows (name → metrics) and adds `NAME_ratio` for the Fréchet distances and diversity, relative to one row.

    A ratio is None where the base is 0 or the metric is missing. Plain floats throughout: ready for json.dumps.

    Raises:
      ValueError: `relative_to` is not one of the rows.
    """
    if relative_to not in rows:
        raise ValueError(f"no row {relative_to!r} to relate to; the rows are {list(rows)}: name one as relative_to")
    base = rows[relative_to]
    result = {}
    for row, metrics in rows.items():
        result[row] = {name: None if value is None else float(value) for name, value in metrics.items()}
        for name in RATIOS:
            value, unit = metrics.get(name), base.get(name)
            result[row][f"{name}_ratio"] = float(value / unit) if value is not None and unit else None
    return result


def cells(rows: Rows) -> tuple[list[str], list[tuple[str, str]], list[list[str]]]:
    """(metric names, their headings in two lines, formatted values of each row); "-" stands for no value."""
    present = {name for metrics in rows.values() for name in metrics}
    names = [name for name in COLUMNS if name in present] + sorted(present - COLUMNS.keys())
    columns = [COLUMNS.get(name, ("", name, ".3f", None)) for name in names]

    def cell(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    values = [
        [cell(row.get(name), spec) for name, (_, _, spec, _) in zip(names, columns, strict=True)]
        for row in rows.values()
    ]
    return names, [(upper, lower) for upper, lower, *_ in columns], values


def format_table(rows: Rows) -> str:
    """rows (name → metrics) as aligned plain text: names on the left, numbers on the right, two lines of headings."""
    _, headings, values = cells(rows)
    upper, lower = ([heading[line] for heading in headings] for line in (0, 1))
    lines = [["", *upper], ["", *lower], *([name, *row] for name, row in zip(rows, values, strict=True))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for name, *numbers in lines:
        right = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return "\n".join([*text[:2], "-" * max(map(len, text)), *text[2:]])

"""What is measured of a set of samples against a reference, by the names under which it is reported."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rcm_jax.evaluate.extractors import EXTRACTORS, Opened
from rcm_jax.evaluate.features import Features, Statistics
from rcm_jax.evaluate.frechet import distance_of
from rcm_jax.evaluate.inception_score import inception_score
from rcm_jax.evaluate.neighbours import neighbour_metrics


class Asked(NamedTuple):
    """metrics: keys of METRICS; k: the neighbour that sets the balls of precision and the rest; splits: of the
    inception score."""

    metrics: tuple[str, ...]
    k: int = 3
    splits: int = 10

    @property
    def features(self) -> bool:
        """Whether features must be kept."""
        return any(METRICS[name] is _neighbours for name in self.metrics)

    @property
    def logits(self) -> bool:
        """Whether logits are needed."""
        return "inception_score" in self.metrics

    @property
    def reference(self) -> bool:
        """Whether there must be a reference."""
        return set(self.metrics) != {"inception_score"}


def _frechet(of: Statistics, to: Statistics, asked: Asked, extractor: str) -> dict[str, float]:
    return {EXTRACTORS[extractor].distance: distance_of(of.gaussian(), to.gaussian())}


def _neighbours(of: Statistics, to: Statistics, asked: Asked, extractor: str) -> dict[str, float]:
    return {
        name: value
        for name, value in neighbour_metrics(to.features, of.features, asked.k).items()
        if name in asked.metrics
    }


def _inception_score(of: Statistics, to: None, asked: Asked, extractor: str) -> dict[str, float]:
    mean, deviation = inception_score(of.logits, asked.splits)
    return {"inception score": mean, "its deviation": deviation}


# What may be asked for: (statistics of samples, of the reference, Asked, extractor) -> numbers by their names.
METRICS: dict[str, Callable[..., dict[str, float]]] = {
    "fid": _frechet,
    "frechet": _frechet,
    "precision": _neighbours,
    "recall": _neighbours,
    "density": _neighbours,
    "coverage": _neighbours,
    "inception_score": _inception_score,
}


def check(asked: Asked, opened: Opened) -> None:
    """ValueError for metrics that there are not, or not with this extractor."""
    if not asked.metrics or set(asked.metrics) - set(METRICS):
        raise ValueError(f"--metrics={','.join(asked.metrics)}: choose of {', '.join(METRICS)}")
    if "fid" in asked.metrics and opened.record.distance != "FID":
        raise ValueError(
            f"FID is the distance in features of inception; {opened.name} gives another, ask for --metrics=frechet"
        )
    if asked.logits and not opened.record.logits:
        raise ValueError(f"the inception score takes the logits of inception, which {opened.name} has not")


def check_reference(asked: Asked, opened: Opened, reference: Features) -> None:
    """ValueError unless features of an extractor can be measured against these."""
    if reference.extractor != opened.name:
        raise ValueError(f"{reference.source} has features of {reference.extractor}, not of {opened.name}")
    if reference.checksum not in ("", opened.checksum):
        raise ValueError(
            f"{reference.source} has features of other weights of {opened.name} (checksum {reference.checksum[:12]}…, "
            f"these {opened.checksum[:12]}…): make it again with these"
        )
    if asked.features and any(statistics.features is None for statistics in reference.views.values()):
        raise ValueError(
            f"{reference.source} holds no features, which precision, recall, density and coverage need: make it again "
            "with --save_features"
        )


def check_counts(asked: Asked, samples: Mapping[str, int], reference: Mapping[str, int]) -> None:
    """ValueError unless the sets, {view: how many images}, can be measured against each other."""
    if missing := [view for view in samples if view not in reference]:
        raise ValueError(
            f"the reference is of {' and '.join(reference)}, but the samples are looked at by {' and '.join(missing)}: "
            "take images for images, and videos for videos"
        )
    least = min(*samples.values(), *(reference[view] for view in samples))
    if asked.features and least <= asked.k:
        raise ValueError(
            f"k = {asked.k} neighbours need {asked.k + 1} images on both sides, there are {least}; draw more samples "
            "or lower --neighbours"
        )


def measure(asked: Asked, samples: Features, reference: Features | None) -> dict[str, dict[str, float]]:
    """{view: {name: number}}, each function of METRICS called once."""
    functions = dict.fromkeys(METRICS[name] for name in asked.metrics)
    return {
        view: {
            name: value
            for function in functions
            for name, value in function(of, reference and reference.views[view], asked, samples.extractor).items()
        }
        for view, of in samples.views.items()
    }

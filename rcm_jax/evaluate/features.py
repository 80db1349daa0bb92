"""Features of whole sets of images or videos: extracted over all devices, summed up as they come, kept in files."""

import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.convert.numpy_pickle import read_arrays
from rcm_jax.evaluate import frechet
from rcm_jax.evaluate.extractors import Opened
from rcm_jax.evaluate.inputs import Clips
from rcm_jax.parallel.sharding import replicated
from rcm_jax.util.files import local, reading, regular, write_whole


@dataclasses.dataclass
class Statistics:
    """Of n features [n, f]: mean [f], covariance [f, f] (divisor n − 1), float64; if kept, they themselves, float32."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None = None
    logits: np.ndarray | None = None

    def gaussian(self) -> frechet.Gaussian:
        """From the features if they are there, which is exact also where they are few."""
        if self.features is not None:
            return frechet.fitted("features", self.features)
        return frechet.of_moments(self.mean, self.covariance)


@dataclasses.dataclass
class Features:
    """What is known of a set: {view: Statistics}, with what extractor; "" where a file does not say."""

    views: dict[str, Statistics]
    extractor: str
    checksum: str
    source: str

    @property
    def counts(self) -> dict[str, int]:
        """How many images there are of each view."""
        return {view: statistics.count for view, statistics in self.views.items()}


class Summed:
    """Statistics of features that come in parts. Sums are of differences to the mean of the first part."""

    def __init__(self, keep: bool):
        self.count, self.keep, self.parts, self.logits = 0, keep, [], []
        self.shift: Any = None

    def add(self, features: np.ndarray, logits: np.ndarray | None) -> None:
        """A part [m, f], and its logits [m, c]."""
        wide = features.astype(np.float64)
        if self.shift is None:
            self.shift, self.sum, self.squares = wide.mean(0), 0.0, 0.0
        wide -= self.shift
        self.count, self.sum, self.squares = (
            self.count + len(wide),
            self.sum + wide.sum(0),
            self.squares + wide.T @ wide,
        )
        if self.keep:
            self.parts.append(features)
        if logits is not None:
            self.logits.append(logits)

    def statistics(self) -> Statistics:
        """Of all parts."""
        mean = self.sum / self.count
        covariance = (self.squares - self.count * np.outer(mean, mean)) / (self.count - 1)
        kept, logits = (np.concatenate(parts) if parts else None for parts in (self.parts, self.logits))
        return Statistics(self.count, self.shift + mean, covariance, kept, logits)


def frame_differences(x):
    """Of neighbouring frames [b, t, h, w, 3] in 0..255, as images: (difference + 255)/2, [b·(t − 1), h, w, 3]."""
    x = x.astype(jnp.float32)
    return ((x[:, 1:] - x[:, :-1] + 255) / 2).reshape(-1, *x.shape[2:])


def views_of(clips: Clips) -> dict[str, Callable]:
    """How a set is looked at: {name: clips [b, t, h, w, 3] -> images [n, h, w, 3]}."""
    if not clips.videos:
        return {"images": lambda x: x[:, 0]}
    found = {"frames": lambda x: x.reshape(-1, *x.shape[2:])}
    return found | ({"frame differences": frame_differences} if clips.shape[0] > 1 else {})


def counts_of(clips: Clips) -> dict[str, int]:
    """{view: how many images it will have}."""
    return {view: clips.count * (clips.shape[0] - (view == "frame differences")) for view in views_of(clips)}


def extract(
    opened: Opened, clips: Clips, mesh, *, batch: int = 64, keep: bool = False, logits: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> Features:  # fmt: skip
    """Features of all clips, `batch` images at a time on each device; all processes must call this, and all get them.

    keep: the features themselves. They are kept besides where there are no more than a feature has numbers: then the
    covariance is singular. progress is called with the number of clips of every batch.

    Raises:
      ValueError: fewer than 2 images, NaN or infinite features.
    """
    views = views_of(clips)
    if clips.count * clips.shape[0] < 2:
        raise ValueError(f"{clips.source} holds {clips.count} image(s), at least 2 are needed")
    size = max(1, batch // clips.shape[0]) * mesh.size
    size = min(size, -(-clips.count // mesh.size) * mesh.size)
    params = jax.device_put(opened.params, replicated(mesh))

    @jax.jit
    def run(params, x):
        found = {name: opened.apply(params, view(x)) for name, view in views.items()}
        return jax.lax.with_sharding_constraint(found, replicated(mesh))

    sums: dict[str, Summed] = {}
    starts = range(0, clips.count, size)
    for start, found in _one_ahead((start, run(params, clips.batch(start, size, mesh))) for start in starts):
        n = min(size, clips.count - start)
        for name, outputs in jax.device_get(found).items():
            rows = n * (len(outputs["features"]) // size)
            features = outputs["features"][:rows]
            if not np.isfinite(features).all():
                raise ValueError(f"{clips.source}: features of {name} {start} to {start + n} are not finite")
            few = clips.count * (rows // n) <= features.shape[1]
            total = sums.setdefault(name, Summed(keep or few))
            total.add(features, outputs["logits"][:rows] if logits else None)
        progress(n)
    made = {name: total.statistics() for name, total in sums.items()}
    return Features(made, opened.name, opened.checksum, clips.source)


def _one_ahead(started: Iterable) -> Iterator:
    """The items, each when the next has been started: devices work while the host reads."""
    last = None
    for item in started:
        if last is not None:
            yield last
        last = item
    if last is not None:
        yield last


def save(path, found: Features, *, features: bool) -> None:
    """A file that `load` reads: means and covariances, and the features themselves if asked for."""
    arrays: dict[str, Any] = {name: getattr(found, name) for name in ("extractor", "checksum", "source")}
    for view, statistics in found.views.items():
        for name, value in vars(statistics).items():
            if value is not None and (features or name not in ("features", "logits")):
                arrays[f"{view}/{name}"] = value
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, lambda temporary: temporary.write_bytes(content.getvalue()))


def load(path) -> Features | None:
    """Of a file of `save`, or of NVlabs' .npz or .pkl (FID's mu and sigma); None for another .npz.

    ValueError for a file that holds none, or is damaged.
    """
    place = local(path)
    if place.suffix == ".pkl":
        return _nvlabs(path, read_arrays(place, "fid"))
    with reading(path, "is damaged or no .npz"), np.load(regular(place)) as file:
        if "mu" in file and "sigma" in file:
            return _nvlabs(path, {name: file[name] for name in ("mu", "sigma")})
        if "extractor" not in file:
            return None
        arrays = {name: file[name] for name in file.files}
    views: dict[str, dict] = {}
    for name in arrays:
        if "/" in name:
            view, _, part = name.partition("/")
            views.setdefault(view, {})[part] = int(arrays[name]) if part == "count" else arrays[name]
    made = {view: Statistics(**parts) for view, parts in views.items()}
    return Features(made, *(str(arrays[name]) for name in ("extractor", "checksum", "source")))


def _nvlabs(path, found) -> Features:
    """Inception's, though the file does not say with which weights, nor of how many images."""
    if not {"mu", "sigma"} <= set(found):
        raise ValueError(f"{path} holds no mu and sigma of FID")
    return Features({"images": Statistics(0, found["mu"], found["sigma"])}, "inception", "", str(path))

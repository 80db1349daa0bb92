"""Networks that give the features in which sets of images are compared. A new one is a line in EXTRACTORS."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax import convert
from rcm_jax.convert.files import open_tensors
from rcm_jax.models import efficientnet, inception
from rcm_jax.models.features import FeatureNetwork


class Extractor(NamedTuple):
    """What sets of images are compared in: function(params, images [b, h, w, 3] in 0..255, of any size) -> outputs."""

    distance: str  # what the Fréchet distance in its features is called
    function: Callable[[Any, jax.Array], dict[str, jax.Array]]
    features: str  # which of its outputs are compared
    logits: str = ""  # which the inception score takes; "": it has none
    conversion: str = ""  # a key of convert.MODELS, which knows the names of its weights; "": it has none
    config: Any = None


class Opened(NamedTuple):
    """An extractor with its weights."""

    name: str
    checksum: str  # of all weights, whatever file they are from; "" without
    params: Any

    @property
    def record(self) -> Extractor:
        """Its line in EXTRACTORS."""
        return EXTRACTORS[self.name]

    def apply(self, params, images) -> dict[str, jax.Array]:
        """{"features": [b, f], "logits": [b, c], if it has some} of images [b, h, w, 3]."""
        found, names = self.record.function(params, images), {"features": self.record.features}
        names |= {"logits": self.record.logits} if self.record.logits else {}
        return {ours: found[theirs] for ours, theirs in names.items()}


def coarse(params, images):
    """Mean colours of 8×8 fields: {"features": [b, 192]} in 0..1."""
    small = jax.image.resize(images.astype(jnp.float32), (len(images), 8, 8, 3), "linear")
    return {"features": small.reshape(len(images), -1) / 255}


def _applied(network: FeatureNetwork, config) -> Callable[[Any, jax.Array], Any]:
    module = network.module(config)  # pyright: ignore[reportCallIssue]
    return lambda params, images: module.apply({"params": params}, images)


INCEPTION, LITE0 = inception.InceptionConfig(), efficientnet.EfficientNetConfig()
EXTRACTORS = {
    "inception": Extractor(
        "FID", _applied(inception.NETWORK, INCEPTION), "2048", "logits_unbiased", "inception", INCEPTION
    ),
    "efficientnet-lite0": Extractor(
        "Fréchet distance (efficientnet-lite0)",
        _applied(efficientnet.NETWORK, LITE0),
        "features",
        conversion="efficientnet",
        config=LITE0,
    ),
    "pixels": Extractor("Fréchet distance (pixels)", coarse, "features"),
}


def open_extractor(name: str, weights=None) -> Opened:
    """An extractor with the weights of a published file, in any layout.

    Raises:
      ValueError: an unknown name, no weights where there must be some or the other way round, weights of another model.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor {name!r} is none of {', '.join(EXTRACTORS)}")
    record = EXTRACTORS[name]
    if bool(record.conversion) != bool(weights):
        need = "needs its published weights: name their file" if record.conversion else "has no weights: name none"
        raise ValueError(f"the extractor {name} {need}")
    params = {}
    if weights:
        params = convert.from_reference(record.conversion, open_tensors(weights), record.config, dtype=np.float32)
    return Opened(name, checksum(params), params)


def checksum(params) -> str:
    """SHA-256 of names, shapes and values, in hex; "" of nothing."""
    digest, leaves = hashlib.sha256(), jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest() if leaves else ""

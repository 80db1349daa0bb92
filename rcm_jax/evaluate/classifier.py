"""Training and use of the classifier that judges samples: deterministic by key, seconds on a CPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rcm_jax.evaluate.arrays import as_images, as_labels
from rcm_jax.models.classifier import ClassifierNet

BATCH = 256  # images per call of the network; the last batch is filled up, so that one program serves every n
LEARNING_RATE = 3e-3
SHIFT, NOISE = 1, 0.3  # of training images, at most: pixels, standard deviations of the data


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained network with the units of its inputs and outputs.

    Images are standardised by the training set's mean and deviation (scalars), so any affine unit of the pixels works
    as long as training images and samples share it. Features are divided by their RMS deviation over the training
    images: their mean variance there is 1, and distances are comparable between keys and image sizes.
    """

    net: ClassifierNet
    params: Any
    image_shape: tuple[int, int, int]
    mean: float
    deviation: float
    feature_deviation: float = 1.0

    def features(self, images) -> np.ndarray:
        """images [n, h, w, c] → float64 [n, features]. ValueError on another image shape, NaN or infinite values."""
        return self._outputs(images)[1].astype(np.float64) / self.feature_deviation

    def predict(self, images) -> np.ndarray:
        """images [n, h, w, c] → class of each, int64 [n]. ValueError as for features."""
        return self._outputs(images)[0].argmax(axis=1)

    def accuracy(self, images, labels) -> float:
        """Share of images [n, h, w, c] that are recognised as labels [n]."""
        return float(np.mean(self.predict(images) == as_labels("labels", labels, len(images))))

    def _outputs(self, images) -> tuple[np.ndarray, np.ndarray]:
        images = as_images("images", images)
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images are {images.shape[1:]} [h, w, c], the classifier was trained on {self.image_shape}; "
                "resize the images or train a classifier for them"
            )
        filled = np.pad((images - self.mean) / self.deviation, [(0, -len(images) % BATCH), (0, 0), (0, 0), (0, 0)])
        outputs = [_apply(self.net, self.params, batch) for batch in np.split(filled, len(filled) // BATCH)]
        logits, features = (np.concatenate(parts)[: len(images)] for parts in zip(*outputs, strict=True))
        return logits, features


def train_classifier(
    images, labels, num_classes: int, key: jax.Array, *, steps: int = 400, batch_size: int = 128
) -> Classifier:
    """Trains on images [n, h, w, c] with labels [n] in 0..num_classes−1; the same key gives the same classifier.

    AdamW under a cosine schedule. Each image is moved by up to SHIFT pixels and gets Gaussian noise of up to NOISE, so
    that small blemishes do not decide the class.

    Raises:
      ValueError: wrong shapes, labels out of range, constant images, NaN or infinite values.
    """
    images = as_images("images", images)
    labels = as_labels("labels", labels, len(images))
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, num_classes = {num_classes} allows 0 to "
            f"{num_classes - 1}; raise num_classes or renumber the labels"
        )
    mean, deviation = float(images.mean(dtype=np.float64)), float(images.std(dtype=np.float64))
    if deviation == 0:
        raise ValueError(f"all {len(images)} training images hold the single value {mean}; check how they were loaded")
    init, step = _training(num_classes, steps, batch_size)
    data = jnp.asarray((images - mean) / deviation), jnp.asarray(labels, jnp.int32)
    key_init, *keys = jax.random.split(key, steps + 1)
    state = init(data[0], key_init)
    for key_step in keys:  # a loop, not a scan: XLA's convolutions inside a CPU loop are ten times slower
        state = step(state, *data, key_step)
    params, _ = state
    classifier = Classifier(ClassifierNet(num_classes), params, images.shape[1:], mean, deviation)
    spread = float(np.sqrt(classifier.features(images).var(axis=0).mean()))
    return dataclasses.replace(classifier, feature_deviation=spread)


@functools.partial(jax.jit, static_argnums=0)
def _apply(net: ClassifierNet, params, images: jax.Array):
    """(logits [b, num_classes], features [b, f])."""
    return net.apply({"params": params}, images)


@functools.lru_cache(maxsize=8)
def _training(num_classes: int, steps: int, batch_size: int):
    """(init, step): images, key → state; state, images, labels, key → state. Cached: several keys compile once."""
    net = ClassifierNet(num_classes)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=1e-2)

    def loss(params, images, labels):
        logits, _ = net.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def init(images, key):
        params = net.init(key, images[:1])["params"]
        return params, optimizer.init(params)

    @jax.jit
    def step(state, images, labels, key):
        params, opt_state = state
        key_batch, key_augment = jax.random.split(key)
        chosen = jax.random.randint(key_batch, (batch_size,), 0, len(images))
        batch = _augment(key_augment, images[chosen])
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch, labels[chosen]), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return init, step


def _augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image [b, h, w, c] by up to SHIFT pixels (edges repeated) and adds noise of a random level."""
    key_shift, key_level, key_noise = jax.random.split(key, 3)
    b, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    corners = jax.random.randint(key_shift, (b, 2), 0, 2 * SHIFT + 1)
    moved = jax.vmap(lambda x, corner: jax.lax.dynamic_slice(x, (*corner, 0), shape))(padded, corners)
    level = jax.random.uniform(key_level, (b, 1, 1, 1), maxval=NOISE)
    return moved + level * jax.random.normal(key_noise, images.shape)

"""Images of TensorFlow Datasets (TFDS), prepared before in array_record files, and read without TensorFlow."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rcm_jax.data.dataset import Dataset
from rcm_jax.util.extras import require
from rcm_jax.util.files import as_path, local, stored
from rcm_jax.util.ranges import Positive, config


@config
class TfdsConfig:
    """A data set by its name in TFDS, say cifar10 or imagenet_resized/64x64, and the folder it was prepared in.

    train and test are splits, or parts of them such as train[:90%]; without test none is held out. image and label
    are features. sigma_data is about the deviation of pixels in [−1, 1], 0.5 in EDM: by it x0 gets unit variance.
    """

    name: str = ""
    path: str = ""
    train: str = "train"
    test: str = ""
    image: str = "image"
    label: str = "label"
    sigma_data: Positive = 0.5


def load(config: TfdsConfig) -> Dataset:
    """Labelled images that are read when they are asked for: x0 = (pixel/127.5 − 1)/sigma_data, [h, w, c], float32.

    ValueError if they are not prepared in the folder, not in array_record files, have no such splits or features, or
    are not of one shape; if TFDS is not installed, for it is an extra.
    """
    tfds = require("tensorflow_datasets", "tfds", f"the data set {config.name or 'of config.data.name'}")
    builder = _open(tfds, config)
    features: dict[str, Any] = dict(builder.info.features)
    label = features.get(config.label)
    if label is None or not isinstance(label, tfds.features.ClassLabel) or config.image not in features:
        there = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in sorted(features.items()))
        raise ValueError(
            f"{config.name} has the features {there}; config.data.image must name images of them, config.data.label a "
            "ClassLabel"
        )
    train, test = _read(builder, config, config.train, label), None
    if re.split(r"[\[+]", config.test)[0] in builder.info.splits:
        test = _read(builder, config, config.test, label, train.shape)
    elif config.test:
        there = ", ".join(builder.info.splits)
        raise ValueError(f"{config.name} has no split {config.test}, but {there}: set config.data.test, '' for none")
    return Dataset(
        train=train,
        test=test,
        uncond={"label": np.int32(label.num_classes)},
        num_classes=label.num_classes,
        view="grid",
        to_image=lambda x0: np.clip((np.asarray(x0) * config.sigma_data + 1) / 2, 0, 1),
    )


class Images:
    """Random access to a TFDS source: images[rows [b]] is {"x0": [b, h, w, c], "cond": {"label": [b]}}.

    Safe to read from several threads. shape: of images; None for that of the first.
    """

    def __init__(self, source, config: TfdsConfig, classes: int, where: str, shape: tuple[int, ...] | None = None):
        self.source, self.config, self.classes, self.where = source, config, classes, where
        self.shape = shape or self._records([0])[0][config.image].shape

    def __len__(self):
        return len(self.source)

    def __getitem__(self, rows):
        pixels, labels = np.empty((len(rows), *self.shape), np.uint8), np.empty(len(rows), np.int32)
        for i, record in enumerate(self._records([int(row) for row in rows])):
            image, labels[i] = record[self.config.image], record[self.config.label]
            if (image.dtype, image.shape) != (np.uint8, self.shape) or not 0 <= labels[i] < self.classes:
                raise ValueError(
                    f"{self.where}: image {rows[i]} is {image.dtype} {list(image.shape)} of class {labels[i]}; "
                    f"all must be uint8 {list(self.shape)}, of classes 0 to {self.classes - 1}"
                )
            pixels[i] = image
        x0 = (pixels.astype(np.float32) / 127.5 - 1) / np.float32(self.config.sigma_data)
        return {"x0": x0, "cond": {"label": labels}}

    def _records(self, rows: list[int]) -> Sequence[dict]:
        try:
            return self.source.__getitems__(rows)
        except (RuntimeError, OSError) as error:  # of array_record, of a decoder of images
            raise ValueError(f"{self.where} cannot be read: {error}") from None


def _open(tfds, config: TfdsConfig) -> Any:
    """The builder of a data set that is prepared, or of a copy of it that array_record can read: of an object store's.

    The code that would prepare it is not looked for.
    """
    if not config.name or not config.path:
        raise ValueError(
            f"config.data.name {config.name!r} and config.data.path {config.path!r} must name a data set of TFDS and "
            "the folder that it was prepared in"
        )
    folder = as_path(config.path).expanduser()
    try:
        builder = tfds.core.read_only_builder.builder_from_files(config.name, data_dir=str(folder))
        return tfds.builder_from_directory(local(builder.data_path)) if stored(folder) else builder
    except ValueError:  # DatasetNotFoundError, whose words are many
        found = {file.parent.parent for depth in ("*/*", "*/*/*") for file in folder.glob(f"{depth}/dataset_info.json")}
        names = ", ".join(sorted(str(path.relative_to(folder)) for path in found))
        raise ValueError(
            f"{folder} has no data set {config.name}, but {names or 'none'}; {_how_to_prepare(config)}"
        ) from None


def _read(builder, config: TfdsConfig, split: str, label, shape=None) -> Images:
    """The images of a split."""
    where = f"{config.name} in {config.path}, split {split}"
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(f"{where}: not in array_record files; {_how_to_prepare(config)} in another folder") from None
    except (ValueError, KeyError, AssertionError) as error:
        there = ", ".join(f"{name} of {info.num_examples}" for name, info in builder.info.splits.items())
        raise ValueError(f"{where} is none of its splits ({there}), nor a part of one: {error}") from None
    return Images(source, config, label.num_classes, where, shape)


def _how_to_prepare(config: TfdsConfig) -> str:
    return (
        f"where there are TensorFlow and a network, `tfds build {config.name} --data_dir={config.path} "
        "--file_format=array_record` prepares it"
    )

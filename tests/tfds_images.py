"""A tiny data set of TensorFlow Datasets, as `tfds build` prepares one: images whose brightness tells the class."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CLASSES = 10


def pixels(i, shape):
    """Of image i, uint8: class i % CLASSES plus noise."""
    return np.random.default_rng(i).integers(0, 60, shape, np.uint8) + np.uint8(20 * (i % CLASSES))


def prepare(folder, splits, shape=(8, 8, 1), name="tiny", file_format="array_record", sizes=lambda i, shape: shape):
    """Writes {split: how many images} of a shape (None: any) to a folder; images are numbered over all splits."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # TFDS would look there for checksums of downloads

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape),
                "label": tfds.features.ClassLabel(num_classes=CLASSES),
                "number": tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            ends = np.cumsum(list(splits.values()))
            return {
                split: self._generate_examples(end - count, end)
                for (split, count), end in zip(splits.items(), ends, strict=True)
            }

        def _generate_examples(self, start, end):
            for i in map(int, range(start, end)):
                yield i, {"image": png(pixels(i, sizes(i, shape))), "label": i % CLASSES, "number": i}

    Tiny.name = name
    Tiny(data_dir=str(folder), file_format=file_format).download_and_prepare()
    return folder


def png(image):
    """A file of one, for TFDS encodes arrays by TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "png")
    file.seek(0)
    return file

"""A set of latents as a data set of TensorFlow Datasets (TFDS), for programs that read those. TensorFlow is not needed.

python -m rcm_jax.data.tfds_builder --set=SET --data_dir=DIR [--name=NAME]

Then tfds.data_source("NAME/20x60x104x16", split="train", data_dir=DIR) has the examples of that shape of x0, in the
order and with the dtypes of the set. The split "uncond" has one example, of what guidance replaces: the metadata list
its names under "uncond", its other tensors are 0. Who reads bfloat16 must have imported ml_dtypes, as JAX does.
"""

import argparse
import os
import re

import numpy as np

from rcm_jax.data import LatentsConfig, load
from rcm_jax.data.dataset import Dataset, buckets_of
from rcm_jax.data.latents import read_set
from rcm_jax.util.extras import require
from rcm_jax.util.files import as_path, check_new_folder, new_folder

VERSION = "1.0.0"
SHARD = 2**28  # bytes of a file, about


def to_tfds(path: str | os.PathLike, data_dir: str | os.PathLike, name: str = "") -> list[str]:
    """Writes a folder of latents as a data set of TFDS into data_dir; returns the names by which TFDS knows it.

    name: that of the folder if not given. There is one for each shape, NAME/SHAPE; each is there whole or not at all.
    ValueError for a folder that is no set, a name that TFDS cannot have, and where there is such a data set already.
    """
    source = as_path(path)
    if not re.fullmatch(r"[a-z]\w*", name := name or source.name):
        raise ValueError(f"the name {name!r} must be of letters, digits and _, and begin with a small letter: --name")
    shapes = [shard["shape"] for shard in read_set(source)["shards"]]
    dataset = load(LatentsConfig(str(source), tuple(max(shapes))))  # that of most frames: none is cut
    configs = ["x".join(map(str, shape)) for shape in dataset.shapes]
    folders = [as_path(data_dir) / name / config / VERSION for config in configs]
    for folder in folders:
        check_new_folder(folder)
    for folder, config, rows in zip(folders, configs, buckets_of(dataset.train), strict=True):
        with new_folder(folder, "features.json") as temporary:
            _write(temporary, f"{name}/{config}", dataset, rows)
    return [f"{name}/{config}" for config in configs]


def _write(folder, full_name: str, dataset: Dataset, rows: np.ndarray) -> None:
    """Some rows, of one shape.

    By the SequentialWriter of TFDS: its builders of generators shuffle more than a GB through TensorFlow's files.
    """
    tfds = require("tensorflow_datasets", "tfds", "a data set of TFDS")
    first = _example(dataset, rows[0])
    name, config = full_name.split("/")
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(name, tfds.core.Version(VERSION), str(folder), __name__, config),
        description="Latents of unit variance, and what a network is conditioned on.",
        features=tfds.features.FeaturesDict(
            {
                key: tfds.features.Tensor(shape=array.shape, dtype=array.dtype, encoding="bytes")
                for key, array in first.items()
            }
        ),
        metadata=tfds.core.MetadataDict(uncond=sorted(dataset.uncond)),
        disable_shuffling=True,
    )
    each = max(1, SHARD // sum(array.nbytes for array in first.values()))
    writer = tfds.core.SequentialWriter(info, each, file_format="array_record")
    writer.initialize_splits(["train", "uncond"])
    writer.add_examples({"train": (_example(dataset, row) for row in rows)})
    writer.add_examples({"uncond": [{key: np.zeros_like(array) for key, array in first.items()} | dataset.uncond]})
    writer.close_all()


def _example(dataset: Dataset, row) -> dict[str, np.ndarray]:
    """The tensors of one example, x0 in the dtype that it is stored in."""
    batch = dataset.train[np.array([row])]
    x0 = batch["x0"].astype(dataset.train.kinds["x0"].dtype)
    return {name: array[0] for name, array in {"x0": x0, **batch["cond"]}.items()}


def main():
    """Writes a set, and prints how it is read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", required=True, help="a folder of latents")
    parser.add_argument("--data_dir", required=True, help="where TFDS keeps data sets")
    parser.add_argument("--name", default="", help="of the data set; that of the folder if not given")
    given = parser.parse_args()
    try:
        names = to_tfds(given.set, given.data_dir, given.name)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for name in names:
        print(f'tfds.data_source("{name}", split="train", data_dir="{given.data_dir}")')


if __name__ == "__main__":
    main()

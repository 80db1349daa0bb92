"""What all processes of a run must have in common, said before anything is made."""

import hashlib
import pathlib
from importlib import metadata

import jax
import numpy as np

from rcm_jax.data.dataset import Dataset, buckets_of, random_access
from rcm_jax.util.config import flatten, to_mapping

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def of_run(run, folder) -> dict[str, str]:
    """Every key of the config, the workdir, the code and the libraries."""
    keys = {name: str(value) for name, value in flatten(to_mapping(run)).items()}
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return keys | {"--workdir": str(folder), "the code (a hash)": code()} | versions


def of_data(dataset: Dataset) -> dict[str, str]:
    """How many examples there are, of each shape, and a hash of some of them and of the conditions without any."""
    source, rows = random_access(dataset.train), buckets_of(dataset.train)
    places = sorted({int(part[i]) for part in rows for i in (0, len(part) // 2, -1)})
    some = [source[np.array([place])] for place in places]
    sums = hashlib.sha256()
    for leaf in jax.tree.leaves((some, dataset.uncond)):
        sums.update(np.ascontiguousarray(leaf).tobytes())
    return {"the data's sizes": str([len(part) for part in rows]), "some examples (a hash)": sums.hexdigest()[:16]}


def code() -> str:
    """A hash of the source of this package and of the kernels."""
    sums, root = hashlib.sha256(), pathlib.Path(__file__).resolve().parents[2]
    for path in sorted(path for wing in ("rcm_jax", "kernels") for path in (root / wing).rglob("*.py")):
        sums.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return sums.hexdigest()[:16]

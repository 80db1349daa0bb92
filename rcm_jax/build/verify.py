"""Whether a set is what it says: every record read, and compared with what was written."""

from collections.abc import Callable

import numpy as np

from rcm_jax.build.engine import EXAMPLES
from rcm_jax.data import records
from rcm_jax.data.latents import UNCOND, read_set, shard_paths
from rcm_jax.util.files import as_path, parse_json, reading, regular


def verify(folder, tick: Callable[[], object] = lambda: None) -> int:
    """Reads all of a set; returns how many examples it has. tick is called for every example.

    ValueError that names file, example and key for the first that cannot be read, is not finite, is of another shape
    or kind than the others, or is not what was written (by its sha256, where examples.jsonl has it).
    """
    folder = as_path(folder)
    told, paths = read_set(folder)["shards"], shard_paths(folder)
    if len(told) != len(paths):
        raise ValueError(f"{folder} has {len(paths)} files of latents, its set.json names {len(told)}")
    lines = _lines(folder / EXAMPLES)
    uncond, kinds, count = records.decode((folder / UNCOND).read_bytes(), folder / UNCOND), None, 0
    for path, shard in zip(paths, told, strict=True):
        source = records.open_shard(path)
        if len(source) != shard["examples"]:  # pyright: ignore[reportArgumentType]
            raise ValueError(f"{path} has {len(source)} examples, set.json says {shard['examples']}")  # pyright: ignore[reportArgumentType]
        for position in range(shard["examples"]):
            line = lines[count] if lines is not None and count < len(lines) else {}
            where = f"{path}: record {position} (example {count}{', ' + line['key'] if 'key' in line else ''})"
            try:
                record = source[position]
            except RuntimeError as error:
                raise ValueError(f"{where} cannot be read: {error}") from None
            if line.get("sha256", records.digest(record)) != records.digest(record):
                raise ValueError(f"{where} is not what was written: its sha256 differs from that in {EXAMPLES}")
            tensors = records.as_arrays(records.decode(record, where), where)
            kinds = _check(tensors, uncond, tuple(shard["shape"]), kinds, where)
            count += 1
            tick()
    if lines is not None and len(lines) != count:
        raise ValueError(f"{folder / EXAMPLES} tells of {len(lines)} examples, the files hold {count}")
    return count


def _check(tensors, uncond, shape, kinds, where):
    """What kind of example it is, which all must be of."""
    records.check_x0(tensors, where)
    if tensors["x0"].shape != shape:
        raise ValueError(f"{where}: x0 is {list(tensors['x0'].shape)}, set.json says {list(shape)}")
    found = records.kinds_of(tensors)
    if kinds is None:
        records.check_uncond(uncond, tensors, UNCOND)
    elif found != kinds:
        raise ValueError(f"{where} holds {records.in_words(found)}; those before hold {records.in_words(kinds)}")
    return found


def _lines(path) -> list[dict] | None:
    """Of examples.jsonl; None where it is missing, as in sets that were not built here."""
    if not path.exists():
        return None
    with reading(path, "is no list of examples"):
        lines = [parse_json(line) for line in regular(path).read_bytes().splitlines()]
        numbers = [line.get("example") for line in lines]
    if numbers != list(np.arange(len(lines))):
        raise ValueError(f"{path} does not number its examples from 0")
    return lines

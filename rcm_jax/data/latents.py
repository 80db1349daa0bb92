"""Precomputed latents and text embeddings on disk.

A folder holds latents-00000-of-0000N.array_record …, uncond.safetensors and set.json. Every record is one example in
safetensors: x0, the latents [t, h, w, c] of unit variance, and its conditions by name, say text [l, d]. Of images with
a class they are [h, w, c] and label [], int32; that of uncond.safetensors is the number of classes. All examples
have the same names and dtypes; those of one file have one shape of x0, which set.json says. What lies on all of
[t, h, w], as x0, has its sizes; other conditions have one shape in all of the set. uncond.safetensors has the
conditions that guidance replaces, say the text of the negative prompt. Records are read when they are asked for; in
memory is an index, some 60 bytes a record.
"""

import bisect
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Annotated, Any

import numpy as np

from rcm_jax.data import records
from rcm_jax.data.dataset import Dataset
from rcm_jax.util.files import MOST_AXES, as_path, brief, new_folder, read_json, reading, regular, stored, write_text
from rcm_jax.util.ranges import Natural, Width, config, some

MOST = 10**9  # examples in a file, places along an axis
UNCOND, SET = "uncond.safetensors", "set.json"
SHARD = re.compile(r"latents-(\d{5,})-of-(\d{5,})\.array_record")


@config
class LatentsConfig:
    """A folder, as scripts/build_dataset.py makes it, and the shape of x0 without the batch axis: [t, h, w, c], of
    images with a class [h, w, c].

    Of examples with more frames the first t are taken, as the official runs do, of x0 and of conditions on its frames.
    A set may hold other shapes besides (buckets): they are trained on as well; samples are drawn in `shape`.

    known_frames: for networks that are given the beginning of a video, the first frames in the set are the condition
    "known" [k, h, w, c], and x0 are those after them.
    """

    path: str = ""
    shape: Annotated[tuple[Width, ...], some] = ()
    known_frames: Natural = 0

    def __post_init__(self):
        if self.known_frames and len(self.shape) != 4:
            raise ValueError(f"known_frames {self.known_frames} is for videos [t, h, w, c], not {list(self.shape)}")


def load(config: LatentsConfig) -> Dataset:
    """The examples as a random-access source, all for training: x0 float32, conditions in their stored dtypes.

    ValueError if there is no folder, it is not whole, its records do not fit set.json or uncond.safetensors, or none
    has config.shape but for having more frames.
    """
    if not config.path:
        raise ValueError("config.data.path is empty: it must name a folder of latents")
    folder = as_path(config.path)
    examples = Latents(folder, config.shape, config.known_frames)
    path = folder / UNCOND
    if not path.exists():
        raise ValueError(f"{folder} has no {UNCOND}: the condition of guidance, with the names of the conditions")
    uncond = examples.cut(records.decode(regular(path).read_bytes(), path), examples.stored_shapes[0])
    records.check_uncond(uncond, examples.first, path)
    label = uncond.get("label", np.int32(0))
    if label.shape or label.dtype != np.int32 or label < 0:
        raise ValueError(f"{path}: label is {brief(label)}, {label.dtype}; it must be a number of classes, int32")
    classes = int(label) or None  # the label after the last, or of no meaning
    return Dataset(train=examples, test=None, uncond=uncond, num_classes=classes, view="video")


class Latents:
    """Random access to the records of a folder: examples[rows [b]] is {"x0": float32 [b, ...], "cond": {name: …}}.

    Rows that are asked for together have one shape: `buckets` are the rows of each, first those of `shape`.
    Safe to read from several threads. Opening reads one record of each shape.
    """

    def __init__(self, folder, shape: Sequence[int], known_frames: int = 0):
        self.paths, self.known_frames = shard_paths(folder), known_frames
        shape = (shape[0] + known_frames, *shape[1:])
        self.frames = shape[0] if len(shape) == 4 else sys.maxsize  # of images nothing is cut
        self.opened: dict[int, Any] = {}
        shards = read_set(folder)["shards"] if (folder / SET).exists() else None
        counts = self._counts(folder, shards)
        self.ends = list(itertools.accumulate(counts))
        if not len(self):
            raise ValueError(f"{folder} holds no example: its {len(self.paths)} files are empty")
        self.kinds = None
        if shards is None:  # sets of one shape, written before there was a set.json
            tensors, where = self._read(0)
            records.check_x0(tensors, where)
            self.stored_shapes = [tensors["x0"].shape] * len(counts)
        else:
            self.stored_shapes = [tuple(shard["shape"]) for shard in shards]
        self.buckets = self._buckets(tuple(shape), counts)
        self.first = {}
        for rows in reversed(self.buckets):
            self.first = self._example(int(rows[0]))  # at last of `shape`

    def shard(self, i: int) -> Any:
        """The records of a file, which is opened when they are first asked for."""
        if i not in self.opened:
            self.opened[i] = records.open_shard(self.paths[i])
        return self.opened[i]

    def _counts(self, folder, shards: list[dict] | None) -> list[int]:
        """How many examples each file has. Those of an object store are not looked into before they are read."""
        told = [] if shards is None else [shard["examples"] for shard in shards]
        if shards is not None and stored(folder) and len(told) == len(self.paths):
            return told
        with futures.ThreadPoolExecutor(16) as pool:
            counts = list(pool.map(lambda i: len(self.shard(i)), range(len(self.paths))))
        pairs = zip(self.paths, counts, [*told, *[None] * len(counts)], strict=False)
        wrong = [f"{path.name} has {n}, not {m}" for path, n, m in pairs if n != m]
        if shards is not None and (wrong or len(told) != len(counts)):
            raise ValueError(f"{folder} is not what its {SET} says: {'; '.join(wrong[:3]) or 'files are missing'}")
        return counts

    def _buckets(self, wanted: tuple[int, ...], counts) -> list[np.ndarray]:
        """The rows of every shape, cut to `frames`; those of the wanted one first."""
        found: dict[tuple[int, ...], list[np.ndarray]] = {wanted: []}
        for shape, end, count in zip(self.stored_shapes, self.ends, counts, strict=True):
            if count:
                found.setdefault((min(shape[0], self.frames), *shape[1:]), []).append(np.arange(end - count, end))
        if not found[wanted]:
            there = " and ".join(map(str, sorted(map(list, set(self.stored_shapes)))))
            raise ValueError(
                f"{self.paths[0].parent}: x0 is {there} there, but the config's shape is {list(wanted)}; only frames, "
                "the first number, may be more there"
            )
        return [np.concatenate(parts) for parts in found.values()]

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, rows):
        batch: dict[str, Any] = {}
        for i, row in enumerate(rows):
            example = self._example(int(row))
            for name, tensor in example.items():
                if i == 0:
                    dtype = np.float32 if name == "x0" else tensor.dtype
                    batch[name] = np.empty((len(rows), *tensor.shape), dtype)
                batch[name][i] = tensor
        x0 = batch.pop("x0")
        if self.known_frames:
            batch["known"], x0 = np.split(x0, [self.known_frames], axis=1)
        return {"x0": x0, "cond": batch}

    def cut(self, tensors: Mapping[str, np.ndarray], shape) -> dict[str, np.ndarray]:
        """Tensors with the first frames of those that lie, as an x0 of that shape, on [t, h, w]; others as they are."""
        places = tuple(shape[:-1])
        return {
            name: array[: self.frames] if len(places) == 3 and array.shape[:3] == places else array
            for name, array in tensors.items()
        }

    def _example(self, row: int) -> dict[str, np.ndarray]:
        """The tensors of one example, cut, and checked against the first that was read."""
        tensors, where = self._read(row)
        records.check_x0(tensors, where)
        told, kinds = self.stored_shapes[bisect.bisect_right(self.ends, row)], records.kinds_of(tensors)
        if tensors["x0"].shape != told:
            raise ValueError(f"{where}: x0 is {list(tensors['x0'].shape)}; it should be {list(told)}, as in its file")
        self.kinds = self.kinds or kinds
        if kinds != self.kinds:
            known = records.in_words(self.kinds)
            raise ValueError(f"{where} holds {records.in_words(kinds)}; the first record holds {known}")
        return self.cut(tensors, told)

    def _read(self, row: int) -> tuple[dict[str, np.ndarray], str]:
        """The tensors of one example, and what to call it in errors."""
        shard = bisect.bisect_right(self.ends, row)
        position = row - (self.ends[shard - 1] if shard else 0)
        where = f"{self.paths[shard]}: record {position} (example {row})"
        with reading(where, "cannot be read", "; train.leave_out can leave it out"):
            record = self.shard(shard)[position]
        return records.decode(record, where), where


def read_set(folder) -> dict:
    """What set.json says of the files, {"shards": [{"examples", "shape"}], …}; ValueError if it is none."""
    path = as_path(folder) / SET
    problem = "does not say what the set holds"
    values = read_json(path, problem)
    with reading(path, problem):
        for shard in values["shards"]:
            examples, shape = shard["examples"], shard["shape"]
            fits = isinstance(shape, list) and 0 < len(shape) <= MOST_AXES
            if not fits or not all(type(n) is int and 0 < n < MOST for n in (examples + 1, *shape)):
                raise ValueError(f"{brief(shard)} are not a number of examples and a shape")
    return values


def shard_name(i: int, count: int) -> str:
    """Of the files of a set."""
    return f"latents-{i:05d}-of-{count:05d}.array_record"


def shard_paths(folder) -> list[pathlib.Path]:
    """The files of a folder in order; ValueError if there is none or one is missing."""
    folder = as_path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: latents are read from one that rcm_jax.data.latents.write made")
    found = sorted((int(m[2]), int(m[1]), path) for path in folder.iterdir() if (m := SHARD.fullmatch(path.name)))
    if not found:
        raise ValueError(f"{folder} has no files latents-00000-of-0000N.array_record")
    totals = sorted({total for total, _, _ in found})
    if len(totals) > 1:
        raise ValueError(f"{folder} mixes latents of {' and of '.join(map(str, totals))} files: keep one set")
    if missing := sorted(set(range(totals[0])) - {number for _, number, _ in found}):
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise ValueError(f"{folder} has {len(found)} of {totals[0]} files of latents; missing: {shown}")
    return [path for _, _, path in found]


def write(
    folder: str | os.PathLike,
    examples: Iterable[Mapping[str, np.ndarray]],
    uncond: Mapping[str, np.ndarray],
    *,
    shard_bytes: int = 4 * 2**30,
) -> int:
    """Writes a folder that `load` reads, from a stream of {"x0": [t, h, w, c], "text": [l, d], …}; returns how many.

    Tensors are float32, float16, bfloat16 or int32 and are stored as they are; a new shard is begun after shard_bytes.
    The folder must be new or empty, and it is either whole or not there. ValueError that names the example if one
    differs from the first in names, shapes or dtypes, or is not finite; OSError if the disk is full.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes {shard_bytes} must be at least 1")
    with new_folder(folder, last=SET) as temporary:
        uncond = records.as_arrays(uncond, UNCOND)
        (temporary / UNCOND).write_bytes(records.encode(uncond))
        return _write_shards(temporary, _checked(examples, uncond, first := {}), first, shard_bytes)


def _checked(examples, uncond, first: dict) -> Iterator[bytes]:
    """Records of examples, each checked against the first, whose tensors go into a dict."""
    for i, example in enumerate(examples):
        tensors = records.as_arrays(example, f"example {i}")
        if not first:
            first |= tensors
            records.check_x0(tensors, "example 0")
            records.check_uncond(uncond, tensors, UNCOND)
        if {n: (a.dtype, a.shape) for n, a in tensors.items()} != {n: (a.dtype, a.shape) for n, a in first.items()}:
            raise ValueError(f"example {i} holds {records.show(tensors)}; example 0 holds {records.show(first)}")
        yield records.encode(tensors)
    if not first:
        raise ValueError("there is no example to write")


def _write_shards(folder, stream: Iterator[bytes], first: dict, limit: int) -> int:
    """The records in shards, which get their names when it is known how many there are; returns how many records."""
    sizes = []
    for record in stream:
        path = folder / str(len(sizes))
        sizes.append(records.write_shard(path, itertools.chain([record], stream), limit))
    for i in range(len(sizes)):
        (folder / str(i)).rename(folder / shard_name(i, len(sizes)))
    shards = [{"examples": size, "shape": first["x0"].shape} for size in sizes]
    write_text(folder / SET, json.dumps({"shards": shards}, indent=1) + "\n")
    return sum(sizes)

"""The engine: items of a source become the shards of a set, each whole or not there, by any number of workers.

A folder that is being built holds, besides the files of a set (rcm_jax.data.latents):
  plan.json             what is being built; whoever goes on with it must be about to build the same
  texts/00012.safetensors   the embeddings of the prompts of a shard, until it is made
  parts/00012.json      a shard is whole: its examples, and what was skipped
A worker makes the shards whose number leaves its own rest when divided by the number of workers. The one that finds
all parts writes examples.jsonl, a line for every example, and set.json, which says that the set is whole. Shards
depend on their items alone: not on the workers, nor on how often and where they were ended.
"""

import hashlib
import importlib.metadata
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from rcm_jax.build.source import Example, Item, Source
from rcm_jax.data import records
from rcm_jax.data.latents import SET, UNCOND, read_set, shard_name
from rcm_jax.util.files import as_path, read_json, write_text, write_whole

PLAN, EXAMPLES = "plan.json", "examples.jsonl"
AHEAD = 4  # items that are prepared before they are made
SHOWN = 4  # examples of a shard on its contact sheet
PACKAGES = ("jax", "numpy", "av", "transformers")  # whose versions are kept with a set


class Shard(NamedTuple):
    """Some items of one shape."""

    number: int
    places: list[int]  # of the items in the list of all


class Plan(NamedTuple):
    """What is built where, and how it is divided."""

    folder: Any
    source: Source
    shards: list[Shard]
    made_from: Mapping[str, Any]  # all that decides the content, as JSON

    def name(self, shard: Shard) -> str:
        """Of its file in the set."""
        return shard_name(shard.number, len(self.shards))

    def part(self, shard: Shard):
        """The file that says that a shard is whole."""
        return self.folder / "parts" / f"{shard.number:05d}.json"

    def pending(self, worker: int = 0, workers: int = 1) -> list[Shard]:
        """The shards of a worker that are not there."""
        folder = self.folder / "parts"
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        return [shard for shard in self.shards[worker::workers] if self.part(shard).name not in there]

    def parts(self) -> list[dict]:
        """What is told of the shards that are there, in their order."""
        pending = {shard.number for shard in self.pending()}
        paths = [self.part(shard) for shard in self.shards if shard.number not in pending]
        with futures.ThreadPoolExecutor(16) as pool:
            return list(pool.map(read_json, paths))

    def items(self, shard: Shard) -> list[Item]:
        """Those that its examples are made of."""
        return [self.source.items[place] for place in shard.places]

    @property
    def finished(self) -> bool:
        """Whether the set is whole."""
        return (self.folder / SET).exists()


def make_plan(folder, source: Source, shard_size: int, settings: Mapping[str, Any]) -> Plan:
    """Divides the items, by their shapes, into shards of so many; ValueError for none, or a key that is there twice.

    settings: those that are not of the source, but decide the content as well.
    """
    if not source.items or shard_size < 1:
        first = "".join(f"; {key}: {error}" for key, error in list(source.bad.items())[:1])
        raise ValueError(f"{len(source.items)} items in shards of {shard_size}: there must be one of each{first}")
    lines, places = hashlib.sha256(), {}
    keys = set()
    for place, item in enumerate(source.items):
        if item.key in keys:
            raise ValueError(f"{item.key} is there twice: every item needs a name of its own")
        keys.add(item.key)
        lines.update(json.dumps([item.key, item.prompt, item.shape, dict(item.origin)]).encode() + b"\n")
        places.setdefault(item.shape, []).append(place)
    parts = [group[i : i + shard_size] for group in places.values() for i in range(0, len(group), shard_size)]
    made_from = {**source.settings, **settings, "shard": shard_size, "count": len(keys), "items": lines.hexdigest()}
    shards = [Shard(number, part) for number, part in enumerate(parts)]
    return Plan(as_path(folder), source, shards, json.loads(json.dumps(made_from)))


def claim(plan: Plan) -> None:
    """Writes plan.json into the folder; ValueError if another set is there, or was begun there, or anything else."""
    path = plan.folder / PLAN
    if plan.folder.exists() and not plan.folder.is_dir():
        raise ValueError(f"{plan.folder} is a file: choose another --out")
    # Another worker may be first at any moment; hidden files are what it is about to write.
    there = {child.name for child in plan.folder.iterdir()} if plan.folder.exists() else set()
    if PLAN not in there:
        if any(not name.startswith(".") for name in there):
            raise ValueError(f"{plan.folder} is there and not an empty folder: choose another --out")
        write_text(path, json.dumps(plan.made_from, indent=1) + "\n")
    found = read_json(path)
    if different := sorted(k for k in found.keys() | plan.made_from.keys() if found.get(k) != plan.made_from.get(k)):
        shown = "; ".join(f"{k}: {found.get(k)} there, {plan.made_from.get(k)} here" for k in different[:5])
        raise ValueError(f"{plan.folder} is being built from something else: {shown}. Choose another --out")


class Skips:
    """What was left out because it is bad; more than so many are an error."""

    def __init__(self, most: int, known: Mapping[str, str], before: int):
        """known: what was bad from the beginning; before: how many items were skipped in shards that are whole."""
        self.most, self.count, self.of_shard = most, before, []
        for key, error in known.items():
            self.add(key, error)
        self.take()

    def add(self, key: str, error) -> None:
        """One more; ValueError, with its name and the reason, if that is too many."""
        if self.count == self.most:
            raise ValueError(f"{key}: {error}. (--most_skipped={self.most}: raise it to leave more of them out)")
        self.count += 1
        self.of_shard.append({"key": key, "error": str(error)})

    def take(self) -> list[dict]:
        """Those of the shard that ends."""
        taken, self.of_shard = self.of_shard, []
        return taken


class Work(NamedTuple):
    """What a worker does besides asking the source."""

    texts: Callable[[Shard], np.ndarray | None]  # the embeddings [n, l, d] of the prompts of its items
    finish: Callable[[Example], Example]  # with an example before it is written
    most_skipped: int = 0
    tick: Callable[[], object] = lambda: None  # called for every example
    made: Callable[[Shard, list[Item], list[Example]], object] = lambda *_: None  # of a whole shard, the first SHOWN


def build(plan: Plan, shards: Sequence[Shard], work: Work) -> None:
    """Makes those shards, one after another.

    ValueError or OSError for what is bad, beyond so many items that are skipped; all shards before it stay.
    """
    skips = Skips(work.most_skipped, plan.source.bad, sum(len(part["skipped"]) for part in plan.parts()))
    for shard in shards:
        part: dict[str, Any] = {"shape": plan.items(shard)[0].shape, "examples": [], "kinds": {}}
        shown: list[tuple[Item, Example]] = []
        stream = _records(plan, shard, work, skips, part, shown)
        write_whole(plan.folder / plan.name(shard), lambda path, stream=stream: records.write_shard(path, stream))
        part["skipped"] = skips.take()
        if shown:
            work.made(shard, *(list(column) for column in zip(*shown, strict=True)))
        write_text(plan.part(shard), json.dumps(part) + "\n")


def _records(plan: Plan, shard: Shard, work: Work, skips: Skips, part: dict, shown: list) -> Iterator[bytes]:
    """The records of a shard; what is told of them goes into `part`, the first SHOWN into `shown`."""
    for item, example in _examples(plan.source, plan.items(shard), work.texts(shard), skips):
        try:
            tensors = records.as_arrays(work.finish(example), "its tensors")
            records.check_x0(tensors, "it")
            if tensors["x0"].shape != item.shape:
                raise ValueError(f"x0 is {list(tensors['x0'].shape)}, not {list(item.shape)}")
        except ValueError as error:
            skips.add(item.key, error)
            continue
        if not part["examples"]:
            records.check_uncond(read_uncond(plan.folder), tensors, plan.folder / UNCOND)
        record = records.encode(tensors)
        part["kinds"].setdefault(records.in_words(records.kinds_of(tensors)), item.key)
        told = {"key": item.key, "prompt": item.prompt, **item.origin, "sha256": records.digest(record)}
        part["examples"].append(told)
        if len(shown) < SHOWN:
            shown.append((item, tensors))
        work.tick()
        yield record


def _examples(source: Source, items: Sequence[Item], texts, skips: Skips) -> Iterator[tuple[Item, Example]]:
    """The examples of items, which are prepared ahead; those that cannot be made are skipped."""
    with futures.ThreadPoolExecutor(AHEAD) as pool:
        waiting, rest = deque(), enumerate(items)

        def fill():
            for place, item in itertools.islice(rest, AHEAD + source.batch - len(waiting)):
                waiting.append((place, item, pool.submit(source.prepare, item)))

        fill()
        while waiting:
            group = []
            while waiting and len(group) < source.batch:
                place, item, future = waiting.popleft()
                try:
                    group.append((place, item, future.result()))
                except (ValueError, OSError) as error:
                    skips.add(item.key, error)
                fill()
            if not group:
                continue
            places, some, prepared = (list(column) for column in zip(*group, strict=True))
            rows = None if texts is None else texts[places]
            try:
                made = source.make(some, prepared, rows)
            except (ValueError, OSError) as error:
                if len(some) > 1:
                    raise ValueError(f"{some[0].key} … {some[-1].key}: {error}") from None
                skips.add(some[0].key, error)
                continue
            named = [example if rows is None else {**example, "text": row} for example, row in
                     zip(made, made if rows is None else rows, strict=True)]  # fmt: skip
            yield from zip(some, named, strict=True)


def close(plan: Plan) -> int | None:
    """Writes what says that the set is whole, if all shards are; returns how many examples it has, else None."""
    try:
        parts = [] if plan.finished else plan.parts()
    except FileNotFoundError:  # another worker, which came to its end as well, has tidied up
        parts = []
    if plan.finished:
        _tidy(plan)
        return sum(shard["examples"] for shard in read_set(plan.folder)["shards"])
    if len(parts) < len(plan.shards):
        return None
    _check_alike(parts)
    lines = [line for part in parts for line in part["examples"]]
    if not lines:
        raise ValueError(f"{plan.folder}: no example is left, all {len(plan.source.items)} were skipped")
    text = "".join(json.dumps({"example": i, **line}) + "\n" for i, line in enumerate(lines))
    write_text(plan.folder / EXAMPLES, text)
    values = {
        "shards": [{"examples": len(part["examples"]), "shape": part["shape"]} for part in parts],
        "made_from": dict(plan.made_from),
        "skipped": [{"key": key, "error": error} for key, error in plan.source.bad.items()]
        + [skipped for part in parts for skipped in part["skipped"]],
        "versions": versions(),
    }
    write_text(plan.folder / SET, json.dumps(values, indent=1) + "\n")
    _tidy(plan)
    return len(lines)


def _tidy(plan: Plan) -> None:
    """Removes what was needed to go on, and what workers left that were killed."""
    for name in ("parts", "texts"):
        epath.Path(plan.folder / name).rmtree(missing_ok=True)
    for path in plan.folder.iterdir():
        if path.name.startswith(".latents-"):
            path.unlink()


def _check_alike(parts) -> None:
    """ValueError unless the examples of all shards have the same names, dtypes and, but for places, shapes."""
    kinds = {}
    for part in reversed(parts):
        kinds |= part["kinds"]  # the first of each is named
    if len(kinds) > 1:
        shown = "; ".join(f"{key}: {kind}" for kind, key in list(kinds.items())[:3])
        raise ValueError(f"the examples are not alike: {shown}. Begin anew with those of one kind")


def versions() -> dict[str, str]:
    """Of what made a set."""
    there = {"rcm_jax": "rcm-jax"} | {name: name for name in PACKAGES}
    found = {}
    for name, package in there.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"device": jax.devices()[0].device_kind}


def read_uncond(folder) -> dict:
    """What guidance replaces, once it is written."""
    path = as_path(folder) / UNCOND
    return records.decode(path.read_bytes(), path)

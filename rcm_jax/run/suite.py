"""Prompt suites: samples of a list of prompts, in the folders and under the names that its benchmark reads.

  OUT/suite.json   what is sampled and how; whoever goes on with a folder must ask for the same
  OUT/samples/…    the samples and nothing else: VBench takes the suffix of any file there for that of all

Text is embedded first, then a batch of latents at a time is drawn, decoded and written: memory does not grow with the
suite. A file is whole or not there, and one that is there is not drawn again.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rcm_jax.media import text, video
from rcm_jax.run import generate, samples, texts
from rcm_jax.run.pixels import frames, write
from rcm_jax.train import checkpoint
from rcm_jax.util.config import to_mapping
from rcm_jax.util.files import as_path, local, read_json, write_text

SETTINGS, SAMPLES = "suite.json", "samples"
LONGEST = 255 - 10  # bytes in the name of a file; while it is written it has ten more
UNFINISHED = re.compile(r"\..*\.[0-9a-f]{8}", re.DOTALL)
AT_ONCE = 64  # prompts whose embeddings are in memory with their padding


class Entry(NamedTuple):
    """A prompt, the name that its samples go by, and the text of files that lie beside them, by their paths."""

    prompt: str
    name: str
    beside: Mapping[str, str] = {}


class Layout(NamedTuple):
    """A kind of suite: how its file is read, and where its samples lie."""

    is_a: str  # in words, for errors
    read: Callable[[str], list[Entry] | None]  # of the content of the file; None: it is of another kind
    each: int  # samples of a prompt, unless seeds are asked for
    suffix: str | None  # the only one that the benchmark reads; None: either
    path: Callable[[str, int], str] = "{}-{}".format  # (name of an entry, number of a sample) -> file, without suffix


def _objects(content: str, lines: bool = False, **keys: type) -> list[dict]:
    """The JSON objects of a list, or one on each line, if all have those keys; none for anything else."""
    try:
        found = [json.loads(line) for line in content.split("\n") if line.strip()] if lines else json.loads(content)
    except (ValueError, RecursionError):
        return []
    fit = isinstance(found, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(key), kind) for key, kind in keys.items()) for one in found
    )
    return found if fit else []


def _vbench(content: str) -> list[Entry]:
    return [Entry(one["prompt_en"], one["prompt_en"]) for one in _objects(content, prompt_en=str, dimension=list)]


def _official(content: str) -> list[Entry]:
    return [Entry(one.get("augmented_prompt") or one["prompt"], one["prompt"]) for one in _objects(content, prompt=str)]


def _geneval(content: str) -> list[Entry]:
    found = enumerate(_objects(content, lines=True, prompt=str, tag=str))
    return [Entry(o["prompt"], f"{i:05d}", {f"{i:05d}/metadata.jsonl": json.dumps(o) + "\n"}) for i, o in found]


def _lines(content: str) -> list[Entry]:
    found = [line.strip() for line in content.splitlines() if line.strip()]
    return [] if content.lstrip().startswith(("[", "{")) else [Entry(line, line) for line in found]


SUITES = {
    "vbench": Layout("VBench_full_info.json (objects with prompt_en, dimension)", _vbench, 5, ".mp4"),
    "rcm": Layout("prompts.json of the official rCM (objects with prompt, augmented_prompt)", _official, 5, None),
    "geneval": Layout(
        "GenEval's evaluation_metadata.jsonl (prompt, tag on each line)",
        _geneval,
        4,
        ".png",
        "{}/samples/{:04d}".format,
    ),
    "lines": Layout("a text with a prompt on each line", _lines, 5, None),
}


class Suite(NamedTuple):
    """What a file asks for: each name once, in its order."""

    kind: str
    entries: list[Entry]
    digest: str  # of the file

    @property
    def layout(self) -> Layout:
        return SUITES[self.kind]

    @property
    def prompts(self) -> list[str]:
        return [entry.prompt for entry in self.entries]


def read(path) -> Suite:
    """The suite in a file, recognised by its content; ValueError for none, or one name for different prompts."""
    content = local(path).read_text(encoding="utf-8-sig")
    kind, entries = next(((kind, e) for kind, layout in SUITES.items() if (e := layout.read(content))), (None, []))
    if kind is None:
        raise ValueError(f"{path} is no prompt suite, which are: {'; '.join(known.is_a for known in SUITES.values())}")
    unique: dict[str, Entry] = {}
    for entry in entries:  # VBench may ask for a prompt in several dimensions, in an entry each
        if unique.setdefault(entry.name, entry) != entry:
            raise ValueError(f"{path} has two prompts that go by one name, {entry.name!r}")
    return Suite(kind, list(unique.values()), hashlib.sha256(content.encode()).hexdigest())


class Plan(NamedTuple):
    """What is left to do of a suite in a folder."""

    folder: Any
    request: generate.Request
    pending: list[tuple[int, int, Any]]  # (row of the request, seed, file)
    total: int  # of files, with those that are there
    beside: dict[Any, str]  # the text of other files
    settings: dict  # all that decides what the samples are, as JSON


def make_plan(suite: Suite, wanted: generate.Request, out) -> Plan:
    """What is left of a request for suite.prompts in a folder; nothing is written.

    ValueError for samples that the benchmark does not read, prompts that can name no file, an autoencoder other than
    the config's, and a folder that holds something else.
    """
    generator, layout, folder = wanted.generator, suite.layout, as_path(out)
    suffix = ".mp4" if generator.frames > 1 else ".png"
    if layout.suffix not in (None, suffix):
        raise ValueError(f"{suite.kind} reads {layout.suffix}, but {generator.frames} frames make {suffix}: --frames")
    numbered = [(row, *pair) for row in range(len(suite.entries)) for pair in enumerate(wanted.seeds)]
    files = {}
    for row, i, seed in numbered:
        name = suite.entries[row].name
        path = folder / SAMPLES / (layout.path(name, i) + suffix)
        if "/" in name or "\0" in name or len(path.name.encode()) > LONGEST:
            raise ValueError(
                f"no file can be named after the prompt {name!r}: it has a '/', or makes more than {LONGEST} bytes. "
                'A list of {"prompt": a short name, "augmented_prompt": the prompt} gives it another'
            )
        files[path] = row, seed
    if suffix == ".mp4":
        video.check_video()
    samples.check_decoder(generator)
    settings = _settings(suite, wanted)
    _check_folder(folder, settings)
    there = _neighbours(files)
    pending = [(row, seed, path) for path, (row, seed) in files.items() if path not in there]
    beside = {folder / SAMPLES / path: content for entry in suite.entries for path, content in entry.beside.items()}
    return Plan(folder, wanted, pending, len(files), beside, settings)


def _settings(suite: Suite, wanted: generate.Request) -> dict:
    generator = wanted.generator
    _, step = checkpoint.params_of(generator.folder, "ema", generator.step)
    return json.loads(json.dumps({
        "suite": suite.kind, "sha256": suite.digest, "checkpoint": str(generator.folder), "step": step,
        "low": str(generator.low.folder) if generator.low else None, "low_guidance": wanted.low_guidance,
        "teacher": generator.of_teacher, "steps": wanted.steps, "guidance": wanted.guidance,
        "negative_prompt": wanted.negative, "seeds": wanted.seeds, "latents": generator.shape,
        "sampling": to_mapping(generator.run.sampling), "files": {k: str(v) for k, v in generator.files.items()},
    }))  # fmt: skip


def _check_folder(folder, settings: dict) -> None:
    """ValueError unless a folder is new, empty, or begun with the same settings."""
    if (folder / SETTINGS).exists():
        found = read_json(folder / SETTINGS)
        if wrong := [key for key in settings if found.get(key) != settings[key]]:
            shown = "; ".join(f"{key}: {found.get(key)} there, {settings[key]} here" for key in wrong)
            raise ValueError(f"{folder} holds samples of something else: {shown}. Choose another --out")
    elif folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise ValueError(f"{folder} is there and not an empty folder: choose another --out")


def _neighbours(paths) -> set:
    """All that lies in the folders of some paths."""
    return {path for folder in {path.parent for path in paths} if folder.exists() for path in folder.iterdir()}


def sample(plan: Plan, *, tile: int | None = None, tick: Callable[[], object] = lambda: None) -> None:
    """Draws and writes what is left; tick is called after each file."""
    write_text(plan.folder / SETTINGS, json.dumps(plan.settings, indent=1) + "\n")
    for path, content in plan.beside.items():
        write_text(path, content)
    for path in _neighbours(path for _, _, path in plan.pending):
        if UNFINISHED.fullmatch(path.name):
            path.unlink()
    if not plan.pending:
        return
    wanted, media, shape = plan.request, plan.request.generator.media, plan.request.generator.shape
    found, uncond = embed(wanted, sorted({row for row, _, _ in plan.pending}))
    batch = min(wanted.batch, plan.total)  # the same program, however much is left
    mesh, params, sampler = generate.load_sampler(wanted, uncond, batch)
    decoder = samples.open_decoder(wanted.generator)
    for start in range(0, len(plan.pending), batch):
        rows, seeds, paths = zip(*plan.pending[start : start + batch], strict=True)
        given = np.stack([np.pad(found[row], ((0, media.text_length - len(found[row])), (0, 0))) for row in rows])
        with jax.set_mesh(mesh):
            latents = generate.draw_batch(sampler, params, {"text": given}, seeds, shape, batch)
        for path, x0 in zip(paths, latents, strict=True):
            write(path, frames(media, decoder, x0, tile), media.fps)
            tick()


def embed(wanted: generate.Request, rows: Sequence[int]) -> tuple[dict[int, np.ndarray], dict]:
    """({row: embedding [tokens, d], without its padding}, what guidance replaces): the text encoder is read once."""
    media, (ids, mask) = wanted.generator.media, wanted.tokens
    params, found = texts.read_encoder(media, wanted.encoder), {}
    for start in range(0, len(rows), AT_ONCE):
        part = list(rows[start : start + AT_ONCE])
        whole = text.encode(media.text_encoder, params, ids[part], mask[part])
        found |= {row: one[: mask[row].sum()].copy() for row, one in zip(part, whole, strict=True)}
    negative = text.encode(media.text_encoder, params, ids[-1:], mask[-1:])[0]
    return found, {"text": np.zeros_like(negative) if wanted.zero_last else negative}

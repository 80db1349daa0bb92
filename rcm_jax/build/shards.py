"""The latents that were published for rCM as a source: tars of samples, each a latent, an embedding and a prompt.

A sample is three files of one name in one tar: NAME.latent.pt, the latents [c, t, h, w] of a video, NAME.embed.pt, the
embedding [l, d] of its prompt, and NAME.prompt.txt. Either tensor may have a leading axis of 1.
"""

import os
import tarfile
from concurrent import futures
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from tqdm import tqdm

from rcm_jax.build.source import Example, Item, Source
from rcm_jax.convert.torch_file import read_torch_tensor
from rcm_jax.media.first_frame import check_conditions
from rcm_jax.run.experiment import Experiment, MediaConfig
from rcm_jax.run.generate import prompts_dataset
from rcm_jax.util.files import as_path, regular

LATENT, EMBEDDING, PROMPT = "latent.pt", "embed.pt", "prompt.txt"
DTYPES = (np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16))
THREADS = 16


class Sample(NamedTuple):
    """A sample and where its tensors are in a tar: (first byte, bytes)."""

    tar: Any  # path
    name: str
    prompt: str
    latent: tuple[int, int]
    embedding: tuple[int, int]


def shards(run: Experiment, folder_or_pattern: str | os.PathLike) -> Source:
    """The samples of the .tar files in a folder, or of those that a pattern with * names, by tar and then in its order.

    Examples have x0 [t, h, w, c] and text [media.text_length, media.text_width], padded with zeros, in the dtypes in
    which they are stored. Opening reads the headers of all tars, the prompts and the first sample; the others must
    have its shapes and dtypes, or `prepare` raises ValueError. Tars that are truncated and samples that lack a part
    are `bad`: what is whole in them is taken.

    Raises:
      ValueError: no tar, none with a sample that fits the run: tar and sample are named.
    """
    prompts_dataset(run)
    media: Any = run.media
    paths = _tars(folder_or_pattern)
    with futures.ThreadPoolExecutor(THREADS) as pool:
        found = list(tqdm(pool.map(_index, paths), "reading tars", len(paths), unit="tar", mininterval=1))
    samples = {f"{sample.tar.name}/{sample.name}": sample for good, _ in found for sample in good}
    bad = {key: error for _, wrong in found for key, error in wrong.items()}
    first: Example = {}
    while samples and not first:
        key, sample = next(iter(samples.items()))
        try:
            first = _example(media, sample)
        except ValueError as error:
            bad[key] = str(error)
            del samples[key]
    if not samples:
        reason = next(iter(bad.values()), f"there is no NAME.{LATENT}")
        raise ValueError(f"{folder_or_pattern}: the {len(paths)} tars hold no sample that can be used: {reason}")
    shape = first["x0"].shape
    check_conditions(run.model, shape, {})

    def prepare(item: Item) -> Example:
        example = _example(media, samples[item.key])
        for name, array in example.items():
            if (array.shape, array.dtype) != (first[name].shape, first[name].dtype):
                raise ValueError(
                    f"{samples[item.key].tar}: {name} of sample {samples[item.key].name} is {array.dtype} "
                    f"{list(array.shape)}, that of the first sample is {first[name].dtype} {list(first[name].shape)}: "
                    "keep the tars of each shape and dtype in a folder of their own"
                )
        return example

    items = [Item(key, s.prompt, shape, {"tar": s.tar.name, "sample": s.name}) for key, s in samples.items()]
    sizes = {path.name: epath.Path(path).stat().length for path in paths}
    settings = {"kind": "shards", "tars": sizes, "text_length": media.text_length}
    return Source(items, settings, lambda items, prepared, texts: list(prepared), prepare, brings_text=True, bad=bad)


def _tars(folder_or_pattern: str | os.PathLike) -> list:
    """Paths, sorted."""
    given = as_path(folder_or_pattern)
    folder, pattern = (given.parent, given.name) if "*" in given.name else (given, "*.tar")
    paths = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"{folder_or_pattern}: there is no {pattern} in {folder}")
    return paths


def _index(path) -> tuple[list[Sample], dict[str, str]]:
    """The samples of a tar, in its order, and what is wrong with others or with the tar, by their names."""
    parts: dict[str, dict[str, Any]] = {}
    bad = {}
    try:
        with regular(path).open("rb") as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                name, _, kind = file.partition(".")
                if not member.isfile() or kind not in (LATENT, EMBEDDING, PROMPT):
                    continue
                sample = parts.setdefault(f"{folder}/{name}".removeprefix("/"), {})
                if kind in sample:
                    raise ValueError(f"{path} has {member.name} twice: a set needs names of its own for all samples")
                sample[kind] = member.offset_data, member.size
                if kind == PROMPT:
                    opened.seek(member.offset_data)
                    sample[kind] = opened.read(member.size)
                    if len(sample[kind]) < member.size:
                        del sample[kind]
                        raise tarfile.ReadError("unexpected end of data")
            opened.seek(archive.offset)
            if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes anything for the zeros that end a tar
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (tarfile.TarError, OverflowError) as error:
        bad[path.name] = f"{path} is truncated, damaged or no plain tar ({error}): download it again"
    samples = []
    for name, sample in parts.items():
        if lacks := [kind for kind in (LATENT, EMBEDDING, PROMPT) if kind not in sample]:
            lacking = " and no ".join(f"{name}.{kind}" for kind in lacks)
            bad[f"{path.name}/{name}"] = f"{path}: sample {name} has no {lacking}"
            continue
        try:
            prompt = sample[PROMPT].decode().strip()
        except UnicodeDecodeError as error:
            bad[f"{path.name}/{name}"] = f"{path}: {name}.{PROMPT} is not in UTF-8: {error}"
            continue
        samples.append(Sample(path, name, prompt, sample[LATENT], sample[EMBEDDING]))
    return samples, bad


def _example(media: MediaConfig, sample: Sample) -> Example:
    """x0 and text of a sample."""
    latent, embedding = _tensor(sample, LATENT, sample.latent), _tensor(sample, EMBEDDING, sample.embedding)
    where, channels = f"{sample.tar}: sample {sample.name}", media.vae.z_dim
    width, most = media.text_width, media.text_length
    latent = latent[0] if latent.ndim == 5 and len(latent) == 1 else latent
    embedding = embedding[0] if embedding.ndim == 3 and len(embedding) == 1 else embedding
    if latent.ndim != 4 or latent.shape[0] != channels or 0 in latent.shape:
        raise ValueError(f"{where}: latents must be [{channels}, t, h, w], got {list(latent.shape)}")
    if embedding.ndim != 2 or embedding.shape[1] != width or not 0 < len(embedding) <= most:
        raise ValueError(
            f"{where}: the embedding must be [at most {most} (media.text_length), {width}], got {list(embedding.shape)}"
        )
    text = np.zeros((most, width), embedding.dtype)
    text[: len(embedding)] = embedding
    return {"x0": np.ascontiguousarray(np.moveaxis(latent, 0, -1)), "text": text}


def _tensor(sample: Sample, kind: str, place: tuple[int, int]) -> np.ndarray:
    where = f"{sample.tar}, {sample.name}.{kind}"
    with sample.tar.open("rb") as opened:
        opened.seek(place[0])
        data = opened.read(place[1])
    tensor = read_torch_tensor(data, where)
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{where} is {tensor.dtype}, not one of {', '.join(dtype.name for dtype in DTYPES)}")
    return tensor

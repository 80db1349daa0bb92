"""Sets of images and videos to be evaluated: files of them, a data set, samples of a checkpoint."""

import concurrent.futures
import functools
import io
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, UnidentifiedImageError

from rcm_jax.data.dataset import Dataset, random_access
from rcm_jax.evaluate.report import in_steps
from rcm_jax.parallel import distributed
from rcm_jax.run import pixels, previews
from rcm_jax.run.generate import Generator, guidance_of, make_sampler
from rcm_jax.run.samples import check_decoder, open_decoder
from rcm_jax.train import checkpoint
from rcm_jax.util.extras import require
from rcm_jax.util.files import local, reading, regular

IMAGES = (".png", ".jpg", ".jpeg")
THREADS = 16  # that read files


class Clips(NamedTuple):
    """Images or videos of one shape: batch(start, size, mesh) gives those from `start` on, uint8 [size, t, h, w, 3],
    over the devices of a mesh; behind the last comes the first again. All processes call it."""

    source: str
    count: int
    shape: tuple[int, ...]  # t, h, w, 3
    videos: bool  # else t is 1
    batch: Callable[[int, int, Any], jax.Array]


def open_clips(path, count: int | None = None, seed: int = 0) -> Clips:
    """Of a folder or .zip of PNG and JPEG, a folder of .mp4, an .npy or .npz of uint8 [n, h, w, c] or [n, t, h, w, c].

    count: so many, chosen by the seed; None: all.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no images there, or too few; other dtypes; not all of one size.
    """
    place = local(path)
    if not place.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if place.suffix in (".npy", ".npz"):
        array = _array(path, place)
        return of_reader(str(path), len(array), array.ndim == 5, lambda rows: _as_clips(array[rows]), count, seed)
    names, read = _files(path, place)
    videos = bool(names) and names[0].lower().endswith(".mp4")
    first: Any = read(names[0]).shape if names else None

    def item(row):
        clip = read(names[row])
        if clip.shape != first:
            sizes = [f"{shape[2]}×{shape[1]}, {shape[0]} frame(s)" for shape in (clip.shape, first)]
            raise ValueError(f"{path}: {names[row]} is {sizes[0]}, the first {sizes[1]}: bring all to one size before")
        return clip

    pool = concurrent.futures.ThreadPoolExecutor(2 if videos else THREADS)
    return of_reader(str(path), len(names), videos, lambda rows: np.stack([*pool.map(item, rows)]), count, seed)


def of_reader(
    source: str, there: int, videos: bool, read: Callable[[np.ndarray], np.ndarray], count=None, seed: int = 0
) -> Clips:
    """Clips of which read(rows) gives uint8 [n, t, h, w, 3], each process reading its own; count, seed: open_clips."""
    if not there:
        raise ValueError(f"{source} holds no images: .png, .jpg, .jpeg, or .mp4")
    if count is not None and count > there:
        raise ValueError(f"{source} holds {there}, but {count} samples are asked for")
    rows = np.arange(there)
    if count is not None:
        rows = np.sort(np.random.RandomState(seed).permutation(there)[:count])

    def batch(start, size, mesh):
        mine = rows[(start + distributed.local_rows(size, mesh)) % len(rows)]
        return distributed.global_batch(read(mine), size, mesh)

    return Clips(source, len(rows), read(rows[:1]).shape[1:], videos, batch)


def _array(path, place) -> np.ndarray:
    """The only array of images in a file."""
    with reading(path, "is damaged or no array of numpy"):
        found: Any = np.load(regular(place), mmap_mode="r")
        arrays = {name: found[name] for name in found.files} if isinstance(found, np.lib.npyio.NpzFile) else {}
    if isinstance(found, np.lib.npyio.NpzFile):
        images = [array for array in arrays.values() if array.ndim in (4, 5)]
        if len(images) != 1:
            there = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise ValueError(f"{path} must hold one array [n, h, w, c], or statistics; it holds {there}")
        (found,) = images
    if found.dtype != np.uint8 or found.ndim not in (4, 5) or found.shape[-1] not in (1, 3):
        kinds = "uint8 [n, h, w, c] or [n, t, h, w, c] with c = 1 or 3"
        raise ValueError(f"{path} holds {found.dtype} {found.shape}, expected {kinds}")
    return found


def _as_clips(x: np.ndarray) -> np.ndarray:
    """[n, h, w, c] or [n, t, h, w, c] → [n, t, h, w, 3]; grey in all three channels."""
    x = x[:, None] if x.ndim == 4 else x
    return np.broadcast_to(x, (*x.shape[:-1], 3))


def _files(path, place) -> tuple[list[str], Callable[[str], np.ndarray]]:
    """(sorted names, name -> clip [t, h, w, 3]) of what a folder or .zip holds."""
    if place.is_dir():
        names = sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())
        opened: Callable = lambda name: (place / name).open("rb")  # noqa: E731
    else:
        try:
            archive = zipfile.ZipFile(regular(place))
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError):
            raise ValueError(f"{path} is no folder, .zip, .npy or .npz of images") from None
        names, opened = sorted(archive.namelist()), archive.open
    images = [name for name in names if name.lower().endswith(IMAGES)]
    videos = [name for name in names if name.lower().endswith(".mp4")] if place.is_dir() else []
    if images and videos:
        raise ValueError(f"{path} holds {len(images)} images and {len(videos)} videos: keep them in folders apart")

    def read_image(name):
        try:
            with opened(name) as file:
                return np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))[None]
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from None

    def read_video(name):
        av = require("av", "sample", "videos")
        with av.open(str(place / name)) as file:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])

    return images or videos, read_video if videos else read_image


def of_dataset(name: str, dataset: Dataset, count: int | None = None, seed: int = 0) -> Clips:
    """The training examples of a data set of images."""
    source, to_image = random_access(dataset.train), dataset.to_image
    if to_image is None:
        raise ValueError(f"{name} has no images: build them as files, and name their folder")
    return of_reader(
        name, len(source), False, lambda rows: _as_clips(as_bytes(to_image(source[rows]["x0"]))), count, seed
    )


def as_bytes(images) -> np.ndarray:
    """[0, 1] → 0..255, rounded."""
    return np.round(np.clip(np.asarray(images, np.float32), 0, 1) * 255).astype(np.uint8)


def of_checkpoint(
    generator: Generator, count: int, seed: int, *, steps: int | None = None, guidance: float | None = None
) -> Clips:
    """Samples of classes, drawn when they are asked for: sample i, and its class, depend on the seed and i alone.

    steps, guidance (of a teacher, or of a student that is given it): the config's if None.

    Raises:
      ValueError: it samples from prompts; its latents lack the autoencoder; steps that there are no times for.
    """
    run, dataset = generator.run, generator.dataset
    if dataset.num_classes is None or "label" not in dataset.first["cond"]:
        raise ValueError(
            f"{generator.folder} does not sample from classes: make videos with scripts/sample.py and name their folder"
        )
    guidance = guidance_of(generator, guidance)
    steps = int(steps or (run.sampling.teacher_steps if generator.of_teacher else len(run.sampling.mid_times)))
    network, decode = generator.network, decoder_of(generator)
    sampler = make_sampler(generator, network.F, steps, guidance, dataset.uncond)
    labels = np.random.RandomState(seed).randint(max(dataset.num_classes, 1), size=count).astype(np.int32)
    key, shape = jax.random.key(seed), generator.shape
    restored = functools.cache(lambda mesh: generator.restored(network, mesh))

    def batch(start, size, mesh):
        def later(params, key, ids, cond, shape):
            return sampler(params, key, ids + np.uint32(start), cond, shape)

        label = labels[(start + np.arange(size)) % count]
        asked = previews.Asked(size, {"label": label}, shape, size)
        x0 = previews.draw_on_mesh(mesh, later, restored(mesh), key, asked)
        return distributed.global_batch(decode(x0[distributed.local_rows(size, mesh)]), size, mesh)

    size = decode(np.zeros((1, *shape), np.float32)).shape[1:]
    _, trained = checkpoint.params_of(generator.folder, "ema", generator.step)
    guided = "" if guidance is None else f", guidance {guidance:g}"
    source = f"{generator.folder} at {trained}, {in_steps(steps)}{guided}"
    return Clips(source, count, size, size[0] > 1, batch)


def decoder_of(generator: Generator) -> Callable[[np.ndarray], np.ndarray]:
    """x0 [n, ...] → uint8 [n, t, h, w, 3]."""
    if (to_image := generator.dataset.to_image) is not None:
        return lambda x0: _as_clips(as_bytes(to_image(x0)))
    if generator.media is None:
        raise ValueError(
            f"{generator.folder} samples latents, and its config has no media that says how to decode them"
        )
    check_decoder(generator)
    params = open_decoder(generator)
    return lambda x0: np.stack([np.stack([*pixels.frames(generator.media, params, one)]) for one in x0])

"""Clips of videos and images in frames of one size, and the captions that belong to them.

Videos are read by PyAV, images by Pillow; times are counted from a video's first frame.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from rcm_jax.util.extras import require
from rcm_jax.util.files import as_path

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
COLUMNS = {  # of a table of captions, by the names that they go under
    "file": ("path", "file", "file_name", "filename", "video", "image"),
    "caption": ("caption", "text", "prompt"),
}
NEAR = math.log(1.05)  # aspect ratios this close are as good as equal
AHEAD = 1.0  # seconds: a search for a time begins before it, for what is found may lie behind it
ROUNDED = 0.00051  # seconds by which a time stamp is late: some containers count milliseconds
ORIENTATION, TURNED = 0x0112, 5  # the EXIF tag; from this value on rows and columns are exchanged
THREADS = 16
REPAIR = "write it anew (ffmpeg -i OLD NEW.mp4) or take it out of the folder"


class Footage(NamedTuple):
    """What a file shows: pixels when upright and square, and how long; None: an image."""

    width: int
    height: int
    seconds: float | None


def list_files(folder: str | os.PathLike) -> list[str]:
    """The paths of videos and images in a folder and those below, relative to it, sorted; hidden ones are left out.

    ValueError if it is no folder or there are none.
    """
    place = as_path(folder)
    if not place.is_dir():
        raise ValueError(f"{folder} is no folder: videos and images are read from one")
    names = sorted(name for name in _names(place) if name.lower().endswith(VIDEOS + IMAGES))
    if not names:
        raise ValueError(f"{folder} has no video or image: they end in {' '.join(VIDEOS + IMAGES)}")
    return names


def probe(path: str | os.PathLike) -> Footage:
    """Size and length of a video or image: from its header and, of a video, its first frame.

    ValueError that names the file for what is neither or does not decode.
    """
    if _is_image(path):
        with _open_image(path) as image:
            width, height = image.size
            turned, seconds = image.getexif().get(ORIENTATION, 1) >= TURNED, None
    else:
        with _open_video(path) as (file, stream):
            frame = next(file.decode(stream), None)
            if frame is None:
                raise ValueError(f"{path} has no frame that decodes: {REPAIR}")
            width, height = round(frame.width * _pixel_aspect(stream)), frame.height
            turned, seconds = _quarters(frame) % 2, _seconds(file, stream)
    return Footage(height, width, seconds) if turned else Footage(width, height, seconds)


def read_clip(path: str | os.PathLike, start: float, frames: int, fps: float, size: tuple[int, int]) -> np.ndarray:
    """Frames of a video, or an image as the only one: uint8 [frames, height, width, 3], RGB; size: width, height.

    Frame i is the one on screen at start + i/fps seconds. It is turned as its file says, scaled to cover the size, not
    distorted, and cut around its middle; alpha is dropped. Memory is that of the clip and a few frames.

    Raises:
      ValueError: that names the file: it does not decode, or ends too early.
    """
    if _is_image(path):
        if frames != 1:
            raise ValueError(f"{path} is an image, which has one frame of the {frames} that a clip needs")
        with _open_image(path) as image:
            return np.asarray(_cover(_upright(image), size, 1.0))[None]
    times = start + np.arange(frames) / fps
    clip, done, until = np.empty((frames, *size[::-1], 3), np.uint8), 0, 0.0
    with _open_video(path) as (file, stream):
        for (_, frame), (until, _) in itertools.pairwise(_stamped(path, file, stream, start)):
            end = int(np.searchsorted(times, until - ROUNDED))
            if end > done:
                clip[done:end] = _picture(frame, size, _pixel_aspect(stream))
                done = end
            if done == frames:
                return clip
    raise ValueError(
        f"{path} ends at {until:.3f} s, and {frames} frames at {fps:g} per second from {start:.3f} s on need "
        f"{times[-1]:.3f} s: take fewer frames, or take it out of the folder"
    )


def read_image(path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
    """An image, uint8 [height, width, 3], RGB, scaled by bicubic interpolation to cover (width, height), whole pixels
    cut off around the middle: as the images of ImageNet are prepared. ValueError that names a file that is none."""
    with _open_image(path) as image:
        image = _upright(image)
        scale = max(wanted / side for wanted, side in zip(size, image.size, strict=True))
        width, height = (max(wanted, round(side * scale)) for wanted, side in zip(size, image.size, strict=True))
        left, top = (width - size[0]) // 2, (height - size[1]) // 2
        scaled = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(scaled.crop((left, top, left + size[0], top + size[1])))


def bucket_of(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) of `buckets` in which to put footage of another size.

    Of those whose aspect ratio is nearest, by its logarithm and within 5%: the largest that needs no enlargement, or
    the smallest if all do.
    """
    off = [abs(math.log(width / height * h / w)) for w, h in buckets]
    near = [bucket for bucket, much in zip(buckets, off, strict=True) if much <= min(off) + NEAR]
    fitting = [(w, h) for w, h in near if w <= width and h <= height]
    return max(fitting, key=math.prod) if fitting else min(near, key=math.prod)


def read_captions(folder: str | os.PathLike, names: Sequence[str], table: str | os.PathLike | None = None) -> list[str]:
    """The caption of every file, `names` relative to the folder: from name.txt beside it, or all from one table.

    table: .csv, .tsv or .jsonl with a column for the file, relative to the folder or whole, and one for the caption,
    named as in COLUMNS.

    Raises:
      ValueError: a file without caption or with an empty one, a caption without file, a file named twice.
    """
    place = as_path(folder)
    if table is None:
        places = {name: str(pathlib.PurePosixPath(name).with_suffix(".txt")) for name in names}
        there = {name for name in _names(place) if name.endswith(".txt")}
        _refuse(f"{folder}: captions that belong to no video or image", sorted(there - set(places.values())))
        _refuse(f"{folder}: no caption (a .txt beside it) for", [n for n in names if places[n] not in there])
        with futures.ThreadPoolExecutor(THREADS) as pool:
            captions = dict(zip(names, pool.map(lambda name: _text(place / places[name]), names), strict=True))
    else:
        rows = list(_rows(as_path(table), f"{place}/"))
        captions, known = dict(rows), set(names)
        if len(captions) < len(rows):
            seen: set[str] = set()
            _refuse(f"{table}: named twice", [name for name, _ in rows if name in seen or seen.add(name)])
        _refuse(f"{table}: not in {folder}", [name for name in captions if name not in known])
        _refuse(f"{table}: no caption for", [name for name in names if name not in captions])
    captions = {name: captions[name].strip() for name in names}
    _refuse(f"{table or folder}: the caption is empty of", [name for name in names if not captions[name]])
    return list(captions.values())


def _refuse(what: str, names: Sequence[str]) -> None:
    """ValueError that says how many there are and names the first, unless there are none."""
    if names:
        raise ValueError(f"{what} {', '.join(names[:3])}{', …' if len(names) > 3 else ''} ({len(names)} in all)")


def _names(folder, below: str = "") -> Iterator[str]:
    """Of videos, images and .txt files in a folder and those below; of an object store, too, none is asked after."""
    for path in (folder / below).iterdir():
        name = below + path.name
        if path.name.startswith("."):
            continue
        if name.lower().endswith((*VIDEOS, *IMAGES, ".txt")):
            yield name
        elif path.is_dir():
            yield from _names(folder, f"{name}/")


def _text(path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}") from None


def _rows(table, prefix: str) -> Iterator[tuple[str, str]]:
    """(file, caption) of the rows of a table; files without the prefix that they may have."""
    lines = io.StringIO(_text(table), newline="")
    if table.suffix == ".jsonl":
        rows = (_json_object(line, f"{table}, line {i}") for i, line in enumerate(lines, 1) if line.strip())
    elif table.suffix in (".csv", ".tsv"):
        rows = csv.DictReader(lines, delimiter="," if table.suffix == ".csv" else "\t")
    else:
        raise ValueError(f"{table} is no table of captions by its name: it must end in .csv, .tsv or .jsonl")
    for i, row in enumerate(rows, 1):
        file, caption = (next((row[name] for name in names if name in row), None) for names in COLUMNS.values())
        if not isinstance(file, str) or not isinstance(caption, str) or not file:
            wanted = " and one of ".join(", ".join(names) for names in COLUMNS.values())
            raise ValueError(f"{table}, row {i} has {', '.join(map(str, row))}; it must have text in one of {wanted}")
        yield pathlib.PurePosixPath(file.removeprefix(prefix)).as_posix(), caption


def _json_object(line: str, where: str) -> dict:
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        if isinstance(row := json.loads(line), dict):
            return row
    raise ValueError(f"{where} must be a JSON object with a file and a caption, got {line.strip():.100}")


def _is_image(path) -> bool:
    return os.fspath(path).lower().endswith(IMAGES)


@contextlib.contextmanager
def _open_image(path) -> Iterator[Image.Image]:
    """The image, not decoded yet; what goes wrong is a ValueError that names it."""
    with as_path(path).open("rb") as opened:
        try:
            with Image.open(opened) as image:
                yield image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    """The image in RGB, turned as its EXIF says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut at 255
        image = Image.fromarray(np.uint8(np.asarray(image, np.uint16) >> 8))
    return image.convert("RGB")


def _cover(image: Image.Image, size: tuple[int, int], aspect: float) -> Image.Image:
    """The middle of an image, as much as fits, in (width, height); aspect: width of its pixels by their height."""
    width, height = image.size
    scale = max(size[0] / (width * aspect), size[1] / height)
    across, down = min(size[0] / (scale * aspect), width), min(size[1] / scale, height)
    left, top = (width - across) / 2, (height - down) / 2
    return image.resize(size, Image.Resampling.LANCZOS, (left, top, left + across, top + down))


def _picture(frame, size: tuple[int, int], aspect: float) -> np.ndarray:
    """A frame of a video, uint8 [height, width, 3]."""
    quarters = _quarters(frame)
    width, height = size
    image = _cover(frame.to_image(), (height, width) if quarters % 2 else size, aspect)
    return np.rot90(np.asarray(image), quarters)


@contextlib.contextmanager
def _open_video(path) -> Iterator[tuple[Any, Any]]:
    """(file, video stream) of PyAV; what goes wrong is a ValueError that names the file."""
    av = require("av", "sample", "videos")
    lenient = {"metadata_errors": "replace"} if av.__version__ < "19" else {}  # from 19 on it always is
    with as_path(path).open("rb") as opened:
        try:
            with av.open(opened, **lenient) as file:
                stream = file.streams.best("video")
                if stream is None:
                    raise ValueError(f"{path} has no video in it: {REPAIR}")
                yield file, stream
        except av.FFmpegError as error:
            raise ValueError(f"{path} cannot be read as a video ({error.strerror}): {REPAIR}") from None


def _pixel_aspect(stream) -> float:
    """Width of a pixel by its height."""
    return float(stream.sample_aspect_ratio or 1)


def _quarters(frame) -> int:
    """Quarter turns, counterclockwise, by which a frame becomes upright."""
    return round(frame.rotation / 90) % 4


def _seconds(file, stream) -> float:
    """How long a video is. Containers that do not say so of the stream alone are searched for its last packets."""
    tick, end = float(stream.time_base), stream.duration
    if end is None:
        file.seek(file.duration or 0)
        frame = 1 / (float(stream.average_rate or 1) * tick)
        ends = [packet.pts + (packet.duration or frame) for packet in file.demux(stream) if packet.pts is not None]
        end = max(ends, default=0) - (stream.start_time or 0)
    return end * tick


def _stamped(path, file, stream, start: float) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) in order, the first at `start` or earlier where there is one; last (the end, None)."""
    counted = file.format.name == "avi"  # its time stamps are those of decoding, and its rate is constant
    tick, frame, end = float(stream.time_base), 1 / float(stream.average_rate or 1), 0.0
    for i, shown in enumerate(file.decode(stream) if counted else _decode_from(file, stream, start)):
        if shown.pts is None:
            raise ValueError(f"{path} has frames without a time: {REPAIR}")
        time = i * frame if counted else (shown.pts - (stream.start_time or 0)) * tick
        yield time, shown
        end = time + (shown.duration * tick or frame)
    yield end, None


def _decode_from(file, stream, start: float) -> Iterator:
    """The frames from a key frame on that is not after `start`."""
    zero, tick = stream.start_time or 0, float(stream.time_base)
    if start > AHEAD:
        file.seek(zero + int((start - AHEAD) / tick), stream=stream)
        frames = file.decode(stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and (first.pts - zero) * tick <= start:
            return itertools.chain([first], frames)
        file.seek(0)
    return file.decode(stream)

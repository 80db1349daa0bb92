"""Frames to files: videos and contact sheets."""

import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np

from rcm_jax.util.extras import require
from rcm_jax.util.files import write_whole

QUALITY = "18"  # x264's constant rate factor: hardly to be told from the original


def check_video() -> None:
    """ValueError if videos cannot be written here."""
    require("av", "sample", "videos")


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: int) -> None:
    """Writes frames, uint8 [h, w, 3] with even sides, as H.264 in an mp4, one by one as they come.

    `path` is the old file or the whole new one. ValueError for no frames.
    """
    av, frames = require("av", "sample", "videos"), iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: there are no frames to write")

    def write(temporary):
        with av.open(str(temporary), "w", format="mp4") as file:
            stream = file.add_stream("libx264", rate=fps, options={"crf": QUALITY})
            stream.height, stream.width = first.shape[:2]
            stream.pix_fmt = "yuv420p"
            for frame in itertools.chain([first], frames):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())

    write_whole(path, write)


def keep(frames: Iterable[np.ndarray], count: int, places: Sequence[float], into: list) -> Iterable[np.ndarray]:
    """The frames, `count` of them, as they come; those at places in 0..1 of their time go into a list as well."""
    wanted = [round(place * (count - 1)) for place in places]
    for i, frame in enumerate(frames):
        into += [frame] * wanted.count(i)
        yield frame

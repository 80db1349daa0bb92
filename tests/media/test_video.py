"""Videos that are written are videos that are read."""

import sys

import av
import numpy as np
import pytest

from rcm_jax.media import video


def test_a_video_is_read_again_frame_by_frame(tmp_path):
    frames = [np.full((32, 48, 3), 20 * i, np.uint8) for i in range(9)]
    video.write_video(tmp_path / "new" / "a.mp4", iter(frames), 16)
    with av.open(str(tmp_path / "new" / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.average_rate, stream.codec_context.name) == (16, "h264")
        seen = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(seen) == 9
    for ours, theirs in zip(frames, seen, strict=True):
        assert np.max(np.abs(ours.astype(int) - theirs)) < 6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]


def test_a_failure_while_frames_are_made_leaves_the_old_file(tmp_path):
    def frames():
        yield np.zeros((16, 16, 3), np.uint8)
        raise RuntimeError("no more memory")

    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="no more memory"):
        video.write_video(tmp_path / "a.mp4", frames(), 16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.mp4": b"old"}
    with pytest.raises(ValueError, match="there are no frames to write"):
        video.write_video(tmp_path / "a.mp4", [], 16)


def test_frames_for_a_sheet_are_kept_as_they_pass():
    kept = []
    assert list(video.keep(iter(range(5)), 5, (0, 0.5, 1), kept)) == [0, 1, 2, 3, 4]
    assert kept == [0, 2, 4]
    assert list(video.keep(["only"], 1, (0, 0.5, 1), kept)) and kept[3:] == ["only"] * 3


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"videos: av is not installed: pip install 'rcm-jax\[sample\]'"):
        video.check_video()

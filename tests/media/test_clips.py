"""Clips have the frames that are on screen, upright and undistorted; captions find their files; errors name files."""

import fractions
import json
import struct

import av
import numpy as np
import pytest
from PIL import Image

from rcm_jax.media import clips
from rcm_jax.media.clips import bucket_of, list_files, probe, read_captions, read_clip
from rcm_jax.util import extras

RED, GREEN, BLUE = (200, 30, 40), (30, 190, 60), (40, 60, 210)
SIDE = 64


def write(path, pictures, times=None, *, rate=10, codec="libx264", pixels="yuv420p", tick=1000, gop=250, change=None):
    """A video of pictures, [h, w, 3]; times: of each, in milliseconds."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, options={"crf": "5"} if codec == "libx264" else {})
        stream.height, stream.width = np.shape(pictures[0])[:2]
        stream.pix_fmt, stream.codec_context.gop_size = pixels, gop
        if times is not None:
            stream.codec_context.time_base = stream.time_base = fractions.Fraction(1, tick)
        stream.codec_context.bit_rate = 4_000_000
        if change:
            change(stream)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture, np.uint8), format="rgb24")
            if stream.codec_context.colorspace in (1, 5):
                frame = frame.reformat(format=pixels, dst_colorspace=stream.codec_context.colorspace)
            if times is not None:
                frame.pts, frame.time_base = times[i], fractions.Fraction(1, tick)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def plain(color, height=48, width=SIDE):
    return np.full((height, width, 3), color, np.uint8)


def greys(count):
    """Frame i in grey 10 + 5·i."""
    return [plain(10 + 5 * i) for i in range(count)]


def numbers(clip):
    """Of the frames of `greys`, as they are read again."""
    return [round((float(frame.mean()) - 10) / 5) for frame in clip]


def near(pixels, color):
    return np.abs(np.asarray(pixels, int) - color).max() < 25


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "libx264", "yuv444p"),
        ("a.mkv", "libx264", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.avi", "libx264", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.gif", "gif", "gray"),
        ("deep.mp4", "libx264", "yuv420p10le"),
        ("grey.mov", "png", "gray"),
        ("alpha.mkv", "ffv1", "yuva420p"),
    ],
)
def test_frames_of_a_constant_rate_from_any_start(tmp_path, name, codec, pixels):
    path = write(tmp_path / name, greys(40), codec=codec, pixels=pixels, gop=8)
    assert probe(path)[:2] == (SIDE, 48) and probe(path).seconds == pytest.approx(4, abs=0.002)
    assert numbers(read_clip(path, 0, 40, 10, (SIDE, 48))) == list(range(40))
    assert numbers(read_clip(path, 2.3, 5, 10, (SIDE, 48))) == [23, 24, 25, 26, 27]
    assert numbers(read_clip(path, 1.0, 4, 5, (32, 32))) == [10, 12, 14, 16]
    assert numbers(read_clip(path, 0, 5, 16, (32, 32))) == [0, 0, 1, 1, 2]
    assert numbers(read_clip(path, 3.9, 1, 16, (32, 32))) == [39]
    with pytest.raises(ValueError, match=rf"{name} ends at 4\.00. s, and 9 frames at 10 per second from 3\.500 s"):
        read_clip(path, 3.5, 9, 10, (SIDE, 48))


def test_of_a_variable_rate_the_frame_on_screen_is_taken(tmp_path):
    times = [0, 100, 150, 700, 1500, 1510, 2600, 3000]
    path = write(tmp_path / "a.mp4", greys(8), times)
    asked = np.arange(24) / 8
    expected = [max(i for i, time in enumerate(times) if time / 1000 <= at + 1e-6) for at in asked]
    assert numbers(read_clip(path, 0, 24, 8, (SIDE, 48))) == expected
    late = write(tmp_path / "late.mkv", greys(8), [time + 5000 for time in times])  # its first frame is at 5 s
    assert numbers(read_clip(late, 0, 24, 8, (SIDE, 48))) == expected
    assert numbers(read_clip(late, 1.5, 12, 8, (SIDE, 48))) == expected[12:]


def test_time_stamps_that_are_rounded_miss_no_frame(tmp_path):
    times = [round(1000 * i / 16 + 0.4) for i in range(30)]
    path = write(tmp_path / "a.mkv", greys(30), times)
    assert numbers(read_clip(path, 0, 30, 16, (SIDE, 48))) == list(range(30))


def test_only_what_a_clip_needs_is_decoded(tmp_path, monkeypatch):
    path, seen = write(tmp_path / "a.mp4", greys(45), gop=5), []
    picture = clips._picture
    monkeypatch.setattr(clips, "_picture", lambda frame, *rest: seen.append(frame.pts) or picture(frame, *rest))
    stamped = clips._stamped
    counted = []
    monkeypatch.setattr(clips, "_stamped", lambda *args: (counted.append(x) or x for x in stamped(*args)))
    assert numbers(read_clip(path, 3.5, 2, 10, (SIDE, 48))) == [35, 36]
    assert len(seen) == 2 and 3 <= len(counted) <= 3 + 15  # a key frame at least a second before, to frame 37


def test_where_a_search_finds_nothing_the_video_is_read_from_its_beginning(tmp_path):
    path = write(tmp_path / "a.ts", greys(40))  # one key frame, and no index
    assert numbers(read_clip(path, 3.5, 2, 10, (SIDE, 48))) == [35, 36]


def quartered(height=48, width=SIDE):
    """Red left, blue right; the lower half of the right is green."""
    picture = plain(RED, height, width)
    picture[:, width // 2 :] = BLUE
    picture[height // 2 :, width // 2 :] = GREEN
    return picture


# a, b, c, d of x' = a·x + c·y, y' = b·x + d·y with y downwards, and where the corners of `quartered` are then, by rows.
TURNS = {
    "clockwise": ((0, 1, -1, 0), [[RED, RED], [GREEN, BLUE]]),
    "counterclockwise": ((0, -1, 1, 0), [[BLUE, GREEN], [RED, RED]]),
    "upside down": ((-1, 0, 0, -1), [[GREEN, RED], [BLUE, RED]]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_videos_of_phones_are_turned_upright(tmp_path, turn):
    path, (matrix, corners) = write(tmp_path / "a.mp4", [quartered()] * 12), TURNS[turn]
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    a, b, c, d = (65536 * n for n in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    size = (SIDE, 48) if turn == "upside down" else (48, SIDE)
    assert probe(path)[:2] == size
    for start in (0, 1.1):
        (frame,) = read_clip(path, start, 1, 10, size)
        assert frame.shape == (size[1], size[0], 3)
        for y, row in zip((4, -4), corners, strict=True):
            for x, color in zip((4, -4), row, strict=True):
                assert near(frame[y, x], color), (turn, y, x)


def test_the_middle_is_kept_and_nothing_is_distorted(tmp_path):
    y, x = np.mgrid[:120, :200]
    picture = plain(RED, 120, 200)
    picture[(y - 60) ** 2 + (x - 100) ** 2 < 40**2] = BLUE  # a disc of radius 40 in the middle
    path = write(tmp_path / "a.mp4", [picture])
    for size, radius in (((100, 60), 20), ((60, 60), 20), ((100, 100), 100 / 3), ((240, 240), 80)):
        (frame,) = read_clip(path, 0, 1, 10, size)
        disc = frame[..., 2].astype(int) > frame[..., 0]
        for axis, side in ((0, size[0]), (1, size[1])):
            line = np.flatnonzero(disc.any(axis=axis))
            assert abs(len(line) - 2 * radius) <= 3 and abs(line.mean() - (side - 1) / 2) <= 1.5, (size, axis)


def test_pixels_that_are_not_square_become_square(tmp_path):
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = fractions.Fraction(2, 1)

    path = write(tmp_path / "a.mkv", [quartered()], change=wide)
    assert probe(path)[:2] == (2 * SIDE, 48)
    (frame,) = read_clip(path, 0, 1, 10, (48, 48))  # of 128 × 48, the middle: a quarter of the width on either side
    assert near(frame[4, :20], RED) and near(frame[4, 28:], BLUE)


@pytest.mark.parametrize("matrix", [1, 5])  # of BT.709 and BT.601
def test_colours_follow_the_matrix_that_the_file_names(tmp_path, matrix):
    def name(stream):
        stream.codec_context.colorspace = matrix

    path = write(tmp_path / "a.mp4", [plain(GREEN)], change=name)
    np.testing.assert_allclose(read_clip(path, 0, 1, 10, (SIDE, 48))[0, 20, 20], GREEN, atol=5)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp", "a.bmp", "a.tiff"])
def test_images_are_videos_of_one_frame(tmp_path, name):
    Image.fromarray(quartered()).save(tmp_path / name)
    assert probe(tmp_path / name) == (SIDE, 48, None)
    clip = read_clip(tmp_path / name, 0, 1, 16, (SIDE, 48))
    assert (clip.shape, clip.dtype) == ((1, 48, SIDE, 3), np.uint8)
    assert near(clip[0, 4, 4], RED) and near(clip[0, 4, -4], BLUE) and near(clip[0, -4, -4], GREEN)
    with pytest.raises(ValueError, match=rf"{name} is an image, which has one frame of the 5"):
        read_clip(tmp_path / name, 0, 5, 16, (SIDE, 48))


def test_grey_palettes_alpha_and_sixteen_bits_become_rgb(tmp_path):
    grey = np.linspace(0, 255, 48 * SIDE).astype(np.uint8).reshape(48, SIDE)
    for mode in ("L", "LA", "P", "RGBA", "I;16"):
        image = Image.fromarray(np.uint16(grey) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
        image.save(tmp_path / "a.png")
        (frame,) = read_clip(tmp_path / "a.png", 0, 1, 16, (SIDE, 48))
        np.testing.assert_array_equal(frame, grey[..., None].repeat(3, axis=-1), mode)


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(quartered()).save(tmp_path / "a.png", exif=exif)
    assert probe(tmp_path / "a.png") == (48, SIDE, None)
    (frame,) = read_clip(tmp_path / "a.png", 0, 1, 16, (48, SIDE))
    assert near(frame[4], RED) and near(frame[-4, 4], GREEN) and near(frame[-4, -4], BLUE)


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = write(tmp_path / "whole.mp4", greys(30)).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("text.mp4", "text.png", "empty.mkv"):
        (tmp_path / name).write_text("no video" if "text" in name else "")
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    for read in (probe, lambda path: read_clip(path, 0, 1, 16, (32, 32))):
        for name in ("half.mp4", "text.mp4", "empty.mkv"):
            with pytest.raises(ValueError, match=rf"{name} cannot be read as a video .*: write it anew"):
                read(tmp_path / name)
        with pytest.raises(ValueError, match=r"text\.png cannot be read as an image"):
            read(tmp_path / "text.png")
        with pytest.raises(ValueError, match=r"sound\.mp4 has no video in it"):
            read(tmp_path / "sound.mp4")
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.mp4")


def test_a_title_in_another_encoding_does_no_harm(tmp_path):
    path = write(tmp_path / "a.mp4", greys(3), change=lambda stream: stream.container.metadata.update(title="QQQQ"))
    data = path.read_bytes()
    assert b"QQQQ" in data
    path.write_bytes(data.replace(b"QQQQ", b"\xff\xfe\xe9Q"))
    assert probe(path)[:2] == (SIDE, 48) and numbers(read_clip(path, 0, 3, 10, (SIDE, 48))) == [0, 1, 2]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(extras.importlib.sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"av is not installed: pip install 'rcm-jax\[sample\]'"):
        probe(tmp_path / "a.mp4")


BUCKETS = ((832, 480), (480, 832), (624, 624), (1280, 720))


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1920, 1080), (1280, 720)),
        ((1280, 720), (1280, 720)),
        ((1000, 562), (832, 480)),  # as good a ratio, and nothing is enlarged
        ((320, 180), (832, 480)),  # enlarged as little as can be
        ((1080, 1920), (480, 832)),
        ((700, 650), (624, 624)),
        ((3000, 500), (832, 480)),
    ],
)
def test_the_bucket_of_a_size(size, bucket):
    assert bucket_of(*size, BUCKETS) == bucket


@pytest.fixture
def folder(tmp_path):
    """With a.mp4, sub/b.mp4 and sub/c.png, and what is no footage."""
    for name in ("a.mp4", "sub/b.mp4", "sub/c.png", "sub/.hidden.mp4", ".cache/d.mp4", "notes.md"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"")
    return tmp_path / "set"


NAMES = ["a.mp4", "sub/b.mp4", "sub/c.png"]


def test_files_are_listed_in_order(folder, tmp_path):
    assert list_files(folder) == NAMES
    with pytest.raises(ValueError, match="is no folder"):
        list_files(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no video or image: they end in \.mp4"):
        list_files(tmp_path / "empty")


def test_captions_beside_their_files(folder):
    for name in NAMES:
        (folder / name).with_suffix(".txt").write_text(f"\ufeffé {name}\n", encoding="utf-8")
    assert read_captions(folder, NAMES) == [f"é {name}" for name in NAMES]
    (folder / "sub/b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"set: the caption is empty of sub/b\.mp4 \(1 in all\)"):
        read_captions(folder, NAMES)
    (folder / "sub/b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"b\.txt is not in UTF-8"):
        read_captions(folder, NAMES)
    (folder / "a.txt").unlink()
    (folder / "sub/b.txt").unlink()
    with pytest.raises(ValueError, match=r"no caption \(a \.txt beside it\) for a\.mp4, sub/b\.mp4 \(2 in all\)"):
        read_captions(folder, NAMES)
    (folder / "sub/other.txt").write_text("x")
    with pytest.raises(ValueError, match=r"captions that belong to no video or image sub/other\.txt \(1 in all\)"):
        read_captions(folder, NAMES)


def table(path, header, rows):
    """Rows as a .csv, .tsv or .jsonl."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    else:
        cut = "," if path.suffix == ".csv" else "\t"
        path.write_text("".join(cut.join(f'"{cell}"' for cell in row) + "\n" for row in [header, *rows]))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("header", [("file_name", "text"), ("video", "caption"), ("prompt", "path")])
def test_captions_in_a_table(folder, tmp_path, suffix, header):
    rows = [(name, f"of {name},\n\u2028two lines") for name in reversed(NAMES)]
    rows[0] = (f"{folder}/{rows[0][0]}", rows[0][1])
    rows[1] = (f"./{rows[1][0]}", rows[1][1])
    if header[0] == "prompt":
        rows = [row[::-1] for row in rows]
    path = table(tmp_path / f"captions{suffix}", header, rows)
    assert read_captions(folder, NAMES, path) == [f"of {name},\n\u2028two lines" for name in NAMES]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a.mp4", "x")], r"captions\.csv: no caption for sub/b\.mp4, sub/c\.png \(2 in all\)"),
        ([(n, "x") for n in [*NAMES, "a.mp4"]], r"captions\.csv: named twice a\.mp4 \(1 in all\)"),
        ([(n, "x") for n in [*NAMES, "z1", "z2", "z3", "z4"]], r"csv: not in .*set z1, z2, z3, … \(4 in all\)"),
        ([(n, n[4:]) for n in NAMES], r"captions\.csv: the caption is empty of"),
        ([("", "x")], r"captions\.csv, row 1 has file, caption; it must have text in one of path, file"),
    ],
)
def test_tables_that_do_not_fit_the_folder_are_refused(folder, tmp_path, rows, message):
    if "empty" in message:
        rows = [(name, " " if name == "a.mp4" else "x") for name in NAMES]
    with pytest.raises(ValueError, match=message):
        read_captions(folder, NAMES, table(tmp_path / "captions.csv", ("file", "caption"), rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "name,caption\na.mp4,x\n", r"c\.csv, row 1 has name, caption; it must have text in one of path"),
        ("c.csv", "file,caption\na.mp4\n", "row 1 has file, caption"),
        (
            "c.jsonl",
            '{"file": "a.mp4", "text": "x"}\n{"file": \n',
            r'c\.jsonl, line 2 must be a JSON object with .*, got {"file":$',
        ),
        ("c.jsonl", '["a.mp4", "x"]\n', r"line 1 must be a JSON object with a file and a caption, got \["),
        ("c.jsonl", '{"file": "a.mp4", "text": ["x"]}\n', "row 1 has file, text; it must have text"),
        ("c.xlsx", "", r"c\.xlsx is no table of captions by its name: it must end in \.csv, \.tsv or \.jsonl"),
    ],
)
def test_tables_of_another_form_are_refused(folder, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captions(folder, NAMES, tmp_path / name)

"""A folder of videos and images becomes items and examples: which, of which shape, and what is encoded."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import wan_1_3b
from rcm_jax import convert
from rcm_jax.build.videos import videos
from rcm_jax.convert.files import open_tensors, write_tensors
from rcm_jax.media import clips, vae
from rcm_jax.media.clip import clip_features
from rcm_jax.media.first_frame import first_frame
from rcm_jax.media.video import write_video
from rcm_jax.util.config import revise
from tests import clip_vision, tiny
from tests.latents import write_vae

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
RUN = wan_1_3b.tiny(wan_1_3b.EXPERIMENT)  # x0 [2, 4, 6, 4]: 5 frames of 48×32
I2V = revise(RUN, {"model": revise(RUN.model, {"model_type": "i2v", "in_dim": 12})})
TALL = (32, 48)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vae.safetensors"
    write_vae(path, RUN.media.vae)
    return path


@pytest.fixture
def folder(tmp_path):
    """A wide video of 20 frames, in a folder below a tall one of 9 frames, both of 16 frames per second."""
    rng = np.random.default_rng(0)
    for name, count, size in (("wide.mp4", 20, (64, 96, 3)), ("sub/tall.mp4", 9, (96, 64, 3))):
        frames = [np.full(size, rng.integers(0, 256, 3), np.uint8) for _ in range(count)]
        write_video(tmp_path / "set" / name, frames, 16)
        (tmp_path / "set" / name).with_suffix(".txt").write_text(f"of {name}")
    return tmp_path / "set"


def table(source):
    return [(item.key, item.prompt, item.shape) for item in source.items]


def test_clips_follow_each_other_by_path_and_time(folder, weights):
    source = videos(RUN, weights, folder, clips=10)
    wide, tall = (2, 4, 6, 4), "of sub/tall.mp4"
    assert table(source) == [
        ("sub/tall.mp4@0.000s", tall, wide),  # 9 frames: a clip of 5, and 4 that are left
        ("wide.mp4@0.000s", "of wide.mp4", wide),
        ("wide.mp4@0.312s", "of wide.mp4", wide),
        ("wide.mp4@0.625s", "of wide.mp4", wide),
        ("wide.mp4@0.938s", "of wide.mp4", wide),  # to the very last frame
    ]
    assert [item.origin for item in source.items][2] == {"file": "wide.mp4", "start": 5 / 16}
    assert len(videos(RUN, weights, folder).items) == 2
    assert source.batch == 1 and not source.brings_text
    shapes = [item.shape for item in videos(RUN, weights, folder, buckets=[(48, 32), TALL], clips=1).items]
    assert shapes == [(2, 6, 4, 4), (2, 4, 6, 4)]
    assert len(videos(RUN, weights, folder, fps=4, frames=1, clips=10).items) == 3 + 5
    (folder / "sub/other.mp4").write_bytes((folder / "wide.mp4").read_bytes())
    (folder / "sub/other.txt").write_text("again")
    assert [item.key[:9] for item in videos(RUN, weights, folder).items] == ["sub/other", "sub/tall.", "wide.mp4@"]


def test_an_example_is_the_encoded_clip(folder, weights):
    source = videos(RUN, weights, folder, clips=2, buckets=[(48, 32), TALL])
    params = convert.from_reference("wan_vae", open_tensors(weights), RUN.media.vae)
    for item, size in zip(source.items, (TALL, (48, 32), (48, 32)), strict=True):
        pixels = source.prepare(item)
        start = item.origin["start"]
        np.testing.assert_array_equal(pixels, clips.read_clip(folder / item.origin["file"], start, 5, 16, size))
        (example,) = source.make([item], [pixels], np.zeros((1, 6, 8)))
        assert list(example) == ["x0"] and (example["x0"].shape, example["x0"].dtype) == (item.shape, np.float32)
        expected = vae.encode(RUN.media.vae, params, np.float32(pixels[None]) / 127.5 - 1)[0]
        np.testing.assert_allclose(example["x0"], expected, rtol=1e-5, atol=1e-5)
    first, second = (source.make([item], [source.prepare(item)], None)[0]["x0"] for item in source.items[1:])
    assert np.abs(first - second).max() > 0.01


def test_the_condition_of_image_to_video_comes_from_the_clips_first_frame(folder, weights):
    source = videos(I2V, weights, folder, first_frame=True)
    item = source.items[1]
    pixels = source.prepare(item)
    (example,) = source.make([item], [pixels], None)
    params = convert.from_reference("wan_vae", open_tensors(weights), RUN.media.vae)
    expected = first_frame(RUN.media.vae, params, np.float32(pixels[0]) / 127.5 - 1, 2)
    assert sorted(example) == ["x0", "y"] and example["y"].shape == (2, 4, 6, 8)
    np.testing.assert_allclose(example["y"], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"beside text this network takes y \[2, 4, 6, 8\], but this set has nothing"):
        videos(I2V, weights, folder)
    with pytest.raises(ValueError, match=r"takes nothing, but this set has y"):
        videos(RUN, weights, folder, first_frame=True)


def test_the_features_of_clip_are_of_the_clips_first_frame(folder, weights, tmp_path):
    clip_params = clip_vision.random_params()
    write_tensors(tmp_path / "clip", convert.to_reference("clip_vision", clip_params, clip_vision.TINY, "official"))
    media = revise(I2V.media, {"image_encoder": clip_vision.TINY})
    run = revise(I2V, {"model": revise(I2V.model, {"clip_dim": 8}), "media": media})
    options = dict(first_frame=True, clip=tmp_path / "clip")
    source = videos(run, weights, folder, **options)
    item = source.items[1]
    pixels = source.prepare(item)
    (example,) = source.make([item], [pixels], None)
    assert sorted(example) == ["clip_features", "x0", "y"]
    expected = clip_features(clip_vision.TINY, clip_params, np.float32(pixels[:1]) / 127.5 - 1)
    assert example["clip_features"].shape == (257, 8)
    np.testing.assert_allclose(example["clip_features"], expected[0], rtol=1e-5, atol=1e-5)
    assert source.settings["clip_bytes"] == sum(path.stat().st_size for path in (tmp_path / "clip").iterdir())
    assert "clip" not in videos(I2V, weights, folder, first_frame=True).settings
    with pytest.raises(ValueError, match=r"but this set has y \[2, 4, 6, 8\]; .*CLIP's features of it are --clip"):
        videos(run, weights, folder, first_frame=True)
    with pytest.raises(ValueError, match=r"takes nothing, but this set has clip_features \[257, 8\]"):
        videos(revise(RUN, {"media": media}), weights, folder, **options | {"first_frame": False})
    with pytest.raises(ValueError, match=r"no media\.image_encoder: its network takes no clip_features"):
        videos(RUN, weights, folder, **options)
    with pytest.raises(ValueError, match="are no clip_vision of this config"):
        videos(run, weights, folder, **options | {"clip": weights})


def test_images_and_a_table_of_captions(tmp_path, weights):
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (96, 64), (200, 10, 30)).save(tmp_path / name)
    (tmp_path / "all.csv").write_text("image,caption\na.jpg,first\nb.png,second\n")
    run = revise(RUN, {"data.shape": (1, 4, 6, 4)})
    for source in (
        videos(run, weights, tmp_path, captions=tmp_path / "all.csv", clips=3),
        videos(RUN, weights, tmp_path, captions=tmp_path / "all.csv", frames=1),
    ):
        assert table(source) == [("a.jpg", "first", (1, 4, 6, 4)), ("b.png", "second", (1, 4, 6, 4))]
        (example,) = source.make(source.items[:1], [source.prepare(source.items[0])], None)
        assert example["x0"].shape == (1, 4, 6, 4)
    found = videos(RUN, weights, tmp_path, captions=tmp_path / "all.csv")
    assert not found.items and "a.jpg is an image, and 5 frames" in found.bad["a.jpg"]


def test_settings_tell_all_that_decides_the_content(folder, weights):
    options = dict(fps=8, frames=5, buckets=[(48, 32)], clips=1, tile=None)
    known = videos(RUN, weights, folder, **options).settings
    assert known == json.loads(json.dumps(known))
    assert videos(RUN, str(weights), folder, **options).settings == known
    for change in (dict(fps=16), dict(frames=1), dict(buckets=[TALL]), dict(clips=2), dict(tile=2)):
        assert videos(RUN, weights, folder, **options | change).settings != known, change
    assert videos(I2V, weights, folder, **options, first_frame=True).settings != known
    assert known["vae_bytes"] == sum(path.stat().st_size for path in weights.iterdir())


def test_files_that_cannot_be_used_are_bad(folder, weights):
    for name in ("broken.mp4", "broken2.mp4", "broken3.mkv"):
        (folder / name).write_text("no video")
        (folder / name).with_suffix(".txt").write_text("x")
    found = videos(RUN, weights, folder, frames=13)
    assert {item.origin["file"] for item in found.items} == {"wide.mp4"}
    assert sorted(found.bad) == ["broken.mp4", "broken2.mp4", "broken3.mkv", "sub/tall.mp4"]
    assert "broken2.mp4 cannot be read as a video" in found.bad["broken2.mp4"]
    assert "tall.mp4 has 0.562 s, and 13 frames at 16 per second take 0.750 s: " in found.bad["sub/tall.mp4"]
    for path in folder.glob("broken*"):
        path.unlink()
    (folder / "wide.txt").unlink()
    with pytest.raises(ValueError, match=r"no caption \(a \.txt beside it\) for wide\.mp4"):
        videos(RUN, weights, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(frames=6), r"6 frames must be 1 \+ 4n: nearest are 5 and 9"),
        (dict(buckets=[(50, 32)]), r"width 50 must be a multiple of 16: nearest are 48 and 64"),
        (dict(fps=0), r"fps 0 must be above 0, and clips 1 at least 1"),
        (dict(clips=0), "clips 0 at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(folder, weights, changes, message):
    with pytest.raises(ValueError, match=message):
        videos(RUN, weights, folder, **changes)


def test_weights_of_something_else_are_refused_before_any_file_is_looked_at(folder, tmp_path):
    write_vae(tmp_path / "other", revise(RUN.media.vae, {"dim": 8}))
    (folder / "wide.mp4").write_text("no video")
    with pytest.raises(ValueError, match="shape"):
        videos(RUN, tmp_path / "other", folder)
    with pytest.raises(ValueError, match="name a config with media"):
        videos(revise(RUN, {"media": None}), tmp_path / "other", folder)

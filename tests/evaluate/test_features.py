"""Features of sets: the same on any devices and in any batches, and from files; videos; what is refused."""

import pickle
import zipfile

import jax
import numpy as np
import pytest

from rcm_jax import convert
from rcm_jax.convert.files import write_tensors
from rcm_jax.evaluate import extractors, features, inputs, quality
from rcm_jax.evaluate.frechet import frechet_distance
from rcm_jax.media.picture import save_png
from rcm_jax.media.video import write_video
from rcm_jax.models import efficientnet
from rcm_jax.models.efficientnet import EfficientNetConfig
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from tests import tiny

TINY = EfficientNetConfig(stages=((1, 3, 1, 1, 4),), stem=4, head=8, logits=3, size=8)
ALL = ("frechet", "precision", "recall", "density", "coverage")


def images(n: int, seed: int = 0, sides=(6, 8), c: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *sides, c), np.uint8)


@pytest.fixture(scope="module")
def pixels():
    return extractors.open_extractor("pixels")


def extract(opened, path, devices=8, **options):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    clips = path if isinstance(path, inputs.Clips) else inputs.open_clips(path)
    return features.extract(opened, clips, mesh, **options)


def save_images(folder, x, suffix=".png"):
    for i, image in enumerate(x):
        save_png(folder / f"{i:03}{suffix}", image)
    return folder


def test_statistics_are_those_of_all_images_on_any_devices_and_in_any_batches(tmp_path, pixels):
    x = images(21)
    np.save(tmp_path / "x.npy", x)
    expected = np.asarray(pixels.apply({}, x)["features"], np.float64)
    for devices, batch in ((8, 1), (8, 32), (2, 5), (1, 32)):
        found = extract(pixels, tmp_path / "x.npy", devices, batch=batch).views["images"]
        assert found.count == 21
        np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.mean, found.features.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(found.features.T.astype(np.float64)), atol=1e-12)


def test_features_are_kept_where_they_are_few_or_asked_for(tmp_path, pixels):
    np.save(tmp_path / "x.npy", images(200))
    alone, kept = (extract(pixels, tmp_path / "x.npy", keep=keep).views["images"] for keep in (False, True))
    assert alone.features is None and kept.features.dtype == np.float32 and kept.features.shape == (200, 192)
    a, b = alone.gaussian(), kept.gaussian()
    np.testing.assert_allclose(a.factor.T @ a.factor, b.factor.T @ b.factor, atol=1e-12)


def test_folders_zips_and_arrays_hold_the_same(tmp_path, pixels):
    x = images(5)
    folder = save_images(tmp_path / "folder/below", x).parent
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.name)
    np.savez(tmp_path / "x.npz", arr_0=x, labels=np.arange(5))
    np.save(tmp_path / "x.npy", x)
    found = [extract(pixels, p).views["images"].mean for p in (folder, *sorted(tmp_path.glob("x.*")))]
    assert len(found) == 4
    for mean in found[1:]:
        np.testing.assert_array_equal(mean, found[0])
    np.save(tmp_path / "grey.npy", x[..., :1])
    grey = inputs.open_clips(tmp_path / "grey.npy").batch(0, 8, make_mesh(MeshConfig()))
    assert grey.shape == (8, 1, 6, 8, 3) and np.array_equal(grey[5:], grey[:3])
    np.testing.assert_array_equal(grey[:5, 0], np.repeat(x[..., :1], 3, axis=-1))


def test_some_files_are_chosen_by_the_seed(tmp_path):
    np.save(tmp_path / "x.npy", np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 2, 2, 1)))
    mesh = make_mesh(MeshConfig())
    chosen = [np.asarray(inputs.open_clips(tmp_path / "x.npy", 8, s).batch(0, 8, mesh))[:, 0, 0, 0, 0] for s in (0, 1)]
    assert len({*chosen[0].tolist()}) == 8 and not np.array_equal(*chosen)
    with pytest.raises(ValueError, match="holds 40, but 41 samples"):
        inputs.open_clips(tmp_path / "x.npy", 41)


def test_videos_are_seen_as_frames_and_as_differences(tmp_path, pixels):
    still = np.full((4, 16, 16, 3), 90, np.uint8)
    moving = np.arange(0, 240, 60, dtype=np.uint8)[:, None, None, None] + np.zeros((4, 16, 16, 3), np.uint8)
    for name, x in (("still", still), ("moving", moving)):
        write_video(tmp_path / f"{name}.mp4", x, 8)
    found = extract(pixels, tmp_path)
    assert found.counts == features.counts_of(inputs.open_clips(tmp_path)) == {"frames": 8, "frame differences": 6}
    differences = found.views["frame differences"].features
    np.testing.assert_allclose(differences[3:], 0.5, atol=0.02)  # "still" comes after "moving"
    np.testing.assert_allclose(differences[:3], (60 + 255) / 2 / 255, atol=0.02)
    np.save(tmp_path / "x.npy", np.stack([moving, still]))
    array = extract(pixels, tmp_path / "x.npy").views["frames"]
    np.testing.assert_allclose(array.mean, found.views["frames"].mean, atol=0.02)  # but for the codec
    save_png(tmp_path / "a.png", still[0])
    with pytest.raises(ValueError, match="1 images and 2 videos"):
        inputs.open_clips(tmp_path)


def test_what_is_cached_measures_as_the_images_do(tmp_path, pixels):
    for name, seed in (("a", 0), ("b", 1)):
        np.save(tmp_path / f"{name}.npy", images(30, seed))
    a, b = (extract(pixels, tmp_path / f"{name}.npy", keep=True) for name in "ab")
    asked = quality.Asked(ALL)
    measured = quality.measure(asked, a, b)
    expected = frechet_distance(a.views["images"].features, b.views["images"].features)
    assert measured["images"]["Fréchet distance (pixels)"] == pytest.approx(expected, rel=1e-12)
    assert set(measured["images"]) == {"Fréchet distance (pixels)", *ALL[1:]}
    features.save(tmp_path / "full.npz", b, features=True)
    assert quality.measure(asked, a, features.load(tmp_path / "full.npz")) == measured
    features.save(tmp_path / "small.npz", b, features=False)
    small = features.load(tmp_path / "small.npz")
    assert small.views["images"].features is None and small.source == str(tmp_path / "b.npy")
    found = quality.measure(quality.Asked(("frechet",)), a, small)["images"]["Fréchet distance (pixels)"]
    assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="make it again with --save_features"):
        quality.check_reference(asked, pixels, small)


def test_statistics_of_nvlabs_are_those_of_inception(tmp_path):
    mu, sigma = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    (tmp_path / "edm2.pkl").write_bytes(
        pickle.dumps({"num_images": 9, "fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu, "sigma": sigma}})
    )
    for name in ("edm.npz", "edm2.pkl"):
        found = features.load(tmp_path / name)
        assert found.extractor == "inception" and found.checksum == ""
        np.testing.assert_array_equal(found.views["images"].gaussian().factor, sigma)
        np.testing.assert_array_equal(found.views["images"].mean, mu)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(zipfile.ZipFile))
    with pytest.raises(ValueError, match=r"bad\.pkl is no pickle of arrays.*zipfile\.ZipFile"):
        features.load(tmp_path / "bad.pkl")
    (tmp_path / "bad.pkl").write_bytes(b"\x80\x04" + b"]" * 10**6 + b".")  # a list in a list in a list …
    with pytest.raises(ValueError, match=r"bad\.pkl is no pickle of arrays"):
        features.load(tmp_path / "bad.pkl")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fid": {"mu": np.zeros(2, object), "sigma": np.zeros((2, 2))}}))
    with pytest.raises(ValueError, match=r"bad\.pkl is no pickle of arrays"):
        features.load(tmp_path / "bad.pkl")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fd_dinov2": {}}))
    with pytest.raises(ValueError, match="no mu and sigma"):
        features.load(tmp_path / "bad.pkl")


def test_a_network_is_opened_from_its_published_names(tmp_path, monkeypatch):
    params = tiny.random_params(efficientnet.NETWORK.init, TINY)
    params = jax.tree_util.tree_map_with_path(lambda path, a: abs(a) + 0.5 if path[-1].key == "var" else a, params)
    tensors = convert.to_reference("efficientnet", params, TINY, "pytorch")
    write_tensors(tmp_path / "w", {name: np.asarray(tensor) for name, tensor in tensors.items()})
    record = extractors.EXTRACTORS["efficientnet-lite0"]
    function = extractors._applied(efficientnet.NETWORK, TINY)
    monkeypatch.setitem(extractors.EXTRACTORS, "tiny", record._replace(function=function, config=TINY))
    opened = extractors.open_extractor("tiny", tmp_path / "w")
    assert len(opened.checksum) == 64
    np.save(tmp_path / "x.npy", images(4, sides=(8, 8)))
    found = extract(opened, tmp_path / "x.npy").views["images"]
    expected = efficientnet.EfficientNet(TINY).apply({"params": params}, images(4, sides=(8, 8)))
    np.testing.assert_allclose(found.features, expected["features"], rtol=1e-4, atol=1e-5)
    tensors["_fc.bias"] = tensors["_fc.bias"] + 1
    write_tensors(tmp_path / "v", {name: np.asarray(tensor) for name, tensor in tensors.items()})
    other = extractors.open_extractor("tiny", tmp_path / "v")
    with pytest.raises(ValueError, match="other weights of tiny"):
        asked = quality.Asked(("frechet",))
        quality.check_reference(asked, other, features.Features({}, "tiny", opened.checksum, "r"))


def test_bad_files(tmp_path, pixels):
    with pytest.raises(FileNotFoundError, match="none: no such file"):
        inputs.open_clips(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        inputs.open_clips(tmp_path / "empty")
    (tmp_path / "x.txt").write_text("no")
    with pytest.raises(ValueError, match="no folder"):
        inputs.open_clips(tmp_path / "x.txt")
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 4, 3)))
    with pytest.raises(ValueError, match="float64"):
        inputs.open_clips(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    assert features.load(tmp_path / "x.npz") is None
    with pytest.raises(ValueError, match="one array"):
        inputs.open_clips(tmp_path / "x.npz")
    folder = save_images(tmp_path / "sizes", images(3))
    save_png(folder / "z.png", images(1, sides=(5, 8))[0])
    with pytest.raises(ValueError, match=r"z\.png is 8×5, 1 frame.*the first 8×6.*one size"):
        extract(pixels, folder)
    (folder / "z.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"z\.png cannot be read"):
        extract(pixels, folder)
    np.save(tmp_path / "one.npy", images(1))
    with pytest.raises(ValueError, match="at least 2"):
        extract(pixels, tmp_path / "one.npy")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (("fid",), "ask for --metrics=frechet"),
        (("inception_score",), "takes the logits of inception"),
        (("best",), "--metrics=best"),
        ((), "choose of fid"),
    ],
)
def test_metrics_that_there_are_not(pixels, metrics, message):
    with pytest.raises(ValueError, match=message):
        quality.check(quality.Asked(metrics), pixels)


def test_references_that_do_not_fit(tmp_path, pixels):
    np.save(tmp_path / "x.npy", images(5))
    found, asked = extract(pixels, tmp_path / "x.npy"), quality.Asked(ALL, k=5)
    for counts, message in (
        ({"frames": 9}, "is of images, but the samples are looked at by frames"),
        ({"images": 9}, "k = 5 neighbours need 6 images on both sides, there are 5"),
    ):
        with pytest.raises(ValueError, match=message):
            quality.check_counts(asked, counts, found.counts)
    with pytest.raises(ValueError, match="r has features of inception, not of pixels"):
        quality.check_reference(asked, pixels, features.Features({}, "inception", "", "r"))
    for name, weights, message in (
        ("vgg", None, "'vgg' is none of inception"),
        ("inception", None, "inception needs its published weights"),
        ("pixels", "x", "pixels has no weights"),
    ):
        with pytest.raises(ValueError, match=message):
            extractors.open_extractor(name, weights)


def test_inception_scores_are_reported_of_logits():
    logits = np.tile(1e3 * np.eye(5), (4, 1)).astype(np.float32)
    statistics = features.Statistics(20, np.zeros(2), np.eye(2), logits=logits)
    asked = quality.Asked(("inception_score",), splits=1)
    assert asked.logits and not asked.reference and not asked.features
    found = quality.measure(asked, features.Features({"images": statistics}, "inception", "", ""), None)
    assert found == {"images": {"inception score": pytest.approx(5), "its deviation": 0}}

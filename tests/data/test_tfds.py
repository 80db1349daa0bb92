"""Images of TFDS: what was prepared is read, without TensorFlow; what is missing is told with the way to it."""

import re
import subprocess
import sys
from concurrent import futures

import numpy as np
import pytest

from rcm_jax import data
from rcm_jax.data import TfdsConfig
from rcm_jax.data.dataset import batches
from rcm_jax.evaluate import arrays, report
from rcm_jax.util.files import as_path, upload
from tests.tfds_images import CLASSES, pixels, prepare

SHAPE = (8, 6, 3)
TRAIN, TEST = 50, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"), {"train": TRAIN, "test": TEST}, SHAPE)


def load(folder, name="tiny", **others):
    return data.load(TfdsConfig(name, str(folder), **others))


def numbers(images):
    """Which of the images that were written x0 [n, h, w, c] are, by their pixels."""
    known = {pixels(i, SHAPE).tobytes(): i for i in range(TRAIN + TEST)}
    return [known[np.round((x0 * 0.5 + 1) * 127.5).astype(np.uint8).tobytes()] for x0 in images]


def test_images_are_read_as_they_were_prepared(folder):
    dataset = load(folder, test="test")
    assert (len(dataset.train), len(dataset.test)) == (TRAIN, TEST)
    assert (dataset.view, dataset.num_classes, dataset.sample_shape) == ("grid", CLASSES, SHAPE)
    assert dataset.uncond == {"label": CLASSES}
    whole = dataset.train[np.arange(TRAIN)]
    found = numbers(whole["x0"])
    assert sorted(found) == list(range(TRAIN))
    np.testing.assert_array_equal(whole["cond"]["label"], np.array(found) % CLASSES)
    assert (whole["x0"].dtype, whole["cond"]["label"].dtype) == (np.float32, np.int32)
    assert sorted(numbers(dataset.test[np.arange(TEST)]["x0"])) == list(range(TRAIN, TRAIN + TEST))
    some = dataset.train[np.array([7, 0, 7])]
    np.testing.assert_array_equal(some["x0"], whole["x0"][[7, 0, 7]])


def test_pixels_are_scaled_by_sigma_data_and_back(folder):
    for sigma in (0.5, 0.25):
        dataset = load(folder, sigma_data=sigma)
        batch = dataset.train[np.arange(5)]["x0"]
        image = np.stack([pixels(i, SHAPE) for i in numbers(batch * sigma / 0.5)])
        np.testing.assert_allclose(batch, (image / 127.5 - 1) / sigma, atol=1e-5)
        np.testing.assert_allclose(dataset.to_image(batch), image / 255, atol=1e-6)
    assert dataset.to_image(np.full((1, 2), 9.0)).max() == 1


def test_splits_may_be_parts_and_held_out_data_may_lack(folder):
    assert len(load(folder, train="train[:20%]").train) == TRAIN // 5
    assert len(load(folder, test="test[3:]").test) == TEST - 3
    assert load(folder).test is None
    with pytest.raises(ValueError, match=r"tiny has no split validation\[:5\], but train, test: set config.data.test"):
        load(folder, test="validation[:5]")


def test_threads_read_what_one_reads(folder):
    source = load(folder).train
    rows = [np.random.default_rng(i).integers(0, TRAIN, 8) for i in range(40)]
    with futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda batch: load(folder).train[batch] if batch[0] % 9 == 0 else source[batch], rows))
    for got, batch in zip(together, rows, strict=True):
        np.testing.assert_array_equal(got["x0"], source[batch]["x0"])


def test_the_stream_is_that_of_the_same_images_in_memory(folder):
    source = load(folder).train
    streams = batches(source, 8, seed=1), batches(source[np.arange(TRAIN)], 8, seed=1)
    for _ in range(10):
        ours, memory = (next(stream) for stream in streams)
        np.testing.assert_array_equal(ours["x0"], memory["x0"])
        np.testing.assert_array_equal(ours["cond"]["label"], memory["cond"]["label"])


def test_reports_read_no_more_of_a_source_than_fits(folder, monkeypatch):
    source = load(folder).train
    assert len(arrays.labelled(source)[0]) == TRAIN
    monkeypatch.setattr(arrays, "MOST", 10)
    x0, labels = arrays.labelled(source)
    np.testing.assert_array_equal(x0, source[np.arange(0, TRAIN, 5)]["x0"])
    assert report.data_name(TfdsConfig("tiny")) == "tiny"
    assert len(labels) == 10 and len(arrays.labelled(source[np.arange(TRAIN)])[0]) == TRAIN


def test_grey_images_have_one_channel(tmp_path):
    assert load(prepare(tmp_path, {"train": 3}, (4, 4, 1))).sample_shape == (4, 4, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(name=""), "config.data.name '' and config.data.path '.*' must name a data set of TFDS and the folder"),
        (dict(path=""), "config.data.path '' must name"),
        (dict(name="cifar10"), r"has no data set cifar10, but tiny; .*`tfds build cifar10 --data_dir=.* --file_form"),
        (dict(train="training"), r"split training is none of its splits \(train of 50, test of 9\)"),
        (dict(test="test[:900%]"), r"split test\[:900%\] is none of its splits"),
        (dict(train="train[5:5]"), r"split train\[5:5\] is none"),
        (dict(image="pixels"), r"has the features image \(Image\), label \(ClassLabel\), number \(Scalar\);"),
        (dict(label="number"), "config.data.label a ClassLabel"),
        (dict(sigma_data=0.0), "sigma_data is 0.0: it must be above 0"),
    ],
)
def test_what_is_not_there_is_refused(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        load(**dict(folder=folder) | changes) if "path" not in changes else data.load(TfdsConfig("tiny", ""))


def test_images_of_several_shapes_and_other_formats_are_refused(tmp_path):
    prepare(tmp_path, {"train": 9}, (None, None, 3), sizes=lambda i, shape: (8, 8 + 2 * (i == 4), 3))
    with pytest.raises(ValueError, match=r"image \d is uint8 \[8, (8|10), 3\] of class \d; all must be uint8 \[8, "):
        load(tmp_path).train[np.arange(9)]
    info = tmp_path / "tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match=r"not in array_record files; .*`tfds build tiny .* in another folder"):
        load(tmp_path)


def test_files_that_are_damaged_are_named(tmp_path):
    prepare(tmp_path, {"train": 9}, SHAPE)
    (file,) = tmp_path.glob("tiny/1.0.0/*train*")
    file.write_bytes(b"no records")
    with pytest.raises(ValueError, match=re.escape(f"tiny in {tmp_path}, split train cannot be read")):
        load(tmp_path)


def test_images_in_an_object_store_are_read_from_a_copy(folder, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("RCM_CACHE", str(tmp_path))
    bucket = s3("images-of-tfds")
    for file in sorted(folder.glob("tiny/**/*.*")):
        if file.is_file():
            upload(file, as_path(bucket) / "sets" / file.relative_to(folder).as_posix())
    stored, here = (load(place, test="test") for place in (f"{bucket}/sets", folder))
    np.testing.assert_array_equal(stored.train[np.arange(9)]["x0"], here.train[np.arange(9)]["x0"])
    assert len(stored.test) == TEST and list(tmp_path.rglob("tiny-train*"))
    with pytest.raises(ValueError, match="has no data set cifar10, but tiny; where"):
        load(f"{bucket}/sets", "cifar10")


WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name == "tensorflow" else find(name, *rest))
"""


@pytest.mark.smoke
def test_tensorflow_is_not_needed(folder):
    code = f"""{WITHOUT}
from rcm_jax import data
assert "tensorflow_datasets" not in sys.modules  # nor TFDS for other data
dataset = data.load(data.TfdsConfig("tiny", {str(folder)!r}))
assert dataset.train[[0, 3]]["x0"].shape == {(2, *SHAPE)}
assert not [name for name in sys.modules if name.split(".")[0] == "tensorflow"]
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr

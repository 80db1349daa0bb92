"""scripts/evaluate.py: images, a checkpoint and a config from end to end, a cached reference, errors in one line."""

import json

import numpy as np
import pytest

from rcm_jax import load
from rcm_jax.evaluate import inputs
from rcm_jax.media.picture import save_png
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from tests.scripts.conftest import assert_refused, snapshot


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of tiny PNGs."""
    root = tmp_path_factory.mktemp("images")
    for name, seed, n in (("a", 0, 12), ("b", 1, 9)):
        for i, image in enumerate(np.random.default_rng(seed).integers(0, 256, (n, 6, 8, 3), np.uint8)):
            save_png(root / name / f"{i}.png", image)
    return root / "a", root / "b"


def test_folders_against_folders_and_a_cached_reference(run_script, folders, tmp_path):
    a, b = folders
    flags = [f"--samples_from={a}", "--extractor=pixels", "--metrics=frechet,precision,coverage"]
    process = run_script("evaluate", *flags, f"--reference={b}", f"--out={tmp_path}/direct.json", devices=2)
    assert process.returncode == 0, process.stderr
    assert "12 images, features of pixels" in process.stdout and "Fréchet distance" in process.stdout
    direct = json.loads((tmp_path / "direct.json").read_text())
    assert set(direct["metrics"]["images"]) == {"Fréchet distance (pixels)", "precision", "coverage"}
    assert direct["settings"]["reference"] == {"source": str(b), "count": {"images": 9}}
    save = [f"--reference={b}", f"--save_reference={tmp_path}/b.npz", "--extractor=pixels", "--save_features"]
    process = run_script("evaluate", *save)
    assert process.returncode == 0 and "9 images" in process.stdout, process.stderr
    process = run_script("evaluate", *flags, f"--reference={tmp_path}/b.npz", f"--out={tmp_path}/cached.json")
    assert process.returncode == 0, process.stderr
    cached = json.loads((tmp_path / "cached.json").read_text())["metrics"]["images"]
    assert cached == pytest.approx(direct["metrics"]["images"], rel=1e-6)


def test_a_checkpoint_against_the_data_of_a_config(run_script, trained, tmp_path):
    workdir, _ = trained
    before = snapshot(workdir)
    flags = ["--config=digits.py", f"--checkpoint={workdir}", "--extractor=pixels", "--samples=20", "--steps=1"]
    for name, devices, batch in (("one", 1, 32), ("four", 4, 2)):
        options = [f"--out={tmp_path}/{name}.json", f"--batch={batch}", "--seed=3"]
        process = run_script("evaluate", *flags, *options, devices=devices)
        assert process.returncode == 0, process.stderr
    one, four = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "four"))
    distance = one["metrics"]["images"]["Fréchet distance (pixels)"]
    assert distance > 0.1 and four["metrics"]["images"]["Fréchet distance (pixels)"] == pytest.approx(
        distance, rel=1e-3
    )
    assert one["settings"]["samples"]["source"] == f"{workdir} at 6, 1 step"
    assert one["settings"]["reference"]["count"] == {"images": 1437} and one["settings"]["seed"] == 3
    assert snapshot(workdir) == before


def test_sample_i_depends_on_the_seed_and_i_alone(trained):
    generator, mesh = load(trained[0]), make_mesh(MeshConfig())
    few, many, other = (inputs.of_checkpoint(generator, n, seed, steps=1) for n, seed in ((5, 1), (12, 1), (12, 2)))
    whole = np.asarray(many.batch(0, 16, mesh))
    assert whole.shape == (16, 1, 8, 8, 3) and whole.dtype == np.uint8
    close = dict(atol=1)  # of 255: rounding
    np.testing.assert_allclose(np.int32(few.batch(0, 8, mesh))[:5], whole[:5], **close)
    np.testing.assert_allclose(np.int32(many.batch(8, 8, mesh))[:4], whole[8:12], **close)
    assert not np.array_equal(other.batch(0, 16, mesh), whole)


def test_errors_come_in_one_line(run_script, folders, trained, tmp_path):
    a, b = folders
    pixels, both = "--extractor=pixels", [f"--samples_from={a}", f"--reference={b}"]
    for flags, words in (
        ([pixels], ["nothing to do"]),
        ([pixels, f"--samples_from={a}"], ["--reference"]),
        ([pixels, f"--samples_from={tmp_path}/none", f"--reference={b}"], ["none: no such file"]),
        ([pixels, *both, f"--checkpoint={a}"], ["name one of them"]),
        ([pixels, *both, "--steps=2"], ["--steps", "for --checkpoint"]),
        ([pixels, *both, "--metrics=fid"], ["FID", "--metrics=frechet"]),
        ([pixels, *both, "--metrics=recall", "--neighbours=9"], ["k = 9", "there are 9"]),
        ([pixels, *both, "--samples=13"], ["holds 12", "13"]),
        ([pixels, *both, "--save_reference=b.txt"], [".npz"]),
        (both, ["inception needs its published weights"]),
        ([pixels, f"--checkpoint={trained[0]}", f"--reference={b}", "--guidance=2"], ["guidance is for teachers"]),
    ):
        assert_refused(run_script("evaluate", *flags), *words)

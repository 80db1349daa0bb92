"""From prompts, videos and tars to sets, with tiny random weights in the layouts of published files."""

import json

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import wan_1_3b
from rcm_jax import convert, data
from rcm_jax.convert.files import write_tensors
from rcm_jax.data import LatentsConfig, records
from rcm_jax.data.latents import shard_paths
from rcm_jax.media import vae
from rcm_jax.media.video import write_video
from rcm_jax.models import t5, wan_vae
from rcm_jax.run import workdir
from rcm_jax.run.experiment import Predictor
from rcm_jax.util.config import revise
from tests import tiny, wan
from tests.build import test_shards as tars
from tests.media.test_text import WORDS, write_tokenizer
from tests.scripts.conftest import assert_refused, snapshot

WAN = wan_1_3b.tiny(wan_1_3b.EXPERIMENT)
CONFIG = "--config=wan_1_3b.py:tiny"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a teacher, and the files around a network as they are published."""
    folder, media = tmp_path_factory.mktemp("published"), WAN.media
    write_tokenizer(folder / "tokenizer", WORDS)
    for name, init, config in (("umt5", t5.init, media.text_encoder), ("wan_vae", wan_vae.init, media.vae)):
        params = jax.tree.map(np.asarray, tiny.random_params(init, config))
        write_tensors(folder / name, convert.to_reference(name, params, config, "official"))
    workdir.write_converted(folder / "teacher", Predictor(WAN.model), jax.tree.map(np.asarray, wan.random_params()))
    larger = revise(WAN.model, {"dim": 48, "num_heads": 4, "num_layers": 1, "dtype": "float32"})
    workdir.write_converted(folder / "larger", Predictor(larger), jax.tree.map(np.asarray, wan.random_params(larger)))
    (folder / "prompts.txt").write_text("a cat sits\na cat\na cat\n")
    return folder


def around(folder):
    return [f"--text_encoder={folder / 'umt5'}", f"--tokenizer={folder / 'tokenizer'}", f"--vae={folder / 'wan_vae'}"]


def of_prompts(folder, out):
    return [
        CONFIG, f"--out={out}", f"--prompts={folder / 'prompts.txt'}", f"--teacher={folder / 'teacher'}", "--each=2",
        "--steps=2", "--negative_prompt=sits", "--seed=5", *around(folder),
    ]  # fmt: skip


def content(folder) -> list[bytes]:
    return [record for path in shard_paths(folder) for record in records.open_shard(path)]


def test_prompts_become_a_set_of_samples(run_script, published, tmp_path):
    folder = tmp_path / "set"
    flags = [*of_prompts(published, folder), "--shard=4", "--batch=2"]
    process = run_script("build_dataset", *flags, "--workers=2", "--worker=1")
    assert process.returncode == 0, process.stderr
    assert "1 of 2 shards are left to other workers" in process.stdout
    process = run_script("build_dataset", *flags, "--workers=2", "--worker=0", "--sheet_every=1")
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{folder}: 6 examples of [2, 4, 6, 4], whole\n"
    names = {path.name for path in folder.iterdir()}
    assert {"set.json", "examples.jsonl", "uncond.safetensors", "empty.safetensors", "sheets"} <= names
    assert not {"parts", "texts"} & names
    assert imageio.imread(folder / "sheets/00000.png").shape[2] == 3
    process = run_script("build_dataset", f"--out={folder}", "--verify")
    assert process.stdout == f"{folder}: 6 examples, all as they were written\n", process.stderr
    x0 = data.load(LatentsConfig(str(folder), WAN.data.shape)).train[np.arange(6)]["x0"]

    lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert [(line["key"], line["prompt"], line["seed"]) for line in lines[:3]] == [
        ("prompt 0, seed 5", "a cat sits", 5), ("prompt 0, seed 6", "a cat sits", 6), ("prompt 1, seed 7", "a cat", 7)
    ]  # fmt: skip
    out = tmp_path / "x.safetensors"
    process = run_script(
        "sample", f"--checkpoint={published / 'teacher'}", "--mode=teacher", CONFIG, "--prompt=a cat", "--seeds=8",
        "--steps=2", "--negative_prompt=sits", "--config.sampling.teacher_shift=3", f"--out={out}", *around(published),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    params, config = tiny.random_params(wan_vae.init, WAN.media.vae), WAN.media.vae
    pixels = vae.decode(config, params, load_file(out)["x0"][None])
    expected = vae.encode(config, params, np.clip(pixels, -1, 1))[0]
    assert tiny.relative(x0[3], expected) < 2e-2  # bfloat16, in another program


def test_the_same_command_goes_on_and_another_is_refused(run_script, published, tmp_path):
    folder = tmp_path / "set"
    flags = [*of_prompts(published, folder), "--shard=2", "--noround_trip", "--dtype=bfloat16", "--sheet_every=0"]
    process = run_script("build_dataset", *flags, "--workers=3")
    assert process.returncode == 0, process.stderr
    before = snapshot(folder)
    assert_refused(run_script("build_dataset", *flags, "--guidance=3"), "guidance: 5.0 there, 3.0 here", "--out")
    assert_refused(run_script("build_dataset", *flags[:-1], "--round_trip"), "round_trip: False there, True here")
    assert snapshot(folder) == before
    assert run_script("build_dataset", *flags).returncode == 0
    assert {name: snapshot(folder)[name] for name in before if "latents" in name}.items() <= snapshot(folder).items()
    example = records.decode(content(folder)[0], "it")
    assert example["x0"].dtype == example["text"].dtype == records.STORED_DTYPES["BF16"]
    process = run_script("build_dataset", *flags)
    assert process.stdout == f"{folder}: 6 examples of [2, 4, 6, 4], whole\n"
    larger = [flag for flag in flags if "--out" not in flag and "--teacher" not in flag]
    larger += [f"--teacher={published / 'larger'}", f"--out={tmp_path / 'larger'}"]
    process = run_script("build_dataset", *larger)
    assert process.returncode == 0, process.stderr
    assert records.decode(content(tmp_path / "larger")[0], "it")["x0"].shape == WAN.data.shape


def test_what_cannot_be_built_is_refused_before_anything_is_written(run_script, published, tmp_path):
    flags, out = of_prompts(published, tmp_path / "set"), f"--out={tmp_path / 'set'}"

    def refused(words, *arguments):
        assert_refused(run_script("build_dataset", *arguments), words)
        assert not (tmp_path / "set").exists()

    refused("--config is needed", *flags[1:])
    refused("one of --prompts, --videos, --shards, --images is needed, got none", CONFIG, out)
    refused("got prompts and videos", *flags, "--videos=x")
    refused("--prompts takes no --fps, --clips", *flags, "--fps=8", "--clips=2")
    refused("--worker=2 must be below --workers=2", *flags, "--worker=2", "--workers=2")
    refused("needs --vae", *flags[:-1])
    refused("guidance needs --negative_prompt", *(flag for flag in flags if "negative" not in flag))
    refused("--teacher is needed", *(flag for flag in flags if "--teacher" not in flag))
    y = revise(WAN.model, {"model_type": "i2v", "in_dim": 12})
    workdir.write_converted(tmp_path / "y", Predictor(y), jax.tree.map(np.asarray, wan.random_params(y)))
    refused("beside text this network takes y [2, 4, 6, 8]", *flags, f"--teacher={tmp_path / 'y'}")
    refused("this config has no media", "--config=digits.py", *flags[1:])
    refused("width 40 must be a multiple of 16", *flags, "--size=40x32")
    (tmp_path / "empty.txt").write_text("\n")
    refused("empty.txt holds no prompt", *flags, f"--prompts={tmp_path / 'empty.txt'}")
    refused("no such file", *flags, f"--text_encoder={tmp_path / 'none'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    refused("is there and not an empty folder", *flags, f"--out={tmp_path / 'full'}")
    assert snapshot(tmp_path / "full") == {"notes": b"mine"}


def test_videos_become_a_set_of_two_shapes(run_script, published, tmp_path):
    clips, folder = tmp_path / "clips", tmp_path / "set"
    clips.mkdir()
    for name, height, width, shade in (("wide.mp4", 64, 96, 200), ("tall.mp4", 96, 64, 40)):
        write_video(clips / name, [np.full((height, width, 3), shade, np.uint8)] * 12, 16)
        (clips / name).with_suffix(".txt").write_text("a cat\n")
    (clips / "broken.mp4").write_text("no video")
    (clips / "broken.txt").write_text("a cat")
    flags = [
        CONFIG, f"--out={folder}", f"--videos={clips}", "--buckets=48x32,32x48", "--clips=2", "--negative_prompt=",
        *around(published),
    ]  # fmt: skip
    assert_refused(run_script("build_dataset", *flags, f"--clip={tmp_path / 'none'}"), "no media.image_encoder")
    process = run_script("build_dataset", *flags)
    assert process.returncode == 2
    assert "broken.mp4 cannot be read as a video" in process.stderr and "--most_skipped=0" in process.stderr
    process = run_script("build_dataset", *flags, "--most_skipped=1")
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{folder}: 4 examples, 1 skipped of [2, 4, 6, 4], [2, 6, 4, 4], whole\n"
    dataset = data.load(LatentsConfig(str(folder), WAN.data.shape))
    assert dataset.shapes == [(2, 4, 6, 4), (2, 6, 4, 4)]
    params, config = tiny.random_params(wan_vae.init, WAN.media.vae), WAN.media.vae
    pixels = np.full((1, 5, 32, 48, 3), 200 / 127.5 - 1, np.float32)
    assert tiny.relative(dataset.first["x0"], vae.encode(config, params, pixels)) < 0.05  # what the codec loses
    process = run_script("build_dataset", f"--out={folder}", "--verify")
    assert process.stdout == f"{folder}: 4 examples, all as they were written\n", process.stderr


def test_published_shards_become_a_set(run_script, published, tmp_path):
    x0, text = tars.normal(4, 2, 4, 6, key=1), tars.normal(4, 8, key=2)
    lacking = {name: content for name, content in tars.sample("001").items() if "embed" not in name}
    tars.write(tmp_path / "tars/a.tar", tars.sample("000", latent=-x0, embedding=-text), lacking)
    tars.write(tmp_path / "tars/b.tar", tars.sample("002", latent=x0, embedding=text))
    out = [f"--out={tmp_path / 'set'}", f"--shards={tmp_path / 'tars'}"]
    flags = [CONFIG, *out, "--negative_prompt=", *around(published)]
    process = run_script("build_dataset", *flags, "--noround_trip")
    assert process.returncode == 2
    assert "a.tar: sample 001 has no 001.embed.pt" in process.stderr
    process = run_script("build_dataset", *flags, "--noround_trip", "--most_skipped=1", "--sheet_every=0")
    assert process.returncode == 0, process.stderr
    batch = data.load(LatentsConfig(str(tmp_path / "set"), WAN.data.shape)).train[np.arange(2)]
    np.testing.assert_array_equal(batch["x0"][1], np.moveaxis(x0, 0, -1))
    np.testing.assert_array_equal(batch["cond"]["text"][1, :4], text.astype(records.STORED_DTYPES["BF16"]))
    assert not batch["cond"]["text"][1, 4:].any()

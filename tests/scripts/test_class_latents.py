"""Images with classes, as ImageNet 512 has them: encoded into a set, trained on, and sampled as pixels."""

import runpy

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert.files import open_tensors
from rcm_jax.data import LatentsConfig, latents
from rcm_jax.media import vae
from rcm_jax.media.clips import read_image
from rcm_jax.models.sd_vae import SdVaeConfig
from rcm_jax.run.experiment import Experiment, PretrainConfig
from rcm_jax.util.config import build, revise
from tests.scripts.conftest import assert_refused, write_config
from tests.tiny import relative

VAE = SdVaeConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
CONFIG = f"""
from configs import methods
from rcm_jax.data import LatentsConfig
from rcm_jax.models.dit import DiTConfig
from rcm_jax.models.sd_vae import SdVaeConfig
from rcm_jax.run.experiment import Experiment, MediaConfig, SamplingConfig
from rcm_jax.train.steps import RcmConfig
from rcm_jax.train.trainer import TrainConfig

def get_config():
    return methods.flagged(Experiment(
        model=DiTConfig(num_classes=2, patch=4, dim=8, num_layers=1, num_heads=1, attention="reference"),
        data=LatentsConfig(shape=(8, 8, 4)), media=MediaConfig(text_encoder=None, vae={VAE!r}),
        sampling=SamplingConfig(mid_times=((),), teacher_steps=1),
        rcm=RcmConfig(guidance=1.5, dmd=None, fake_score=None), train=TrainConfig(2, 2, sample_every=2),
    ))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file, and beside it random weights and a folder of images."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "tiny.py").write_text(CONFIG)
    rng = np.random.default_rng(0)
    for name, size in {
        "n02/b.JPEG": (24, 16),
        "n01/a.JPEG": (16, 24),
        "n01/c/d.png": (40, 40),
        "n02/e.png": (9, 9),
    }.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / "images" / name)
    return folder


def succeed(process) -> str:
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_folders_of_images_become_a_set_that_is_trained_on_and_sampled_from(run_script, config, tmp_path):
    flags = [f"--config={config / 'tiny.py'}"]
    weights, examples, run = tmp_path / "weights", tmp_path / "set", tmp_path / "run"
    assert "teacher, vae, all random" in succeed(run_script("random_weights", *flags, f"--out={weights}"))
    build = [*flags, f"--out={examples}", f"--images={config / 'images'}", f"--vae={weights / 'vae'}", "--batch=3"]
    assert "4 examples of [8, 8, 4], whole" in succeed(run_script("build_dataset", *build))
    succeed(run_script("build_dataset", f"--out={examples}", "--verify"))
    assert imageio.imread(examples / "sheets" / "00000.png").size

    dataset = latents.load(LatentsConfig(str(examples), (8, 8, 4)))
    batch = dataset.train[np.arange(4)]
    assert batch["cond"]["label"].tolist() == [0, 0, 1, 1] and dataset.num_classes == 2 == dataset.uncond["label"]
    params = convert.from_reference("sd_vae", open_tensors(weights / "vae"), VAE)
    for row, name in enumerate(["n01/a.JPEG", "n01/c/d.png", "n02/b.JPEG", "n02/e.png"]):
        pixels = np.float32(read_image(config / "images" / name, (16, 16)))[None, None] / 127.5 - 1
        assert relative(vae.encode(VAE, params, pixels)[0, 0], batch["x0"][row]) < 1e-4

    paths = {"media.vae_path": weights / "vae", "data.path": examples, "teacher": weights / "teacher"}
    succeed(run_script("train", *flags, *(f"--config.{k}={v}" for k, v in paths.items()), f"--workdir={run}"))
    assert imageio.imread(run / "samples" / "00000002.png").shape[-1] == 3
    assert (run / "report" / "index.html").exists()

    sample = [f"--checkpoint={run}", f"--vae={weights / 'vae'}", "--classes=1,0", "--each=3", "--steps=1"]
    succeed(run_script("sample", *sample, f"--out={tmp_path / 'grid.png'}", "--batch=4"))
    assert imageio.imread(tmp_path / "grid.png").shape == (3 + 2 * 19, 3 + 3 * 19, 3)
    succeed(run_script("sample", *sample, f"--out={tmp_path / 'x.safetensors'}"))
    assert load_file(tmp_path / "x.safetensors")["x0"].shape == (6, 1, 8, 8, 4)
    teacher = [f"--checkpoint={weights / 'teacher'}", "--mode=teacher", *sample[1:], *flags]
    succeed(run_script("sample", *teacher, f"--out={tmp_path / 'teacher.png'}"))
    assert imageio.imread(tmp_path / "teacher.png").std() > 1


def test_what_is_no_folder_of_classes_is_refused(run_script, config, tmp_path):
    flags = [f"--config={config / 'tiny.py'}", f"--out={tmp_path / 'set'}"]
    images = f"--images={config / 'images'}"

    def refused(*words, flags=flags):
        assert_refused(run_script("build_dataset", *flags), *words)

    refused("encoding needs --vae", flags=[*flags, images])
    vae = f"--vae={config / 'images'}"
    refused(
        "has 2 folders of classes, but config.model.num_classes is 3",
        flags=[*flags, images, vae, "--config.model.num_classes=3"],
    )
    refused("b.JPEG is no image in the folder of a class", flags=[*flags, vae, f"--images={config / 'images' / 'n02'}"])
    refused("data.shape is [1, 8, 8, 4]", flags=[*flags, images, vae, "--config.data.shape=(1,8,8,4)"])
    refused("this config has no text encoder", flags=[*flags, vae, f"--videos={config / 'images'}"])
    text = ["--config=configs/wan_1_3b.py:tiny", flags[1], images, vae]
    refused("this config is conditioned on text", flags=text)
    assert not (tmp_path / "set").exists()
    run = build(Experiment, runpy.run_path(str(config / "tiny.py"))["get_config"]().to_dict())
    write_config(tmp_path / "teacher", revise(run, {"pretrain": PretrainConfig(), "media": None}).pretraining)
    sample = [f"--checkpoint={tmp_path / 'teacher'}", f"--out={tmp_path / 'x.png'}"]
    assert_refused(run_script("sample", *sample), "nothing says how these latents become pixels")


def test_images_are_scaled_by_their_shorter_side_and_cut_in_the_middle(tmp_path):
    x = np.linspace(0, 255, 40)[None, :, None] * np.ones((20, 1, 3))
    Image.fromarray(np.uint8(x)).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", (10, 10))
    assert image.shape == (10, 10, 3) and abs(image[:, 5:].mean() + image[:, :5].mean() - 255) < 3
    np.testing.assert_allclose(image[0, :, 0], x[0, 10:30, 0].reshape(10, 2).mean(1), atol=2)

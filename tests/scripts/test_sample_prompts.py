"""From prompts to files that a player opens, with tiny random weights in the layouts of published files."""

import base64
import json

import av
import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import cosmos_2b, wan_1_3b
from rcm_jax import convert
from rcm_jax.convert.files import write_tensors
from rcm_jax.media import text, vae
from rcm_jax.method import samplers
from rcm_jax.method.samplers import unit_noise
from rcm_jax.models import t5, wan_vae
from rcm_jax.run import pixels as pixels_of
from rcm_jax.run import workdir
from rcm_jax.run.experiment import Predictor
from tests import cosmos, tiny, wan
from tests.media.test_text import WORDS, write_tokenizer
from tests.page import content_of
from tests.scripts.conftest import assert_refused, snapshot
from tests.tiny import relative
from tests.torch_pickle import save_state_dict

WAN, COSMOS = wan_1_3b.tiny(wan_1_3b.EXPERIMENT), cosmos_2b.tiny(cosmos_2b.EXPERIMENT)


def numpy_params(init, config) -> dict:
    return jax.tree.map(np.asarray, tiny.random_params(init, config))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of weights as others publish them, workdirs of a student (Wan) and of converted weights (Cosmos)."""
    folder = tmp_path_factory.mktemp("published")
    write_tokenizer(folder / "tokenizer", WORDS)
    for name, values in (("wan", WAN), ("cosmos", COSMOS)):
        media = values.media
        encoder = numpy_params(t5.init, media.text_encoder)
        layout = "official" if name == "wan" else "transformers"
        kind = media.text_encoder.model_type
        tensors = {f"{name}_t5": convert.to_reference(kind, encoder, media.text_encoder, layout)}
        decoder, layout = numpy_params(wan_vae.init, media.vae), "official" if name == "wan" else "diffusers"
        tensors[f"{name}_vae"] = convert.to_reference("wan_vae", decoder, media.vae, layout)
        for file, arrays in tensors.items():
            if name == "wan":
                save_state_dict(folder / f"{file}.pth", arrays)
            else:
                write_tensors(folder / file, arrays, shard_bytes=20_000)
    workdir.write_converted(folder / "student", WAN, jax.tree.map(np.asarray, wan.random_params()))
    converted = Predictor(COSMOS.model)
    workdir.write_converted(folder / "converted", converted, jax.tree.map(np.asarray, cosmos.random_params()))
    return folder


def wan_flags(folder):
    return [
        f"--checkpoint={folder / 'student'}",
        f"--text_encoder={folder / 'wan_t5.pth'}",
        f"--tokenizer={folder / 'tokenizer'}",
        f"--vae={folder / 'wan_vae.pth'}",
    ]


def cosmos_flags(folder):
    return [
        f"--checkpoint={folder / 'converted'}",
        "--config=configs/cosmos_2b.py:tiny",
        f"--text_encoder={folder / 'cosmos_t5'}",
        f"--tokenizer={folder / 'tokenizer'}",
        f"--vae={folder / 'cosmos_vae'}",
    ]


def video(path) -> np.ndarray:
    """[t, h, w, 3] as a player sees it."""
    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate == 16
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def expected(folder, prompt, seed, steps):
    """x0 [t, h, w, c] of the student, step by step."""
    run = WAN
    encoder = tiny.random_params(t5.init, run.media.text_encoder)
    ids, mask = text.tokenize(folder / "tokenizer", [prompt], run.media.text_length)
    cond = {"text": jnp.asarray(text.encode(run.media.text_encoder, encoder, ids, mask))}
    F, times = wan.velocity(run.model), samplers.student_times(80.0, WAN.sampling.mid_times[steps - 1])
    x, params = None, wan.random_params()
    for k, t in enumerate(times):
        noise = unit_noise(jax.random.fold_in(jax.random.key(0), k), [seed], run.data.shape)
        x = noise if k == 0 else jnp.cos(t) * x + jnp.sin(t) * noise
        x = jnp.cos(t) * x - jnp.sin(t) * F(params, x, jnp.full(1, t), cond)
    return np.asarray(x[0])


def test_prompts_and_seeds_become_videos_latents_and_a_sheet(run_script, published, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat sits\n\n  a cat  \n")
    flags = [*wan_flags(published), f"--prompts={tmp_path / 'prompts.txt'}", "--seeds=3,4", "--steps=2"]
    process = run_script(
        "sample", *flags, f"--out={tmp_path / 'v.mp4'}", f"--sheet={tmp_path / 'sheet.png'}", "--batch=3"
    )
    assert process.returncode == 0, process.stderr
    assert "v-000-seed3.mp4" in process.stdout and "sampling" in process.stdout and "text" in process.stdout
    process = run_script("sample", *flags, f"--out={tmp_path / 'x.safetensors'}", devices=2)
    assert process.returncode == 0, process.stderr
    names = [f"{row:03d}-seed{seed}" for row in range(2) for seed in (3, 4)]
    found = {path.name for path in tmp_path.iterdir()} - {"prompts.txt", "sheet.png"}
    assert found == {f"v-{name}.mp4" for name in names} | {f"x-{name}.safetensors" for name in names}

    x0 = {name: load_file(tmp_path / f"x-{name}.safetensors")["x0"] for name in names}
    for name, prompt, seed in ((names[0], "a cat sits", 3), (names[3], "a cat", 4)):
        assert relative(x0[name], expected(published, prompt, seed, 2)) < 2e-2  # bfloat16, in another program
    assert relative(x0[names[0]], x0[names[1]]) > 0.1 and relative(x0[names[0]], x0[names[2]]) > 1e-4
    media = WAN.media
    decoder = tiny.random_params(wan_vae.init, media.vae)
    frames = np.stack(list(pixels_of.frames(media, decoder, x0[names[0]])))
    seen = video(tmp_path / f"v-{names[0]}.mp4")
    assert frames.shape == seen.shape == (5, 32, 48, 3)
    pixels = vae.decode(media.vae, decoder, x0[names[0]][None])[0]
    assert np.max(np.abs(frames - np.clip(pixels * 127.5 + 127.5, 0, 255))) <= 0.51
    smooth = (x.reshape(5, 4, 8, 6, 8, 3).mean(axis=(2, 4)) for x in (frames.astype(float), seen.astype(float)))
    assert np.max(np.abs(np.subtract(*smooth))) < 12  # what the codec loses: noise is hard to compress
    assert imageio.imread(tmp_path / "sheet.png").shape == (1 + 2 * 33, 1 + 6 * 49, 3)


def test_a_teacher_of_converted_weights_makes_an_image_of_another_size(run_script, published, tmp_path):
    def sample(name, *flags):
        out = f"--out={tmp_path / name}"
        process = run_script(
            "sample", *cosmos_flags(published), "--mode=teacher", "--prompt=a cat", out, "--steps=3", *flags
        )
        assert process.returncode == 0, process.stderr
        return imageio.imread(tmp_path / name)

    image = sample("a.png", "--size=64x32")
    assert image.shape == (32, 64, 3) and image.std() > 10
    same = ["--guidance=4.5", "--tile=100", "--negative_prompt="]  # for Cosmos, no negative prompt is zeros
    np.testing.assert_array_equal(sample("b.png", "--size=64x32", *same), image)
    page = tmp_path / "page.html"
    assert np.any(sample("c.png", "--size=64x32", "--negative_prompt=sits", f"--sheet={page}") != image)
    (row,) = content_of(page)["videos"]["rows"]
    assert row["title"] == "a cat" and base64.b64decode(row["cells"][0]["data"]) == (tmp_path / "c.png").read_bytes()


def test_a_page_has_a_row_for_every_prompt_and_a_column_for_every_seed(run_script, published, tmp_path):
    prompts = ["--prompt=a cat", "--prompt=<b>", "--prompt=a cat"]
    out = [f"--out={tmp_path / 'v.mp4'}", f"--sheet={tmp_path / 'page.html'}"]
    process = run_script("sample", *wan_flags(published), *prompts, "--seeds=3,4", "--steps=2", "--batch=3", *out)
    assert process.returncode == 0, process.stderr
    content = content_of(tmp_path / "page.html")
    assert content["videos"]["columns"] == ["seed 3", "seed 4"] and content["note"] == "Student, 2 steps."
    for i, (row, title) in enumerate(zip(content["videos"]["rows"], ["1. a cat", "2. <b>", "3. a cat"], strict=True)):
        assert row["title"] == title  # numbered: one was asked for twice
        files = [(tmp_path / f"v-{i:03d}-seed{seed}.mp4").read_bytes() for seed in (3, 4)]
        assert [base64.b64decode(cell["data"]) for cell in row["cells"]] == files


REFUSED = [
    (["--prompt=a", "--out={to}/a.mp4", "--vae={to}/no.pth"], ["--vae=", "no.pth", "no such file"]),
    (["--prompt=a", "--out={to}/a.mp4", "--steps=5"], ["5 steps", "1 to 4"]),
    (["--prompts={from}/empty.txt", "--out={to}/a.mp4"], ["empty.txt holds no prompt"]),
    (["--prompt=a", "--out={to}/a.png"], ["these are 5", "--frames=1"]),
    (["--prompt=a", "--out={to}/a.mp4", "--size=50"], ["--size=50", "832x480"]),
    (["--prompt=a", "--out={to}/a.mp4", "--guidance=2"], ["--guidance is for teachers"]),
    (["--prompt=a", "--out={to}/a.mp4", "--mode=teacher"], ["--mode=teacher", "holds a student"]),
    (["--prompt=a", "--out={to}/a.mp4", "--seeds=1,1"], ["--seeds=1,1", "none of them twice"]),
    (["--prompt=a", "--out={to}"], ["must end in .mp4"]),
    (["--prompt=a", "--out={to}/a.mp4", "--sheet={to}/a.jpg"], ["a.jpg must end in .png or .html"]),
    (["--prompt=a", "--out={to}/a.safetensors", "--sheet={to}/a.html"], ["latents cannot be shown"]),
    (["--out={to}/a.mp4"], ["there is no prompt"]),
]


@pytest.mark.parametrize(
    ("flags", "words"),
    REFUSED,
    ids=lambda value: value[-1].removeprefix("--") if isinstance(value, list) and value[-1].startswith("--") else None,
)
def test_what_cannot_be_is_refused_before_anything_is_computed(run_script, published, tmp_path, flags, words):
    (published / "empty.txt").write_text("\n \n")
    places = {"to": tmp_path, "from": published}
    process = run_script("sample", *wan_flags(published), *(flag.format(**places) for flag in flags))
    assert_refused(process, *words)
    assert snapshot(tmp_path) == {}


def test_missing_weights_are_named_and_converted_weights_need_a_mode(run_script, published, tmp_path):
    out = ["--prompt=a", f"--out={tmp_path / 'a.mp4'}"]
    assert_refused(run_script("sample", f"--checkpoint={published / 'student'}", *out), "--text_encoder is needed")
    converted = f"--checkpoint={published / 'converted'}"
    assert_refused(run_script("sample", converted, *out), "--mode=teacher", "--mode=student")
    assert_refused(run_script("sample", converted, "--mode=teacher", *out), "nothing says how prompts")
    other = "--config=configs/cosmos_2b.py"
    assert_refused(
        run_script("sample", converted, "--mode=teacher", other, *out), "model_channels is 24 there, 2048 here"
    )
    assert snapshot(tmp_path) == {}


def test_a_suite_goes_on_where_it_was_ended_with_the_same_samples(run_script, published, tmp_path):
    prompts = ["a cat", "a cat sits", "a cat"]
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": p, "dimension": ["color"]} for p in prompts]))
    flags = [*wan_flags(published), f"--suite={tmp_path / 'info.json'}", f"--out={tmp_path / 'out'}", "--steps=2"]
    assert_refused(run_script("sample", *flags, "--prompt=a"), "--suite has its own prompts and files: no --prompt")
    process = run_script("sample", *flags, "--seeds=3,4", "--batch=3", devices=2)
    assert process.returncode == 0, process.stderr
    assert "4 samples for 2 prompts, 0 there before" in process.stdout
    samples = tmp_path / "out" / "samples"
    first = snapshot(samples)
    assert set(first) == {f"{prompt}-{i}.mp4" for prompt in prompts for i in (0, 1)}

    (samples / "a cat-1.mp4").unlink()
    (samples / ".a cat-1.mp4.0123abcd").write_text("as one leaves it that is killed")
    process = run_script("sample", *flags, "--seeds=3,4", "--batch=3", devices=2)
    assert process.returncode == 0 and "3 there before" in process.stdout, process.stderr
    again = snapshot(samples)
    assert set(again) == set(first) and all(again[n] == first[n] for n in first if n != "a cat-1.mp4")
    (tmp_path / "first.mp4").write_bytes(first["a cat-1.mp4"])
    drift = np.abs(video(samples / "a cat-1.mp4").astype(float) - video(tmp_path / "first.mp4"))
    assert np.mean(drift) < 0.5
    assert_refused(run_script("sample", *flags, "--seeds=3"), "holds samples of something else: seeds: [3, 4] there")

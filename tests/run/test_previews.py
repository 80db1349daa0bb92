"""Samples while a network trains: videos and statistics of latents, pictures of classes, and where all of it goes."""

import dataclasses
import json
import struct
import sys
import types

import av
import imageio.v3 as imageio
import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rcm_jax import data
from rcm_jax.data import DigitsConfig, MixtureConfig
from rcm_jax.media import vae
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.run import latents as fixed_latents
from rcm_jax.run import pipeline, pixels, previews, workdir
from rcm_jax.run.program import Program, assemble
from rcm_jax.train.metrics import read_metrics
from rcm_jax.util.config import revise
from tests import latents, tiny

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

NAMES = {"mean", "std", "min", "max", "nonfinite", "std_over_examples", "frame_change"}
LATENTS = {f"preview/{name}{of}" for name in NAMES for of in ("", "_of_data")}
given = pytest.fixture(scope="module", autouse=True)(latents.given)


def stand_in(told):
    """In the place of the package wandb; it remembers what it is told."""
    run = types.SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: None)

    def init(**options):
        told.append(options)
        return run

    return types.SimpleNamespace(init=init, Image=np.shape, Video=lambda path, format: (path, format))


@pytest.fixture(scope="module")
def trained(given, tmp_path_factory):
    """A run on eight devices whose previews are videos, and what it told Weights & Biases."""
    told, changes = [], {"train.wandb": True, "train.wandb_project": "mine", "mesh": MeshConfig(1, 4, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", stand_in(told))
        return pipeline.train(latents.experiment(given, **changes), tmp_path_factory.mktemp("trained") / "run"), told


def video(path):
    """[t, h, w, 3] as a player sees it."""
    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate == 16
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def events(folder):
    """{tag: [(step, value of a summary)]} of the event files of TensorBoard in a workdir."""
    found = {}
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
            content = content[16 + size :]
    return found


def test_videos_of_the_averaged_student_stand_side_by_side(trained, given):
    done, _ = trained
    files = sorted((done.folder / "samples").iterdir())
    assert [path.name for path in files] == ["00000003.mp4", "00000006.mp4"]
    run, examples = done.run, fixed_latents.fixed(done.dataset)
    key = jax.random.fold_in(jax.random.key(run.seed), 4)
    params = jax.device_get(done.state.ema)  # on one device, all at once
    cond = {"text": examples["cond"]["text"]}
    x0 = done.program.student_sampler()(params, key, np.arange(4), cond, latents.SHAPE)
    decoder = pixels.read_decoder(run.media)
    pixels_of = [vae.decode(run.media.vae, decoder, np.asarray(one)[None])[0] for one in x0]
    seen = video(files[-1])
    assert len(seen) == 5 and seen.shape[1] % 2 == seen.shape[2] % 2 == 0
    for i in range(4):
        top, left = 24 + 4 + i // 2 * 36, 4 + i % 2 * 52
        ours = seen[:, top : top + 32, left : left + 48]
        theirs = np.clip(pixels_of[i] * 127.5 + 127.5, 0, 255)
        blocks = (x.reshape(5, 4, 8, 6, 8, 3).mean(axis=(2, 4)) for x in (ours.astype(float), theirs))
        assert np.max(np.abs(np.subtract(*blocks))) < 16  # what the codec loses: noise is hard to compress


def test_statistics_of_latents_stand_beside_those_of_the_data(trained):
    done, _ = trained
    rows = [row for row in read_metrics(done.folder) if "preview/std" in row]
    assert [row["step"] for row in rows] == [3, 6] and all(row.keys() >= LATENTS for row in rows)
    examples = fixed_latents.fixed(done.dataset)["x0"]
    assert rows[0]["preview/std_of_data"] == pytest.approx(examples.std(), rel=1e-5) == rows[1]["preview/std_of_data"]
    assert rows[0]["preview/std"] != rows[1]["preview/std"] and rows[0]["preview/nonfinite"] == 0


def test_tensorboard_and_wandb_get_the_picture_the_video_and_the_config(trained):
    done, told = trained
    found, config = events(done.folder), json.loads((done.folder / "config.json").read_text())
    assert [step for step, _ in found["samples"]] == [3, 6] and found.keys() >= LATENTS
    picture = imageio.imread(found["samples"][1][1].image.encoded_image_string)
    assert picture.shape[0] >= 24 + 4 * 36 and picture.shape[1] >= 3 * 52 and picture.std() > 20
    ((_, text),) = found["config/text_summary"]
    assert '"kind": "blend"' in text.tensor.string_val[0].decode()
    init = told[0]
    assert (init["project"], init["name"], init["config"]) == ("mine", "run", config)
    shown = [(step, values["samples"]) for step, values in told[1:] if "samples" in values]
    assert shown == [(step, (str(done.folder / f"samples/{step:08d}.mp4"), "mp4")) for step in (3, 6)]


def test_previews_change_nothing_that_is_learned_and_without_an_autoencoder_they_are_statistics(
    trained, given, tmp_path, monkeypatch, capsys
):
    done, _ = trained
    changes = {"mesh": MeshConfig(1, 4, 2), "train.wandb_name": "other"}
    plain = pipeline.train(latents.experiment(given, vae=False, **changes), tmp_path / "plain")
    said = capsys.readouterr().err
    assert "previews: statistics of latents, no pictures: config.media.vae_path names no autoencoder" in said
    assert not (tmp_path / "plain/samples").exists()
    values = {row["step"]: row for row in read_metrics(plain.folder) if "preview/std" in row}
    assert set(values) == {3, 6}
    monkeypatch.setattr(previews, "hook", lambda *arguments: None)
    without = pipeline.train(latents.experiment(given, **changes), tmp_path / "without")
    tiny.assert_trees_equal(without.state, done.state)
    tiny.assert_trees_equal(without.state, plain.state)
    assert not [row for row in read_metrics(without.folder) if "preview/std" in row]


def test_samples_are_the_same_on_any_mesh_however_many_it_needs_at_once(trained):
    done, _ = trained
    run, dataset = done.run, done.dataset
    params = jax.device_get(done.state.ema)
    text = np.random.default_rng(1).normal(size=(5, *latents.TEXT)).astype(np.float32)
    drawn, calls = [], []
    for sizes, devices in [((1, 1, 1), 1), ((2, 2, 2), 8), ((8, 1, 1), 8)]:
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
        program = assemble(run, mesh, dataset)
        placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.params))
        sampler = program.student_sampler()

        def counted(params, key, ids, cond, shape, sampler=sampler):
            calls.append(ids.shape)
            return sampler(params, key, ids, cond, shape)

        asked = previews.Asked(5, {"text": text}, dataset.sample_shape)
        drawn.append(previews.draw_on_mesh(mesh, counted, placed, jax.random.key(7), asked))
    assert calls == [(1,)] * 5 + [(4,)] * 2 + [(8,)]
    for other in drawn[1:]:
        assert other.shape == (5, *latents.SHAPE)
        np.testing.assert_allclose(other, drawn[0], rtol=1e-4, atol=1e-5)
    assert len(np.unique(drawn[0].round(3), axis=0)) == 5


def test_a_decoder_without_memory_leaves_the_statistics(trained, tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nand so on")

    monkeypatch.setattr(pixels, "write_together", fail)
    preview = previews._of_latents(trained[0].program)
    shown = preview.show(np.zeros((4, *latents.SHAPE), np.float32), tmp_path / "00000007", "step 7")
    assert shown.values["preview/std"] == 0 and not shown.pictures and not shown.videos
    assert "no 00000007: RESOURCE_EXHAUSTED: no memory" in caplog.text


def test_one_frame_is_a_png(given, tmp_path):
    run = latents.experiment(given)
    x0 = np.random.default_rng(0).normal(size=(3, 1, 4, 6, 4)).astype(np.float32)
    path, picture = pixels.write_together(tmp_path / "a", run.media, pixels.read_decoder(run.media), x0, "step 1")
    assert path == tmp_path / "a.png"
    np.testing.assert_array_equal(imageio.imread(path), picture)
    assert picture.shape == (24 + 4 + 2 * 36, 4 + 2 * 52, 3)


def test_held_out_examples_come_first_and_those_left_out_are_passed_over():
    train, test = ({"x0": np.arange(n) + start, "cond": {}} for n, start in ((9, 0), (3, 100)))
    dataset = data.dataset.Dataset(train, None, {}, None, "video")
    assert fixed_latents.fixed(dataset)["x0"].tolist() == [0, 1, 2, 3]
    assert fixed_latents.fixed(dataset, (1, 2, 8))["x0"].tolist() == [0, 3, 4, 5]
    held_out = dataclasses.replace(dataset, test=test)
    assert fixed_latents.fixed(held_out, (1,))["x0"].tolist() == [100, 101, 102]


def test_statistics_see_what_stands_still_what_is_alike_and_what_is_broken():
    x0 = np.random.default_rng(0).normal(2, 3, (4, 6, 8, 8, 4)).astype(np.float32)
    of = fixed_latents.statistics(x0)
    assert set(of) == NAMES
    assert of["mean"] == pytest.approx(x0.mean(), rel=1e-4) and of["std"] == pytest.approx(x0.std(), rel=1e-4)
    assert (of["min"], of["max"], of["nonfinite"]) == (x0.min(), x0.max(), 0)
    assert of["frame_change"] == pytest.approx(np.abs(x0[:, 1:] - x0[:, :-1]).mean(), rel=1e-4)
    assert of["std_over_examples"] == pytest.approx(np.sqrt(x0.var(axis=0, ddof=1).mean()), rel=1e-4)
    assert fixed_latents.statistics(x0[:1])["std"] and "std_over_examples" not in fixed_latents.statistics(x0[:1])
    assert "frame_change" not in fixed_latents.statistics(x0[:, :1])
    assert fixed_latents.statistics(np.repeat(x0[:1], 4, axis=0))["std_over_examples"] == 0
    assert fixed_latents.statistics(np.repeat(x0[:, :1], 6, axis=1))["frame_change"] == 0
    x0[0, 0, 0] = np.nan
    broken = fixed_latents.statistics(x0)
    assert broken["nonfinite"] == pytest.approx(1 / 4 / 6 / 8) and all(np.isfinite(list(broken.values())))
    assert fixed_latents.statistics(x0 * np.nan)["nonfinite"] == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"media.vae_path": "no.pth"}, FileNotFoundError, r"config\.media\.vae_path=no\.pth: no such file or folder"),
        ({"media.vae_path": "{given}/teacher/config.json"}, ValueError, r"config\.media\.vae_path=.*config\.json: "),
        ({"media.vae.dim": 8}, ValueError, r"config\.media\.vae_path=.*vae\.safetensors: .* no wan_vae of this config"),
        ({"media.vae.z_dim": 4, "av": None}, ValueError, r"vae_path=.*: videos: av is not installed.*\[sample\]"),
    ],
)
def test_what_cannot_decode_is_refused_and_nothing_is_written(given, tmp_path, monkeypatch, changes, error, message):
    if "av" in changes:
        monkeypatch.setitem(sys.modules, "av", changes["av"])
    changes = {name: value.format(given=given) if isinstance(value, str) else value for name, value in changes.items()}
    changes.pop("av", None)
    with pytest.raises(error, match=message):
        pipeline.train(latents.experiment(given, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_may_go_on_with_another_autoencoder_and_another_name(given, tmp_path):
    run = latents.experiment(given)
    workdir.claim(tmp_path / "run", run)
    changes = {"media.vae_path": "", "train.wandb_project": "other", "train.wandb_name": "again"}
    workdir.claim(tmp_path / "run", revise(run, changes))
    assert workdir.read(tmp_path / "run").media.vae_path == ""


def test_latents_that_the_autoencoder_does_not_take_are_refused(given):
    media = latents.experiment(given).media
    with pytest.raises(ValueError, match=r"vae_path=.*: latents must be \[b, t, h, w, 4\], .* got \(1, 2, 4, 6, 5\)"):
        pixels.check(media, (2, 4, 6, 5))
    pixels.check(revise(media, {"vae_path": ""}), (2, 4, 6, 5))
    pixels.check(None, (2,))


def of_classes(dataset, samples, tmp_path):
    """The preview of given samples of a data set."""
    run = types.SimpleNamespace(seed=0)
    preview = previews._of_classes(Program(run, None, dataset, None, None, None, None))
    shown = preview.show(samples(preview.asked), tmp_path / "00000012", "step 12 · 4-step student (EMA)")
    np.testing.assert_array_equal(imageio.imread(tmp_path / "00000012.png"), shown.pictures["samples"])
    return shown.pictures["samples"]


def test_of_a_thousand_classes_ten_are_drawn_the_first_and_the_last_among_them():
    dataset = dataclasses.replace(data.load(DigitsConfig()), num_classes=1000)
    asked = previews._of_classes(Program(None, None, dataset, None, None, None, None)).asked
    assert asked.n == 80 and sorted(set(asked.cond["label"].tolist()))[::9] == [0, 999]


def test_digits_are_ink_on_paper_a_row_for_each_class_under_a_caption(tmp_path):
    dataset = data.load(DigitsConfig())
    x0, label = dataset.train["x0"], dataset.train["cond"]["label"]
    picture = of_classes(dataset, lambda asked: np.stack([x0[label == c][0] for c in asked.cond["label"]]), tmp_path)
    assert picture.mean() > 140 and picture.shape[0] > picture.shape[1] > 400
    rows = picture[24:, -400:].reshape(picture.shape[0] - 24, -1)[3:]
    height = len(rows) // 10
    assert np.abs(rows[:40].astype(int) - rows[height : height + 40]).mean() > 5  # another digit


def test_points_have_a_caption(tmp_path):
    config = MixtureConfig((0.5, 0.5), ((1.0, 0.0), (-1.0, 0.0)), (0.1, 0.1), (0, 1), examples=64)
    dataset = data.load(config)
    picture = of_classes(dataset, lambda asked: np.zeros((asked.n, 2)), tmp_path)
    assert picture.shape[0] > 24 + 300 and (picture[:24] != 255).any()

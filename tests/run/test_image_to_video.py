"""Image to video from a set of latents to a sample, tiny: training of a pair as Wan2.2's, and an image that is never
lost on the way."""

import functools
import importlib

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import rcm_jax
from configs import wan2_2_i2v_a14b, wan2_2_t2v_a14b, wan_i2v_14b
from rcm_jax import convert
from rcm_jax.convert.files import write_tensors
from rcm_jax.data import latents
from rcm_jax.media import vae
from rcm_jax.media.clips import read_image
from rcm_jax.media.first_frame import first_frame
from rcm_jax.method import denoiser
from rcm_jax.models import init as init_network
from rcm_jax.models import t5, wan22_vae, wan_vae
from rcm_jax.run import generate, images, pipeline, pixels, workdir
from rcm_jax.run.experiment import Predictor, PretrainConfig, from_mapping
from rcm_jax.run.program import make_network, zeros
from rcm_jax.train.metrics import read_metrics
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.steps import DiffusionMethod
from rcm_jax.train.trainer import TrainConfig
from rcm_jax.util.config import revise
from tests import tiny
from tests.media.test_text import WORDS, write_tokenizer
from tests.tiny import relative

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

HIGH, LOW = (from_mapping(wan2_2_i2v_a14b.get_config(v).to_dict()) for v in ("tiny", "tiny,low"))
MEDIA = HIGH.media


@functools.cache
def params_of(kind, config, key=0):
    return jax.tree.map(np.asarray, tiny.random_params(kind, config, key))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a set of latents with y, published files around the network, and two images."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    x0, text, y = (rng.normal(size=(8, *shape)) for shape in ((2, 4, 6, 4), (6, 8), (2, 4, 6, 8)))
    tiny.write_latents(folder / "latents", x0, text, y=y)
    write_tokenizer(folder / "tokenizer", WORDS)
    encoder, autoencoder = params_of(t5.init, MEDIA.text_encoder), params_of(wan_vae.init, MEDIA.vae)
    write_tensors(folder / "t5", convert.to_reference("umt5", encoder, MEDIA.text_encoder, "official"))
    write_tensors(folder / "vae", convert.to_reference("wan_vae", autoencoder, MEDIA.vae, "diffusers"))
    for name, size in {"wide": (60, 40), "other": (48, 32), "square": (40, 40)}.items():
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / f"{name}.png")
    for key, name in enumerate(("teacher_high", "teacher_low")):
        params = params_of(init_network, HIGH.model, key)
        workdir.write_converted(folder / name, Predictor(HIGH.model), params)
    return folder


@pytest.fixture(scope="module")
def files(world):
    return {name: world / file for name, file in (("text_encoder", "t5"), ("tokenizer", "tokenizer"), ("vae", "vae"))}


@pytest.fixture(scope="module")
def pair(world):
    """Workdirs of two students, each for its part of the noise."""
    workdir.write_converted(world / "high", HIGH, params_of(init_network, HIGH.model, 2))
    return world / "high", train(world, LOW, "low")


def train(world, run, name):
    """The workdir of a student that rCM has trained."""
    changes = {"data.path": str(world / "latents"), "teacher": str(world / f"teacher_{name}")}
    changes |= {"train.steps": run.rcm.warmup + 3, "train.sample_every": 3, "train.checkpoint_every": 50}
    folder = world / {"low": "low", "high": "trained_high"}[name]
    if not folder.exists():
        pipeline.train(revise(run, changes), folder)
    return folder


@pytest.mark.parametrize("which", ["low", pytest.param("high", marks=pytest.mark.slow)])
def test_each_network_of_a_pair_is_trained_and_shown_on_its_own_part_of_the_noise(which, world):
    for folder in [train(world, {"low": LOW, "high": HIGH}[which], which)]:
        rows = read_metrics(folder)
        assert {"scm/loss", "dmd/loss", "critic/loss", "preview/std"} <= set().union(*rows)
        assert not any(row.get("student/skipped") or row.get("critic/skipped") for row in rows)
        times = {name.rpartition("/t")[2] for row in rows for name in row if name.startswith("scm/tangent_norm/t")}
        assert times <= ({"3"} if which == "high" else {"0", "1", "2", "3"})  # tau = 0.9 is t = 1.46


def test_a_pair_samples_what_an_image_shows(pair, files, world):
    generator = rcm_jax.load(pair[0], low=pair[1], **files)
    one = generator(["a cat"], [3], image=world / "wide.png").latents
    assert one.shape == (1, 1, 2, 4, 6, 4) and np.isfinite(one).all()
    again = generator(["a cat", "a cat"], [3], image=[world / "wide.png", world / "other.png"], batch=2).latents
    assert relative(again[0], one[0]) < 2e-2  # bfloat16, in another program
    assert relative(again[1], again[0]) > 0.05

    wanted = generate.request(generator, ["a cat"], [3], image=world / "wide.png")
    cond, uncond = generate.conditions(wanted)
    mesh, params, sampler = generate.load_sampler(wanted, uncond, 1)
    assert len(params) == 2 and relative(*(jax.tree.leaves(p)[0] for p in params)) > 1e-3
    low_changed = params[0], jax.tree.map(lambda x: x + 0.1, params[1])
    with jax.set_mesh(mesh):
        other = generate.draw(sampler, low_changed, cond, [3], generator.shape, 1)
    assert relative(other, one) > 1e-3  # both take part


def test_teachers_are_sampled_together_each_with_its_guidance(files, world):
    generator = rcm_jax.load(
        world / "teacher_high", low=world / "teacher_low", mode="teacher", config=HIGH, **files
    )  # fmt: skip
    options = dict(image=world / "wide.png", steps=4, negative_prompt="a")
    alike, differ = (generator(["a cat"], [0], low_guidance=w, **options).latents for w in (None, 1.0))
    assert relative(differ, alike) > 1e-4
    np.testing.assert_array_equal(generator(["a cat"], [0], low_guidance=3.5, **options).latents, alike)


def test_the_first_frame_reaches_F_its_tangent_and_guidance(world):
    """From the file, by the loader and the program: another y is another F, another tangent, another guided F."""
    dataset = latents.load(revise(HIGH.data, {"path": str(world / "latents")}))
    run = revise(HIGH, {"model.dtype": "float32", "model.remat": "none"})
    network = make_network(run, dataset.first)
    batch = dataset.train[np.arange(4)]
    assert batch["cond"]["y"].shape == (4, 2, 4, 6, 8)
    params, t = params_of(init_network, HIGH.model), jnp.full(4, 1.5)
    guided = denoiser.guided(network.F, 3.5)

    def answers(y):
        cond = batch["cond"] | {"y": y}
        F, dF = jax.jvp(lambda x, t: network.F(params, x, t, cond), (batch["x0"], t), (batch["x0"], jnp.ones(4)))
        return F, dF, guided(params, batch["x0"], t, (cond, dataset.uncond))

    answers = jax.jit(answers)
    y = batch["cond"]["y"]
    other = y.copy()
    other[:, 0] += 1  # the first frame alone
    for name, before, after in zip(("F", "tangent", "guided"), answers(y), answers(other), strict=True):
        assert relative(after, before) > 1e-3, name


KNOWN = ["cosmos_v2w_2b", pytest.param("wan2_2_ti2v_5b", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", KNOWN)
def test_a_network_is_given_the_first_frame_of_the_set_and_then_of_an_image(name, world, tmp_path):
    """Trained by rCM behind the first of three frames of latents, shown, reported and sampled with it."""
    run = from_mapping(importlib.import_module(f"configs.{name}").get_config("tiny").to_dict())
    rng, media = np.random.default_rng(1), run.media
    path = tiny.write_latents(tmp_path / "latents", rng.normal(size=(8, 3, 4, 6, 4)), rng.normal(size=(8, 6, 8)))
    params = params_of(init_network, run.model)
    workdir.write_converted(tmp_path / "teacher", Predictor(run.model), params)
    kind, halves = convert.name_of(media.vae), {"wan_vae": wan_vae, "wan22_vae": wan22_vae}
    decoder = params_of(halves[kind].init, media.vae)
    write_tensors(tmp_path / "vae", convert.to_reference(kind, decoder, media.vae, "official"))
    text_encoder = params_of(t5.init, media.text_encoder)
    layout = "official" if media.text_encoder.model_type == "umt5" else "transformers"
    tensors = convert.to_reference(media.text_encoder.model_type, text_encoder, media.text_encoder, layout)
    write_tensors(tmp_path / "t5", tensors)

    changes = {"data.path": path, "teacher": str(tmp_path / "teacher"), "train.steps": run.rcm.warmup + 3}
    changes |= {"media.vae_path": str(tmp_path / "vae"), "train.sample_every": 3, "train.checkpoint_every": 50}
    trained = pipeline.train(revise(run, changes), tmp_path / "run")
    rows = read_metrics(trained.folder)
    assert {"scm/loss", "dmd/loss", "critic/loss"} <= set().union(*rows)
    batch = trained.dataset.train[np.arange(8)]
    assert batch["x0"].shape[1:] == run.data.shape and batch["cond"]["known"].shape == (8, 1, 4, 6, 4)
    with av.open(str(next((trained.folder / "samples").glob("*.mp4")))) as file:
        assert sum(1 for _ in file.decode(video=0)) == 9  # the frame that was given, and 4 for each of latents

    files = {"text_encoder": tmp_path / "t5", "tokenizer": world / "tokenizer", "vae": tmp_path / "vae"}
    generator = rcm_jax.load(tmp_path / "run", image=world / "wide.png", **files)
    assert generator.frames == 9
    samples = [generator(["a cat"], [0], image=world / f"{image}.png") for image in ("wide", "wide", "other")]
    assert samples[0].whole.shape == (1, 1, 3, *generator.shape[1:])
    np.testing.assert_array_equal(samples[0].whole, samples[1].whole)
    assert relative(samples[2].whole[:, :, 1:], samples[0].whole[:, :, 1:]) > 1e-3
    first = next(samples[0].frames(0, 0)).astype(float)
    size = first.shape[1], first.shape[0]
    shown = read_image(world / "wide.png", size)[None, None].astype(np.float32) / 127.5 - 1
    back = vae.decode(media.vae, decoder, vae.encode(media.vae, decoder, shown))[0, 0]
    np.testing.assert_allclose(first, np.clip(back / 2 + 0.5, 0, 1) * 255, atol=2)


def test_the_size_is_that_of_the_image_in_about_the_area_of_the_config(world):
    assert images.size_like(HIGH, world / "other.png") == (48, 32)  # the config's own
    assert images.size_like(HIGH, world / "square.png") == (32, 32)  # tokens are 16 pixels wide
    real = wan2_2_i2v_a14b.EXPERIMENT
    assert images.size_like(real, world / "other.png") == (768, 512)  # 3:2, of 832 × 480 = 399,360


@pytest.mark.parametrize(
    ("load", "ask", "message"),
    [
        ({}, {}, "name the two networks of a pair"),
        ({"low": "low"}, {}, "none is given for 1 prompts: --image=FILE"),
        ({"low": "low"}, {"image": ["wide.png", "other.png"]}, "2 are given for 1 prompts"),
        ({"low": "low"}, {"image": ["square.png"]}, "40x40 pixels, and samples of 48x32 would cut 33% of it off"),
        ({"low": "low"}, {"image": ["nothing.png"]}, "nothing.png"),
        ({"low": "high"}, {}, "for noise from 0.9 on, but"),
        ({"low": "teacher_low"}, {}, "say --mode="),
        ({"low": "low"}, {"image": ["wide.png"], "low_guidance": 2.0}, "pair of teachers"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(pair, world, files, load, ask, message):
    given = {name: world / folder for name, folder in load.items()}
    image = [world / name for name in ask.get("image", [])]
    with pytest.raises((ValueError, OSError), match=message):
        generate.request(rcm_jax.load(pair[0], **given, **files), ["a"], **(ask | {"image": image}))


def test_a_network_of_text_takes_no_image_and_clip_features_are_asked_for(world):
    clip = from_mapping(wan_i2v_14b.get_config("tiny").to_dict())
    assert images.taken(clip.model, clip.data.shape) == {"y", "clip_features"}
    assert images.taken(HIGH.model, HIGH.data.shape) == {"y"}


@pytest.mark.parametrize("name", ["wan_i2v_14b", "wan2_2_ti2v_5b", "cosmos_v2w_2b"])
def test_nothing_that_a_network_is_told_of_the_image_is_lost(name):
    """F and its tangent change with y, with clip_features, with known frames."""
    run = from_mapping(importlib.import_module(f"configs.{name}").get_config("tiny").to_dict())
    run = revise(run, {"model.dtype": "float32", "model.remat": "none"})
    batch = jax.tree.map(
        lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), zeros(run, run.data.shape).first
    )
    network, params = make_network(run, batch), params_of(init_network, run.model)

    @jax.jit
    def answer(cond):
        def F(x, t):
            return network.F(params, x, t, cond)

        return jax.jvp(F, (batch["x0"], jnp.full(1, 1.2)), (batch["x0"], jnp.ones(1)))

    before = answer(batch["cond"])
    told = images.taken(run.model, run.data.shape)
    assert told == {"wan_i2v_14b": {"y", "clip_features"}}.get(name, {"known"})
    for condition in told:
        after = answer(batch["cond"] | {condition: -batch["cond"][condition]})
        assert relative(after[0], before[0]) > 1e-3 and relative(after[1], before[1]) > 1e-3, condition


def test_data_and_network_must_agree_on_what_is_told_of_the_image(world, tmp_path):
    rng = np.random.default_rng(0)
    plain = tiny.write_latents(tmp_path / "plain", rng.normal(size=(8, 2, 4, 6, 4)), rng.normal(size=(8, 6, 8)))
    with pytest.raises(ValueError, match=r"takes y, which the data lack: .* --first_frame"):
        pipeline.train(revise(HIGH, {"data.path": plain, "teacher": "random"}), tmp_path / "run")
    t2v = from_mapping(wan2_2_t2v_a14b.get_config("tiny").to_dict())
    with pytest.raises(ValueError, match="does not take y, which the data have"):
        pipeline.train(revise(t2v, {"data.path": str(world / "latents"), "teacher": "random"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"model.known_frames is 0 and data.known_frames 1: they must be the same"):
        revise(HIGH, {"data.known_frames": 1})


def test_the_image_stands_beside_a_preview(tmp_path):
    params = params_of(wan_vae.init, MEDIA.vae)
    frame = np.tanh(np.random.default_rng(0).normal(size=(32, 48, 3))).astype(np.float32)
    beside = pixels.first_frames(MEDIA, params, {"y": first_frame(MEDIA.vae, params, frame, 2)[None]})
    back = vae.decode(MEDIA.vae, params, vae.encode(MEDIA.vae, params, frame[None, None]))[0, 0]
    np.testing.assert_allclose(beside[0], np.clip(back / 2 + 0.5, 0, 1) * 255, atol=1)
    x0 = np.random.default_rng(1).normal(size=(1, 2, 4, 6, 4)).astype(np.float32)
    path, drawn = pixels.write_together(tmp_path / "1", MEDIA, params, x0, "step 1", beside)
    with av.open(str(path)) as file:
        assert file.streams.video[0].width >= 2 * 48
    np.testing.assert_array_equal(drawn[-32 - 4 : -4, 4 : 4 + 48], beside[0])


@pytest.mark.slow
def test_what_a_trained_network_makes_begins_with_the_image_that_it_was_given(tmp_path):
    """Videos of latents that fade from a first frame; docs/image_to_video.md has the numbers."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(512, 1, 4, 6, 4)) * np.ones((512, 2, 1, 1, 1))
    first[:, 1] *= 0.5
    y = np.concatenate([np.zeros_like(first), first], axis=-1)
    y[:, 0, ..., :4], y[:, 1] = 1, 0
    path = tiny.write_latents(tmp_path / "latents", first, np.zeros((512, 6, 8)), y=y)
    run = from_mapping(wan_i2v_14b.get_config("tiny").to_dict())
    changes = {"model.clip_dim": 0, "model.dim": 64, "model.ffn_dim": 128, "model.dtype": "float32"}
    changes |= {"model.remat": "none", "media.image_encoder": None, "data.path": path, "seed": 1}
    optimizer = OptimizerConfig(2e-3, b1=0.9, warmup_steps=100)
    changes["pretrain"] = PretrainConfig(
        DiffusionMethod(optimizer=optimizer), TrainConfig(2000, 32, log_every=200, sample_every=2000)
    )
    changes["rcm"] = revise(run.rcm, {"guidance": 1.0, "student.learning_rate": 2e-4, "fake_score.learning_rate": 2e-4})
    changes["train"] = TrainConfig(400, 32, log_every=100, sample_every=400)
    trained = pipeline.train(revise(run, changes), tmp_path / "run")
    batch = trained.dataset.train[np.arange(16)]
    key, cond = jax.random.key(0), batch["cond"]
    samplers = {"teacher": (trained.program.teacher_sampler(), trained.teacher.params)}
    samplers |= {f"student {k}": (s, trained.state.ema) for k, s in trained.program.student_samplers((1, 4)).items()}
    for name, (sampler, params) in samplers.items():
        with jax.set_mesh(trained.program.mesh):
            x0 = np.asarray(sampler(params, key, np.arange(16), cond, (2, 4, 6, 4)))
        wanted = cond["y"][:, 0, ..., 4:]
        own, other = relative(x0[:, 0], wanted), relative(x0[:, 0], np.roll(wanted, 1, axis=0))
        print(f"{name}: {own:.3f} from its image, {other:.3f} from another")
        assert own < 0.5 and other > 1

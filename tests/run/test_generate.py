"""How prompts are sampled: sizes, batches, progress, and what is refused; the whole way is in tests/scripts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cosmos_0_6b, cosmos_2b, digits, imagenet512, wan_1_3b
from rcm_jax import convert
from rcm_jax.convert.files import write_tensors
from rcm_jax.data import LatentsConfig
from rcm_jax.method import samplers
from rcm_jax.models import sd_vae, wan_vae
from rcm_jax.run import generate, pixels, workdir
from rcm_jax.util.config import revise
from tests import tiny, wan

WAN, COSMOS = wan_1_3b.tiny(wan_1_3b.EXPERIMENT), cosmos_2b.tiny(cosmos_2b.EXPERIMENT)


def student(run, dataset=None):
    return generate.Generator("", None, False, run, dataset, {})


@pytest.mark.smoke
def test_sizes_of_pixels_become_those_of_latents():
    real = wan_1_3b.EXPERIMENT
    assert generate.latents_shape(real, None, None) == (20, 60, 104, 16)
    assert generate.latents_shape(real, (1280, 720), 81) == (21, 90, 160, 16)
    assert generate.latents_shape(COSMOS, (64, 32), None) == (1, 4, 8, 4)
    dataset = generate.prompts_dataset(real)
    assert generate.Generator(None, None, False, real, dataset, {}).frames == 77


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(size=(50, 32)), "width 50 must be a multiple of 16: nearest are 48 and 64"),
        (dict(size=(32, 8)), "height 8 must be a multiple of 16: nearest are 16$"),
        (dict(frames=6), r"6 frames must be 1 \+ 4n: nearest are 5 and 9"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate.prompts_dataset(WAN, **arguments)


def test_configs_that_do_not_fit_themselves_are_refused():
    for run in (digits.EXPERIMENT, cosmos_0_6b.EXPERIMENT):
        with pytest.raises(ValueError, match="nothing says how prompts and pixels are made"):
            generate.prompts_dataset(run)
    other = revise(WAN, {"data.shape": (2, 4, 6, 5)})
    with pytest.raises(ValueError, match=r"latents of shape \[2, 4, 6, 5\] must be .* with the 4 channels"):
        generate.prompts_dataset(other)
    with pytest.raises(ValueError, match=r"more than the .* of max_frames, max_img_h and max_img_w"):
        generate.prompts_dataset(revise(COSMOS, {"model.max_img_w": 4}))


def test_weights_of_another_model_are_refused_before_they_are_read(tmp_path):
    media = WAN.media
    decoder = jax.tree.map(np.asarray, tiny.random_params(wan_vae.init, media.vae))
    write_tensors(tmp_path / "vae", convert.to_reference("wan_vae", decoder, media.vae, "diffusers"))
    assert generate.open_weights(media.vae, tmp_path / "vae")
    with pytest.raises(ValueError, match="are no umt5 of this config"):
        generate.open_weights(media.text_encoder, tmp_path / "vae")


def test_a_sample_depends_on_its_prompt_and_seed_alone_and_every_step_is_counted():
    run, ticks, shape = WAN, [], WAN.data.shape
    F = generate.counted(
        wan.velocity(dataclasses.replace(run.model, dtype="float32", remat="none")), lambda: ticks.append(1)
    )
    sampler = generate.make_sampler(student(run), F, 2, None, None)
    texts, params = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32), wan.random_params()
    together = generate.draw(sampler, params, {"text": texts}, [5, 6], shape, batch=4)
    jax.effects_barrier()
    assert together.shape == (3, 2, *shape) and len(ticks) == 2 * 2  # two batches of two steps
    alone = generate.draw(sampler, params, {"text": texts[1:2]}, [6], shape, batch=8)  # of which one is asked for
    np.testing.assert_allclose(together[1, 1], alone[0, 0], rtol=1e-4, atol=1e-4)
    noise = samplers.unit_noise(jax.random.fold_in(jax.random.key(0), 0), [6], shape)
    assert not np.allclose(together[1, 0], together[1, 1]) and jnp.std(noise) > 0.8


def test_frames_are_bytes_whatever_the_tiles():
    media = WAN.media
    params = tiny.random_params(wan_vae.init, media.vae)
    x0 = np.random.default_rng(0).normal(size=(2, 2, 2, 4)).astype(np.float32)
    one_by_one = list(pixels.frames(media, params, x0))
    assert len(one_by_one) == 5 and one_by_one[0].dtype == np.uint8 and one_by_one[0].shape == (16, 16, 3)
    np.testing.assert_array_equal(one_by_one, list(pixels.frames(media, params, x0, tile=8)))


def test_devices_share_the_samples_and_what_is_left_the_tokens():

    def shape(batch):  # 2 heads, 2 × 2 × 3 tokens; eight devices
        return tuple(generate.make_sampling_mesh(WAN, WAN.data.shape, batch).shape.values())

    assert (shape(1), shape(4), shape(8), shape(6)) == ((4, 1, 2), (1, 4, 2), (1, 8, 1), (2, 2, 2))


def test_guidance_is_asked_of_a_student_that_has_learned_a_range(monkeypatch):
    monkeypatch.setattr(generate.checkpoint, "params_of", lambda *_: None)
    plain, taught = digits.EXPERIMENT, imagenet512.tiny(imagenet512.EXPERIMENT)  # 1 to 2, samples with 1.4

    def asked(run, of_teacher=False, **options):
        generator = dataclasses.replace(student(run, generate.zeros(run, (8, 8, 4))), of_teacher=of_teacher)
        return generate.request(generator, [3], **options).guidance

    assert asked(plain) is None and asked(plain, True) == plain.rcm.guidance and asked(plain, True, guidance=9) == 9
    assert asked(taught) == 1.4 and asked(taught, guidance=1.9) == 1.9
    with pytest.raises(ValueError, match=r"guidance 2\.1 is not one that this student has learned: 1 to 2"):
        asked(taught, guidance=2.1)
    with pytest.raises(ValueError, match="--guidance is for teachers: this student was distilled with guidance"):
        asked(plain, guidance=1.5)
    with pytest.raises(ValueError, match="--negative_prompt is for teachers"):
        asked(taught, negative_prompt="")


def test_a_teacher_of_latents_with_classes_knows_its_pixels_or_its_config_does(tmp_path):
    media = {"vae": sd_vae.PUBLISHED["sd-vae-ft-mse"], "text_encoder": None}
    run = revise(digits.EXPERIMENT, {"data": LatentsConfig(shape=(64, 64, 4)), "media": revise(WAN.media, media)})
    workdir.claim(tmp_path / "knows", run.pretraining)
    knows = generate.load(tmp_path / "knows", vae="vae")
    assert knows.of_classes and knows.media == run.media and knows.shape == (64, 64, 4)
    workdir.claim(tmp_path / "teacher", revise(run, {"media": None}).pretraining)
    plain = generate.load(tmp_path / "teacher")
    assert plain.of_classes and plain.media is None and plain.dataset.uncond == {"label": 10} and plain.frames == 1
    with pytest.raises(ValueError, match="of weights around it none"):
        generate.load(tmp_path / "teacher", vae="vae")
    shown = generate.load(tmp_path / "teacher", config=run, vae="vae")
    assert shown.of_classes and shown.media == run.media and shown.shape == (64, 64, 4) and shown.frames == 1
    with pytest.raises(ValueError, match="of weights around it vae"):
        generate.load(tmp_path / "teacher", config=run, tokenizer="here")


def test_a_student_is_given_the_guidance_as_a_condition():
    seen = []

    def F(params, x, t, cond):
        seen.append(cond)
        return x * cond["guidance"][:, None]

    sampler = generate.make_sampler(student(digits.EXPERIMENT), F, 1, 1.5, None)
    x0 = sampler({}, jax.random.key(0), np.arange(3, dtype=np.uint32), {"label": np.zeros(3, np.int32)}, (2,))
    assert x0.shape == (3, 2) and seen[0].keys() == {"label", "guidance"} and seen[0]["guidance"].shape == (3,)

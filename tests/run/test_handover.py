"""What is handed to diffusers: its pipeline makes our samples, and what it does with adapters is what we do."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from configs import (
    cosmos_2b,
    cosmos_v2w_2b,
    digits,
    wan2_2_i2v_a14b,
    wan2_2_ti2v_5b,
    wan_1_3b,
    wan_i2v_14b,
)
from rcm_jax import convert
from rcm_jax.convert import adapters
from rcm_jax.method import samplers
from rcm_jax.models.adapters import Adapted, whole
from rcm_jax.models.wan import Wan, WanConfig
from rcm_jax.run import card, handover
from rcm_jax.util.config import revise
from tests import tiny, wan

MODEL = WanConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16
)


@pytest.fixture(scope="module")
def kept(golden):
    """(values recorded from diffusers, our parameters, the folder)."""
    folder = golden / "diffusers_student"
    with np.load(folder / "student.npz") as values:
        arrays = dict(values)
    params = convert.from_reference("wan", load_file(folder / "student.diffusers.safetensors"), MODEL)
    return arrays, params, folder


@pytest.mark.golden
def test_the_pipeline_of_diffusers_makes_the_samples_of_our_few_steps(kept):
    arrays, params, folder = kept
    times = samplers.student_times(80.0, (1.3, 1.0, 0.6))
    np.testing.assert_allclose(times, arrays["times"], rtol=1e-6)
    noise = jnp.moveaxis(jnp.asarray(arrays["noise"]), -4, -1)  # [steps, b, t, h, w, c]
    start = noise.at[0].multiply(np.sin(times[0]))  # the pipeline starts from sigma·noise
    x0 = samplers.few_step(wan.velocity(MODEL), params, start, times, {"text": jnp.asarray(arrays["text"])})
    np.testing.assert_allclose(jnp.moveaxis(x0, -1, -4), arrays["x0"], atol=2e-5)
    config = json.loads((folder / "student.config.json").read_text())
    assert config["scheduler"].items() <= handover.SCHEDULER.items()
    run = revise(wan_1_3b.EXPERIMENT, {"sampling.mid_times": ((), (1.3,), (1.3, 1.0), (1.3, 1.0, 0.6))})
    sigmas = np.sin(arrays["times"]) / (np.sin(arrays["times"]) + np.cos(arrays["times"]))
    np.testing.assert_allclose(handover.sigmas(run, 4), sigmas, atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("layout", adapters.LAYOUTS)
def test_an_adapter_does_here_what_it_does_there_and_is_written_as_it_was_read(kept, tmp_path, layout):
    arrays, params, folder = kept
    adapter = adapters.read(folder / layout, "wan", MODEL)
    assert adapter.scale == pytest.approx(7 / 3)
    x, t, text = (jnp.asarray(arrays[name]) for name in ("x", "t", "text"))
    both = {"params": whole(Adapted(params, adapter.tree, adapter.scale))}
    v = jnp.moveaxis(Wan(MODEL).apply(both, jnp.moveaxis(x, -4, -1), t, text=text), -1, -4)
    assert tiny.relative(v, arrays[f"v_{layout}"]) < 1e-5
    assert tiny.relative(arrays["v"], arrays[f"v_{layout}"]) > 0.1
    (name, *beside) = adapters.write(tmp_path / "out", "wan", MODEL, adapter, layout)
    ours, theirs = load_file(tmp_path / "out" / name), load_file(folder / layout / name)
    assert ours.keys() == theirs.keys()
    for tensor, values in theirs.items():
        np.testing.assert_array_equal(ours[tensor], values)
    for other in beside:
        there, here = (json.loads((place / other).read_text()) for place in (folder / layout, tmp_path / "out"))
        assert here == there


BASE = {"base": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "licence": "apache-2.0"}


def python_of(text: str) -> str:
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    return code


def front_matter(text: str) -> dict:
    begin, header, _ = text.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(header)


def test_the_index_of_a_pipeline_names_what_is_in_the_folder():
    run = wan_1_3b.EXPERIMENT
    for all_parts in (False, True):
        files = {name: json.loads(text) for name, text in handover.files(run, all_parts).items()}
        assert files.keys() == {"model_index.json", "scheduler/scheduler_config.json"}
        index = files["model_index.json"]
        assert index.pop("_class_name") == "WanPipeline"
        assert index.keys() == {"scheduler", "transformer"} | (handover.components(run).keys() if all_parts else set())
        assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
        assert index["scheduler"][1] == files["scheduler/scheduler_config.json"]["_class_name"]
    assert "image_encoder" in handover.components(wan_i2v_14b.EXPERIMENT)
    assert "image_encoder" not in handover.components(wan2_2_i2v_a14b.EXPERIMENT)


def test_the_card_says_how_to_sample():
    run = wan_1_3b.EXPERIMENT
    text = card.card(run, "my-student", **BASE, code=True)
    assert front_matter(text) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "base_model": BASE["base"],
        "license": "apache-2.0",
        "tags": ["rcm", "distillation", "few-step"],
    }
    assert "# my-student" in text and "1 to 4 steps, where the teacher takes 50" in text and "by rCM" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert rows[1] == "| 2 | 0.9877, 0.9338 | 987.7, 933.8 |" and len(rows) == 4
    code = python_of(text)
    assert f"sigmas = {handover.sigmas(run, 4)}" in code and "guidance_scale=1.0" in code
    assert "torch.randn(1, 16, 20, 60, 104)" in code and "height=480, width=832, num_frames=77" in code
    assert 'folder, base = "my-student", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"' in code
    assert 'folder, base = "my-student", "my-student"' in card.card(run, "my-student", code=True, whole=True)


def test_the_card_does_not_invent_what_nobody_told():
    untold = card.card(wan_1_3b.EXPERIMENT, "x")
    assert front_matter(untold).keys() == {"library_name", "pipeline_tag", "tags"}
    assert untold.count("not told") == 2 and "```" not in untold
    strange = card.card(wan_1_3b.EXPERIMENT, "x", base='a: "b"', licence="- c")
    assert front_matter(strange)["base_model"] == 'a: "b"' and front_matter(strange)["license"] == "- c"


def test_cosmos_counts_noise_over_data_and_a_pair_has_ranges():
    run = cosmos_2b.EXPERIMENT
    assert handover.sigmas(run, 2) == pytest.approx([80.0, np.tan(1.3)], rel=1e-5)
    text = card.card(run, "x", code=True)
    assert "| 2 | 80.0000, 3.6021 | 987.7, 782.7 |" in text and front_matter(text)["pipeline_tag"] == "text-to-image"
    assert "few = [80.0, 3.60" in python_of(text)
    pair = card.card(wan2_2_i2v_a14b.EXPERIMENT, "x")
    assert "for timesteps from 900 to 1000. Another" in pair and "| 4 | " in pair and "Another" not in text
    from_image = card.card(wan_i2v_14b.EXPERIMENT, "x", code=True)
    assert front_matter(from_image)["pipeline_tag"] == "image-to-video"
    assert 'image=load_image("first.png"), prompt=' in python_of(from_image) and "num_frames=81" in from_image


def test_the_header_of_a_file_says_how_to_sample():
    (name, told), *rest = handover.metadata(wan_1_3b.EXPERIMENT).items()
    assert name == "few_step_sigmas" and not rest
    assert json.loads(told)["4"] == handover.sigmas(wan_1_3b.EXPERIMENT, 4)


def test_what_has_no_pipeline_is_refused():
    for run in (cosmos_v2w_2b.EXPERIMENT, wan2_2_ti2v_5b.EXPERIMENT, wan2_2_i2v_a14b.EXPERIMENT):
        assert handover.is_student(run)
        with pytest.raises(ValueError, match=r"--pipeline is for text to image, text to video and Wan2\.1's image"):
            handover.check(run)
    other = dataclasses.replace(wan_1_3b.EXPERIMENT, time_scale=1.0)
    for run in (wan_1_3b.EXPERIMENT.pretraining, digits.EXPERIMENT, other):
        with pytest.raises(ValueError, match="--pipeline is for students"):
            handover.check(run)

"""What is handed to diffusers: its pipeline makes our samples, and what it does with adapters is what we do."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import cosmos_2b, wan2_2_i2v_a14b, wan_1_3b
from rcm_jax import convert
from rcm_jax.convert import adapters
from rcm_jax.method import samplers
from rcm_jax.models.adapters import Adapted, whole
from rcm_jax.models.wan import Wan, WanConfig
from rcm_jax.run import handover
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


def test_a_pipeline_names_its_parts_and_the_card_says_how_to_sample():
    run = wan_1_3b.EXPERIMENT
    files = handover.files(run, folder="out/my-student", base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", licence="apache-2.0")
    assert files.keys() == {"model_index.json", "scheduler/scheduler_config.json", "README.md"}
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "WanPipeline" and index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert index["scheduler"][1] == json.loads(files["scheduler/scheduler_config.json"])["_class_name"]
    card = files["README.md"]
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-video\n")
    assert "license: apache-2.0" in card and "base_model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in card
    assert "# my-student" in card and "guidance_scale=1.0" in card and "| 1 | 0.98" in card
    most = len(run.sampling.mid_times)
    assert f"sigmas = {handover.sigmas(run, most)}" in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    untold = handover.card(run)
    assert "license:" not in untold and "base_model" not in untold and "not told" in untold


def test_what_has_no_pipeline_is_refused():
    for run in (cosmos_2b.EXPERIMENT, wan2_2_i2v_a14b.EXPERIMENT):
        with pytest.raises(ValueError, match="--pipeline is for Wan text to video and image to video with"):
            handover.check(run)
    with pytest.raises(ValueError, match="--pipeline is for students"):
        handover.check(wan_1_3b.EXPERIMENT.pretraining)

"""Adapters as a user meets them: trained, exported alone and merged, extracted from two networks."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from rcm_jax import convert
from rcm_jax.convert import adapters
from rcm_jax.convert.files import read_metadata
from rcm_jax.models.adapters import flat
from rcm_jax.run import weights
from rcm_jax.train import checkpoint
from tests import wan
from tests.scripts.conftest import assert_refused
from tests.scripts.test_checkpoints import published as published
from tests.scripts.test_checkpoints import teacher as teacher


@pytest.fixture(scope="module")
def student(run_script, published, teacher):
    """Six steps of distillation of an adapter."""
    flags = [f"--config.teacher={teacher}", f"--config.data.path={published / 'latents'}"]
    flags += ["--config.adapter.rank=2", "--config.adapter.alpha=4", "--config.rcm.student.learning_rate=0.01"]
    workdir = published / "run"
    process = run_script("train", "--config=configs/wan_1_3b.py:tiny", f"--workdir={workdir}", *flags)
    assert process.returncode == 0, process.stderr
    assert "Wan of 19,640 parameters, 1,984 of an adapter beside them on" in process.stderr
    return workdir


def run_ok(process):
    assert process.returncode == 0, process.stderr
    return process.stdout


def merged(student) -> dict:
    leaves, _ = weights.leaves_of(student)
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


@pytest.mark.parametrize("layout", adapters.LAYOUTS)
def test_it_is_exported_alone_under_the_names_of_others_and_read_again(run_script, tmp_path, student, layout):
    flags = ["--adapter", f"--layout={layout}", f"--dst={tmp_path / 'out'}"]
    run_ok(run_script("export_checkpoint", f"--checkpoint={student}", *flags))
    tree, scale = adapters.read(tmp_path / "out", "wan", wan.TINY)
    ours, _ = checkpoint.restore_params(student, "ema")
    assert scale == 2.0 and flat(tree).keys() == flat(ours).keys()
    assert all(np.array_equal(leaf, flat(ours)[path]) for path, leaf in flat(tree).items())


def test_merged_it_is_one_file_for_comfyui_or_a_pipeline_for_diffusers(run_script, tmp_path, student):
    file = tmp_path / "x.safetensors"
    run_ok(run_script("export_checkpoint", f"--checkpoint={student}", "--layout=official", f"--dst={file}"))
    assert file.is_file() and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    again = flat(convert.from_reference("wan", load_file(file), wan.TINY))
    for path, leaf in merged(student).items():
        np.testing.assert_array_equal(again[path], leaf)
    assert json.loads(read_metadata(file)["few_step_sigmas"])["1"] == pytest.approx([0.987654], abs=1e-6)
    flags = ["--pipeline", "--base=some/base", f"--dst={tmp_path / 'pipe'}"]
    run_ok(run_script("export_checkpoint", f"--checkpoint={student}", *flags))
    names = {"README.md", "model_index.json", "scheduler", "transformer"}
    assert {path.name for path in (tmp_path / "pipe").iterdir()} == names
    assert json.loads((tmp_path / "pipe" / "transformer" / "config.json").read_text())["num_layers"] == 2
    assert 'base_model: "some/base"' in (tmp_path / "pipe" / "README.md").read_text()


def test_a_file_is_merged_into_what_is_exported(run_script, tmp_path, student, teacher):
    file = tmp_path / "lora.safetensors"
    run_ok(run_script("export_checkpoint", f"--checkpoint={student}", "--adapter", f"--dst={file}"))
    flags = [f"--merge={file}", "--layout=official", f"--dst={tmp_path / 'out'}"]
    run_ok(run_script("export_checkpoint", f"--checkpoint={teacher}", *flags))
    again = flat(convert.from_reference("wan", load_file(next((tmp_path / "out").glob("*.safetensors"))), wan.TINY))
    for path, leaf in merged(student).items():
        np.testing.assert_allclose(again[path], leaf, atol=0.02)  # whose base was rounded to bfloat16


def test_one_is_extracted_from_a_student_and_its_teacher(run_script, tmp_path, published, student, teacher):
    (tmp_path / "tiny.json").write_text(json.dumps(dataclasses.asdict(wan.TINY) | {"kind": "wan"}))
    flags = [f"--model={tmp_path / 'tiny.json'}", f"--base={published / 'weights'}", f"--tuned={student}", "--rank=24"]
    out = run_ok(run_script("extract_lora", *flags, "--dtype=float32", f"--dst={tmp_path / 'out'}"))
    assert "blocks/mlp/up: changed by" in out and "all of these: changed by" in out
    tree, scale = adapters.read(tmp_path / "out", "wan", wan.TINY)
    base, wanted = flat(wan.random_params()), merged(student)
    for path in {path.rpartition("/")[0] for path in flat(tree)}:
        change = scale * np.matmul(*(np.asarray(flat(tree)[f"{path}/{name}"]) for name in ("lora_a", "lora_b")))
        again = np.asarray(base[f"{path}/kernel"]) + change
        np.testing.assert_allclose(again, wanted[f"{path}/kernel"], atol=1e-5)


def test_what_cannot_be_exported_so_is_refused(run_script, tmp_path, student, teacher):
    def refused(folder, *flags):
        process = run_script("export_checkpoint", f"--checkpoint={folder}", f"--dst={tmp_path / 'out'}", *flags)
        assert not (tmp_path / "out").exists()
        return process

    assert_refused(refused(teacher, "--adapter"), "holds whole parameters; scripts/extract_lora.py")
    assert_refused(refused(student, "--adapter", "--layout=rcm"), "layouts diffusers, peft, official")
    assert_refused(refused(teacher, "--pipeline"), "--pipeline is for students")
    assert_refused(refused(teacher, "--base=x"), "--base and --licence are for the model card")
    assert_refused(refused(student, f"--around={tmp_path}"), "--around is for --pipeline")
    assert_refused(refused(student, "--pipeline", "--item=fake_score"), "fake_score is not sampled in few steps")
    assert_refused(refused(student, "--pipeline", f"--around={tmp_path}"), "has no folder vae, text_encoder, tokenizer")
    file = f"--dst={tmp_path / 'x.safetensors'}"
    assert_refused(run_script("export_checkpoint", f"--checkpoint={student}", file), "config.json", "name a folder")
    (tmp_path / "x.safetensors").write_text("")
    process = run_script("export_checkpoint", f"--checkpoint={student}", file, "--layout=official")
    assert_refused(process, "is there: choose another name")
    assert "--overwrite" not in process.stderr  # which there is not

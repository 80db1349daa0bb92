"""From published weights through training to published weights again, as a user does it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import wan_1_3b, wan_14b
from rcm_jax import convert
from rcm_jax.convert.files import write_tensors
from rcm_jax.data import latents
from rcm_jax.run import program
from rcm_jax.train import checkpoint
from tests import wan
from tests.scripts.conftest import assert_refused, snapshot
from tests.tiny import assert_trees_equal
from tests.torch_pickle import Call, Name, save, save_state_dict

PARAMS = jax.tree.map(np.asarray, wan.random_params())
TENSORS = convert.to_reference("wan", PARAMS, wan.TINY, "official")
TEXT = (wan.TINY.text_len, wan.TINY.text_dim)


def examples(count=24):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            name: rng.normal(size=shape).astype(np.float32) for name, shape in (("x0", (2, 4, 6, 4)), ("text", TEXT))
        }


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with tiny weights as Wan-AI publishes large ones, their sizes, and latents to train on."""
    folder = tmp_path_factory.mktemp("published")
    write_tensors(folder / "weights", TENSORS, shard_bytes=30_000)
    (folder / "tiny.json").write_text(json.dumps(dataclasses.asdict(wan.TINY) | {"kind": "wan"}))
    latents.write(folder / "latents", examples(), {"text": np.zeros(TEXT, np.float32)})
    return folder


@pytest.fixture(scope="module")
def teacher(run_script, published):
    """The converted weights."""
    flags = [f"--model={published / 'tiny.json'}", f"--src={published / 'weights'}", f"--dst={published / 'teacher'}"]
    process = run_script("convert_checkpoint", *flags)
    assert process.returncode == 0, process.stderr
    assert "69 tensors, 19,640 parameters, float32" in process.stdout
    return published / "teacher"


@pytest.fixture(scope="module")
def student(run_script, published, teacher):
    """Six steps of distillation on eight devices: warm-up, student and critic."""
    flags = [f"--config.teacher={teacher}", f"--config.data.path={published / 'latents'}"]
    workdir = published / "run"
    process = run_script("train", "--config=configs/wan_1_3b.py:tiny", f"--workdir={workdir}", *flags, devices=8)
    assert process.returncode == 0, process.stderr
    assert "trained in" in process.stdout
    return workdir


def test_converted_weights_are_the_published_ones(teacher):
    params, step = checkpoint.restore_params(teacher, "ema")
    assert step == 0
    assert_trees_equal(params, PARAMS)


def test_a_student_is_trained_from_converted_weights_in_every_phase(student):
    rows = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6] and "preview/std" in rows[-1]
    names = set().union(*rows)
    assert {"scm/loss", "dmd/loss", "critic/loss"} <= names
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert not any(row.get("student/skipped") or row.get("critic/skipped") for row in rows)
    trained, _ = checkpoint.restore_params(student, "student")
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), trained, PARAMS)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-4  # learning rate 2e-6, four updates


@pytest.mark.parametrize("item", ["ema", "student", "fake_score"])
def test_a_student_is_exported_and_converted_back_to_the_same_bits(run_script, tmp_path, student, item):
    layout = {"ema": "diffusers", "student": "official", "fake_score": "rcm"}[item]
    flags = [f"--item={item}", f"--layout={layout}", f"--dst={tmp_path / 'out'}", "--shard_gb=3e-5"]
    process = run_script("export_checkpoint", f"--checkpoint={student}", *flags)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(".safetensors,") == 3  # shards
    path = tmp_path / "out" / "config.json"
    written = json.loads(path.read_text())["_class_name"] if path.exists() else None
    assert written == {"diffusers": "WanTransformer3DModel", "official": "WanModel", "rcm": None}[layout]
    card = tmp_path / "out" / "README.md"
    assert card.exists() == (item != "fake_score") and (not card.exists() or "| 4 | 0.9877, 0.9338" in card.read_text())
    (tmp_path / "tiny.json").write_text(json.dumps(dataclasses.asdict(wan.TINY) | {"kind": "wan"}))
    back = [f"--model={tmp_path / 'tiny.json'}", f"--src={tmp_path / 'out'}", f"--dst={tmp_path / 'back'}"]
    process = run_script("convert_checkpoint", *back)
    assert process.returncode == 0, process.stderr
    assert repr(layout) in process.stdout
    ours, _ = checkpoint.restore_params(student, item)
    assert_trees_equal(checkpoint.restore_params(tmp_path / "back", "ema")[0], ours)


def test_an_export_in_bfloat16_is_one_file_of_rounded_weights(run_script, tmp_path, teacher):
    flags = ["--layout=official", "--dtype=bfloat16", f"--dst={tmp_path / 'out'}"]
    process = run_script("export_checkpoint", f"--checkpoint={teacher}", *flags)
    assert process.returncode == 0, process.stderr
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == TENSORS.keys()
    wide = {name for name, tensor in written.items() if tensor.dtype == np.float32}
    assert wide == {name for name in TENSORS if any(part in name for part in ("time_embedding", "modulation", "norm3"))}
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(written[name], tensor.astype(written[name].dtype), strict=True)
        assert written[name].dtype in ("bfloat16", "float32")


def test_a_pth_of_several_networks_is_converted_by_prefix(run_script, tmp_path, published):
    both = {f"net.{name}": 2 * tensor for name, tensor in TENSORS.items()}
    both |= {f"net_ema.{name}": tensor for name, tensor in TENSORS.items()}
    path = save_state_dict(tmp_path / "m.pth", both)
    flags = [f"--model={published / 'tiny.json'}", f"--src={path}", f"--dst={tmp_path / 'dst'}"]
    assert_refused(run_script("convert_checkpoint", *flags), "net., net_ema.", "prefix")
    process = run_script("convert_checkpoint", *flags, "--prefix=net_ema", "--dtype=bfloat16")
    assert process.returncode == 0, process.stderr
    assert "rounded to bfloat16" in process.stdout
    params, _ = checkpoint.restore_params(tmp_path / "dst", "ema")
    assert_trees_equal(params, jax.tree.map(lambda p: p.astype("bfloat16"), PARAMS))


def test_a_dry_run_writes_nothing(run_script, tmp_path, published, teacher):
    before = snapshot(published)
    flags = [f"--model={published / 'tiny.json'}", f"--src={published / 'weights'}", f"--dst={tmp_path / 'dst'}"]
    process = run_script("convert_checkpoint", *flags, "--dry_run")
    assert process.returncode == 0 and "'official'" in process.stdout and "nothing was written" in process.stdout
    process = run_script("export_checkpoint", f"--checkpoint={teacher}", f"--dst={tmp_path / 'dst'}", "--dry_run")
    assert process.returncode == 0 and "nothing was written" in process.stdout
    assert list(tmp_path.iterdir()) == []
    assert snapshot(published) == before


def malicious(path):
    marker = path.with_name("executed")
    save(path, Call(Name("os", "system"), (f"touch {marker}",)))


def truncated(path):
    write_tensors(path.parent / "whole", TENSORS)
    data = (path.parent / "whole" / "diffusion_pytorch_model.safetensors").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def without_a_shard(path):
    write_tensors(path, TENSORS, shard_bytes=30_000)
    (path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()


def changed(**changes):
    def make(path):
        tensors = {name: changes.get(name, tensor) for name, tensor in (TENSORS | changes).items()}
        write_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})

    return make


HEAD = "head.head.bias"
BROKEN = {
    "a malicious pickle": ("m.pth", malicious, ["os.system", "executed"]),
    "a truncated file": ("m.safetensors", truncated, ["m.safetensors", "expected", "actual size"]),
    "a missing shard": ("m", without_a_shard, ["00002-of-00003", "missing"]),
    "a missing tensor": ("m", changed(**{HEAD: None}), [HEAD, "missing", "[16]"]),
    "an extra tensor": ("m", changed(more=np.zeros((2, 3), np.float32)), ["more", "unexpected", "[2, 3]"]),
    "a wrong shape": ("m", changed(**{HEAD: np.zeros(5, np.float32)}), [HEAD, "[5]", "[16]"]),
    "a wrong dtype": ("m", changed(**{HEAD: np.zeros(16, np.int8)}), [HEAD, "int8"]),
    "no file": ("m.pth", lambda path: None, ["m.pth", "no such file"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_weights_are_refused_in_one_line_and_nothing_is_written(run_script, tmp_path, published, what):
    name, make, words = BROKEN[what]
    make(tmp_path / name)
    before = snapshot(tmp_path)
    flags = [f"--model={published / 'tiny.json'}", f"--src={tmp_path / name}", f"--dst={tmp_path / 'dst'}"]
    assert_refused(run_script("convert_checkpoint", *flags), *words)
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "dst").exists() and not (tmp_path / "executed").exists()


def test_bad_flags_of_both_scripts_are_refused_in_one_line(run_script, tmp_path, published, teacher):
    weights = f"--src={published / 'weights'}"
    new = f"--dst={tmp_path / 'new'}"
    convert_one = ["convert_checkpoint", weights, f"--model={published / 'tiny.json'}"]
    for script, *flags, words in (
        [*convert_one, f"--dst={published}", ["not an empty folder"]],
        [*convert_one, new, "--prefix=net.", ["69 tensors", "'net.'"]],
        ["convert_checkpoint", weights, new, "--model=wan-2b", ["wan-2b", "wan-1.3b", ".json"]],
        ["convert_checkpoint", weights, new, "--model=wan-14b", ["patch_embedding.weight", "5120"]],
        ["export_checkpoint", f"--checkpoint={teacher}", new, "--layout=mine", ["mine", "official, rcm, diffusers"]],
        ["export_checkpoint", f"--checkpoint={teacher}", new, "--item=student", ["no student", "ema"]],
        ["export_checkpoint", f"--checkpoint={teacher}", new, "--shard_gb=0", ["--shard_gb=0.0 must be above 0"]],
        [*convert_one, "--dst=ftp://host/x", ["ftp://host/x", "no object store that is known here"]],
        ["export_checkpoint", f"--checkpoint={teacher}", new, "--checkpoint_step=3", ["step 3", "[0]"]],
        ["sample", f"--checkpoint={teacher}", f"--out={tmp_path / 'a.png'}", ["--mode=teacher", "--mode=student"]],
    ):
        assert_refused(run_script(script, *flags), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_sizes_or_none_is_refused_before_training(run_script, tmp_path, published, teacher):
    flags = ["--config=configs/wan_1_3b.py:tiny", f"--workdir={tmp_path / 'run'}"]
    data = f"--config.data.path={published / 'latents'}"
    given = f"--config.teacher={teacher}"
    for extra, words in (
        ([data], ["teacher is empty", "convert_checkpoint"]),
        ([data, given, "--config.model.ffn_dim=48"], ["config.model.ffn_dim", "32 there", "48 here"]),
        ([given], ["path is empty"]),
        ([given, data, "--config.data.shape=(2, 4, 8, 4)"], ["[2, 4, 6, 4]", "[2, 4, 8, 4]"]),
    ):
        assert_refused(run_script("train", *flags, *extra), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "name", "tokens"), [(wan_1_3b, "wan-1.3b", 31_200), (wan_14b, "wan-14b", 32_760)])
def test_the_full_configs_build_their_networks_on_their_latents(module, name, tokens):
    run = module.EXPERIMENT
    published = convert.PUBLISHED[name][1]
    assert run.model == dataclasses.replace(published, dtype="bfloat16", remat="full")
    shape = run.data.shape
    assert np.prod(shape[:3]) // 4 == tokens
    dataset = program.zeros(run, shape)
    assert dataset.first["cond"]["text"].shape == (1, 512, 4096)
    boxed = program.make_network(run, dataset.first).boxed
    count = sum(leaf.size for leaf in jax.tree.leaves(boxed))
    assert count == {"wan-1.3b": 1_418_996_800, "wan-14b": 14_288_491_584}[name]

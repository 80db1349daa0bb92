"""Whole runs that train an adapter: on from a checkpoint, from a file, sampled, merged, on several devices, refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from configs import digits, mixture
from rcm_jax.models.adapters import AdapterConfig, flat
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.run import generate, pipeline, previews, weights
from rcm_jax.run.program import assemble, load_data
from rcm_jax.train import checkpoint, trainer
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.util.config import revise
from tests import tiny

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
FAST = OptimizerConfig(0.03, warmup_steps=1)  # in a few steps the output is not zero any more
ADAPTER = AdapterConfig(rank=4, alpha=8.0)


def run(teacher="", adapter: AdapterConfig | None = ADAPTER, **changes):
    """configs/mixture.py with an adapter, and hardly any width or length."""
    loop = dict(steps=5, batch_size=16, log_every=1, checkpoint_every=2, sample_every=4)
    pretrain = {"train": revise(mixture.EXPERIMENT.pretrain.train, loop), "method.optimizer": FAST}
    values = {
        "model": revise(mixture.EXPERIMENT.model, dict(dim=16, num_layers=2, freq_dim=4)),
        "data.examples": 256,
        "train": revise(mixture.EXPERIMENT.train, loop),
        "pretrain": None if teacher else revise(mixture.EXPERIMENT.pretrain, pretrain),
        "exact_teacher": False,
        "rcm.warmup": 0,
        "rcm.student": FAST,
        "rcm.fake_score": FAST,
        "rcm.dmd.update_freq": 2,
        "teacher": str(teacher),
        "adapter": adapter,
        "teacher_dtype": "bfloat16",
    }
    return revise(mixture.EXPERIMENT, values | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return pipeline.train(run(), tmp_path_factory.mktemp("adapter") / "run")


def test_state_and_checkpoint_are_of_the_adapter_alone_and_the_base_is_the_teachers(trained):
    adapter = {path: leaf.shape for path, leaf in flat(trained.state.ema).items()}
    assert adapter == {f"layer_{i}/lora_{x}": s for i in range(2) for x, s in (("a", (16, 4)), ("b", (4, 16)))}
    for item in ("ema", "student", "fake_score"):
        assert {p: x.shape for p, x in flat(checkpoint.params_of(trained.folder, item)[0]).items()} == adapter
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(trained.teacher.params)} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(trained.state.ema)} == {"float32"}
    assert trained.student.base is trained.teacher.params and trained.student.scale == 2.0
    assert any(np.any(leaf) for path, leaf in flat(trained.state.ema).items() if path.endswith("lora_b"))


def test_a_run_that_goes_on_ends_in_the_same_bits(trained, tmp_path):
    pipeline.train(run(trained.teacher_folder, **{"train.steps": 3}), tmp_path)
    again = pipeline.train(run(trained.teacher_folder), tmp_path)
    tiny.assert_trees_equal(again.state, trained.state)


def digits_on_eight(**changes):
    """The program of a run on digits, with nothing allocated."""
    model = revise(digits.MODEL, dict(dim=16, num_layers=2, num_heads=2, patch=4, freq_dim=8))
    config = revise(digits.EXPERIMENT, {"model": model, "adapter": ADAPTER, "mesh.fsdp": 8, "mesh.data": 1} | changes)
    return assemble(config, make_mesh(config.mesh), load_data(config))


def test_base_and_adapter_are_split_over_devices_by_their_wide_axes():
    program = digits_on_eight()
    shards = {
        path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in flat(program.distillation.state.ema).items()
    }
    assert shards["blocks/mlp/up/lora_a"] == (2, 2, 4) and shards["blocks/mlp/up/lora_b"] == (2, 4, 8)
    kernel = flat(program.abstract_inputs()[0].params)["blocks/mlp/up/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 2, 64)


@pytest.mark.slow
def test_on_eight_devices_a_step_is_that_of_one():
    states = []
    for fsdp in (8, 1):
        program = digits_on_eight(**{"mesh.fsdp": fsdp, "mesh.data": 8 // fsdp, "train.batch_size": 8})
        training, key = program.distillation, jax.random.key(0)
        teacher = program.teacher(jax.jit(program.network.make_params)(key))
        state = trainer.place(training, key, program.first)
        batch = jax.tree.map(lambda x: np.repeat(x, 8, 0), program.dataset.first)
        after, _ = training.steps["student"](state.replace(step=state.step + 600), teacher, batch)
        states.append(jax.device_get(after.student.params))
    tiny.assert_trees_close(*states, rtol=1e-3, atol=1e-5)


def test_what_is_sampled_is_the_base_with_the_adapter_and_what_is_merged_gives_the_same(trained):
    generator = generate.load(trained.folder)
    labels, key = np.arange(3, dtype=np.int32), jax.random.key(3)
    samples = generator(labels, seeds=(3,), steps=2).latents[:, 0]
    sampler = trained.program.student_sampler(2)
    direct = previews.draw(sampler, trained.student, key, labels, generator.shape, 3)
    np.testing.assert_allclose(samples, direct, atol=2e-5)  # on other devices
    leaves, step = weights.leaves_of(trained.folder)
    assert step == 5 and leaves.keys() == flat(trained.teacher.params).keys()
    merged = unflatten_dict({path: np.asarray(leaf) for path, leaf in leaves.items()}, sep="/")
    np.testing.assert_allclose(previews.draw(sampler, merged, key, labels, generator.shape, 3), direct, atol=2e-5)
    base = previews.draw(sampler, trained.teacher.params, key, labels, generator.shape, 3)
    assert np.abs(base - direct).max() > 1e-3


def test_a_run_starts_from_the_adapter_of_another_and_from_nothing_else(trained, tmp_path):
    teacher = trained.teacher_folder
    config = run(teacher, start=str(trained.folder), fake_start=str(trained.folder))
    program = assemble(config, make_mesh(MeshConfig(), jax.devices()[:1]), load_data(config))
    starts = pipeline.read_starts(program)
    tiny.assert_trees_equal(starts["student"], trained.state.ema)
    tiny.assert_trees_equal(starts["fake_score"], trained.state.fake_score.params)
    with pytest.raises(ValueError, match=r"holds whole parameters, and this config trains an adapter"):
        pipeline.train(dataclasses.replace(config, start=str(teacher)), tmp_path / "a")
    other = dataclasses.replace(config, adapter=AdapterConfig(rank=2))
    with pytest.raises(ValueError, match=r"holds an adapter \(AdapterConfig\(rank=4.*trains an adapter .*rank=2"):
        pipeline.train(other, tmp_path / "b")
    with pytest.raises(ValueError, match=r"holds an adapter .* and this config trains whole parameters"):
        pipeline.train(dataclasses.replace(config, adapter=None, fake_start=""), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_an_adapter_needs_a_teacher_and_another_rank_another_workdir(trained):
    with pytest.raises(ValueError, match="adapter is beside the parameters of a teacher, and there is none"):
        run(pretrain=None, exact_teacher=True)
    with pytest.raises(ValueError, match=r"belongs to another config: config.adapter.rank is 4 there, 2 here"):
        pipeline.train(run(adapter=AdapterConfig(rank=2, alpha=8.0)), trained.folder)


def test_a_base_that_is_gone_is_told(trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    shutil.rmtree(folder / "teacher")
    with pytest.raises(ValueError, match=r"holds an adapter, beside the weights in .*teacher, which are not there"):
        weights.leaves_of(folder)

"""Meshes, the table from logical to mesh axes, and steps that give the same numbers on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rcm_jax import trainer
from rcm_jax.optimizer import OptimizerConfig
from rcm_jax.sharding import (
    RULES,
    MeshConfig,
    batch_sharding,
    check_batch,
    make_mesh,
    partition_spec,
    replicated,
)
from tests import tiny
from tests.tiny import assert_trees_close

# The numbers do not depend on XLA's optimisations, and compiling takes half the time without them.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

MESHES = [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)]


def mesh_of(sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


def test_a_free_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=2)).shape) == {"data": 4, "fsdp": 2, "seq": 1}
    assert dict(make_mesh(MeshConfig(data=1, seq=-1)).shape) == {"data": 1, "fsdp": 1, "seq": 8}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3, 1, 1), "data=3 .* 8 devices"),
        (MeshConfig(-1, 3, 1), "fsdp=3 .* 8 devices"),
        (MeshConfig(-1, -1, 1), "at most one may be -1"),
        (MeshConfig(0, 1, 1), "must be positive"),
        (MeshConfig(-2, 1, 1), "must be positive"),
        (MeshConfig(-1, 16, 1), "fsdp=16 .* 8 devices"),
    ],
)
def test_sizes_that_do_not_fill_the_devices_are_refused_with_their_numbers(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


@pytest.mark.smoke
def test_batch_that_does_not_divide_is_refused_with_the_nearest_that_does():
    mesh = mesh_of((2, 4, 1))
    check_batch(16, mesh)
    with pytest.raises(ValueError, match=r"batch size 12 .*2 × 4 = 8 devices.*: 8 or 16"):
        check_batch(12, mesh)
    with pytest.raises(ValueError, match=r"batch size 3 .*: 8$"):
        check_batch(3, mesh)
    check_batch(3, mesh_of((1, 1, 8)))  # seq does not split the batch


def test_unknown_logical_axis_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'model' .*batch, embed, features"):
        partition_spec(("model",), (16,), mesh_of((2, 2, 2)))


def test_two_axes_of_an_array_cannot_claim_one_mesh_axis():
    with pytest.raises(ValueError, match=r"\('embed', 'embed'\) .*\(16, 16\) claim a mesh axis twice"):
        partition_spec(("embed", "embed"), (16, 16), mesh_of((2, 2, 2)))
    with pytest.raises(ValueError, match=r"claim a mesh axis twice: .*fsdp"):
        partition_spec(("batch", "embed"), (16, 16), mesh_of((2, 2, 2)))


def test_specs_follow_the_table_and_an_axis_that_does_not_divide_stays_whole():
    mesh = mesh_of((2, 2, 2))
    assert partition_spec(("embed", "features"), (16, 48), mesh) == PartitionSpec(("fsdp", "seq"), None)
    assert partition_spec(("layers", "features", "embed"), (2, 48, 16), mesh) == PartitionSpec(
        None, None, ("fsdp", "seq")
    )
    assert partition_spec(("embed", "features"), (6, 48), mesh) == PartitionSpec(None, None)
    assert partition_spec(("vector",), (16,), mesh) == PartitionSpec(None)


def test_names_and_shape_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        partition_spec(("embed",), (16, 16), mesh_of((2, 2, 2)))


# --- whole steps

# AdamW with an epsilon far above the gradients is smooth in them; with 1e-8 the first update is the gradient's sign.
SMOOTH = OptimizerConfig(learning_rate=1.0, eps=1.0, weight_decay=0.0, warmup_steps=0)


@functools.cache
def stepped(sizes, phase):
    """(state after one step from step 7, metrics, shardings) on a mesh."""
    F, params = tiny.dit()
    mesh = mesh_of(sizes)
    method = tiny.distillation(F, student=SMOOTH, dmd=tiny.dmd_config(fake_score=SMOOTH))
    state, shardings = tiny.placed(method, mesh, params)
    state = state.replace(step=jax.device_put(jnp.int32(7), replicated(mesh)))
    state = state.replace(
        fake_score=state.fake_score.replace(
            params=jax.device_put(tiny.perturbed(params, 5, 0.02), shardings.fake_score.params)
        )
    )
    batch = jax.device_put({k: jax.tree.map(lambda a: a[: tiny.BATCH], v) for k, v in tiny.arrays().items()},
                           batch_sharding(mesh))  # fmt: skip
    teacher = jax.device_put(tiny.teacher(tiny.perturbed(params, 6, 0.02)), replicated(mesh))
    step = trainer.compile_steps(method, shardings, jax.random.key(0))[phase]
    state, metrics = step(state, teacher, batch)
    return state, metrics, shardings


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_student_step_gives_the_same_state_and_metrics_on_every_mesh(sizes):
    expected, expected_metrics, _ = stepped((1, 1, 1), "student")
    state, metrics, _ = stepped(sizes, "student")
    _, params = tiny.dit()
    moved = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(
        jax.tree.leaves(expected.student.params), jax.tree.leaves(params), strict=True))  # fmt: skip
    assert moved > 1e-3
    # float32, other orders of summation, then a division by the norm of the tangent and by w.
    assert_trees_close(state, expected, rtol=1e-3, atol=2e-5)
    assert_trees_close(metrics, expected_metrics, rtol=1e-3, atol=1e-5)


def test_a_critic_step_gives_the_same_state_on_a_mesh():
    expected, _, _ = stepped((1, 1, 1), "critic")
    state, _, _ = stepped((2, 2, 2), "critic")
    assert_trees_close(state, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_parameters_and_what_follows_them_are_sharded_as_the_table_says(sizes):
    state, _, _ = stepped(sizes, "student")
    mesh = mesh_of(sizes)
    boxed = jax.eval_shape(tiny.boxed_init(), jax.random.key(0))
    specs = trainer.state_sharding(boxed, mesh)
    for tree in (state.student.params, state.ema, state.fake_score.params):
        jax.tree.map(lambda leaf, s: np.testing.assert_(leaf.sharding.is_equivalent_to(s, leaf.ndim)), tree, specs)
    kernel = state.student.params["blocks"]["attention"]["qkv"]["kernel"]  # [layers, embed, features]
    shards = sizes[1] * sizes[2]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, RULES["embed"], None)), 3)
    assert {s.data.shape for s in kernel.addressable_shards} == {(1, kernel.shape[1] // shards, kernel.shape[2])}
    moment = [x for x in jax.tree.leaves(state.student.opt_state) if x.shape == kernel.shape]
    assert moment
    assert all(m.sharding.is_equivalent_to(kernel.sharding, 3) for m in moment)
    embedded = [leaf for leaf in jax.tree.leaves(state.student) if leaf.sharding.spec != PartitionSpec() and any(
        axis == RULES["embed"] for axis in leaf.sharding.spec)]  # fmt: skip
    assert len(embedded) > 10
    assert all(leaf.addressable_shards[0].data.size * shards == leaf.size for leaf in embedded)

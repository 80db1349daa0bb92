"""Meshes, the table from logical to mesh axes, and steps that give the same numbers on every mesh."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from rcm_jax import models
from rcm_jax.models import cosmos, wan
from rcm_jax.parallel.sharding import (
    RULES,
    MeshConfig,
    batch_sharding,
    check_batch,
    make_mesh,
    partition_spec,
    replicated,
    state_sharding,
)
from rcm_jax.train import trainer
from rcm_jax.train.optimizer import OptimizerConfig
from tests import tiny
from tests.tiny import assert_trees_close

# The numbers do not depend on XLA's optimisations, and compiling takes half the time without them.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

OTHERS = [(2, 4, 1), (8, 1, 1), (1, 8, 1)]
MESHES = [(2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in OTHERS)]


def mesh_of(sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])


def abstract_mesh(sizes):
    """A mesh without devices."""
    return AbstractMesh(sizes, ("data", "fsdp", "seq"), axis_types=(AxisType.Auto,) * 3)


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


def test_a_free_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=2)).shape) == {"data": 4, "fsdp": 2, "seq": 1}
    assert dict(make_mesh(MeshConfig(data=1, seq=-1)).shape) == {"data": 1, "fsdp": 1, "seq": 8}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "data=3 .* 8 devices"),
        ((-1, 3, 1), "fsdp=3 .* 8 devices"),
        ((-1, -1, 1), "at most one of them may be -1"),
        ((0, 1, 1), "data is 0: it must be -1"),
        ((1, 1, -2), "seq is -2: it must be -1"),
        ((-1, 16, 1), "fsdp=16 .* 8 devices"),
    ],
)
def test_sizes_that_do_not_fill_the_devices_are_refused_with_their_numbers(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.smoke
def test_batch_that_does_not_divide_is_refused_with_the_nearest_that_does():
    mesh = mesh_of((2, 4, 1))
    check_batch(16, mesh)
    with pytest.raises(ValueError, match=r"batch size 12 .*2 × 4 = 8 devices.*: 8 or 16"):
        check_batch(12, mesh)
    with pytest.raises(ValueError, match=r"batch size 3 .*: 8$"):
        check_batch(3, mesh)
    with pytest.raises(ValueError, match=r"16, in 3 parts \(train.accumulate\) does .*; nearest that does: 24"):
        check_batch(16, mesh, 3)
    check_batch(3, mesh_of((1, 1, 8)))  # seq does not split the batch


def test_unknown_logical_axis_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'model' .*batch, tokens, heads, embed, features"):
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


def test_a_large_array_that_does_not_divide_is_refused_with_the_way_out():
    mesh = abstract_mesh((1, 64, 8))
    assert partition_spec(("embed", "features"), (1280, 819), mesh) == PartitionSpec(None, None)  # under 4 MiB
    message = (
        r"'embed' of an array \(1280, 820\) with logical axes \('embed', 'features'\) does not divide over the 512 "
        r"devices of fsdp × seq in the mesh \{'data': 1, 'fsdp': 64, 'seq': 8\}.*fsdp × seq divides 1280, e.g. 256,"
    )
    with pytest.raises(ValueError, match=message):
        partition_spec(("embed", "features"), (1280, 820), mesh)
    assert partition_spec(("vector",), (2**21,), mesh) == PartitionSpec(None)  # meant to be whole


PUBLISHED = {"wan-1.3b": wan, "wan-14b": wan, "cosmos-0.6b": cosmos, "cosmos-2b": cosmos, "cosmos-14b": cosmos}
LARGE_MESHES = [(1, 8, 1), (2, 2, 2), (4, 64, 1), (2, 32, 8), (1, 64, 8)]


@functools.cache
def published_state(name):
    """The abstract, boxed TrainState of rCM on a published network."""
    boxed = jax.eval_shape(functools.partial(models.init, PUBLISHED[name].PUBLISHED[name]), jax.random.key(0))
    return jax.eval_shape(tiny.distillation(lambda *_: None).init, boxed)


@pytest.mark.parametrize("sizes", LARGE_MESHES, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_large_array_of_a_published_networks_state_is_split_over_fsdp_and_seq(name, sizes):
    """Parameters, second moments, EMA and fake score: as the name of each axis says, and hardly a byte more."""
    state, mesh = published_state(name), abstract_mesh(sizes)
    if (name, sizes) == ("cosmos-0.6b", (1, 64, 8)):
        with pytest.raises(ValueError, match="does not divide over the 512 devices of fsdp × seq"):
            state_sharding(state, mesh)
        return
    shardings = nn.meta.unbox(state_sharding(state, mesh))
    shards, total, local = sizes[1] * sizes[2], 0, 0
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    for leaf, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        if not isinstance(leaf, nn.Partitioned):
            assert leaf.size == 1 and sharding.spec == PartitionSpec()
            continue
        split = [("fsdp", "seq") if axis == "embed" else None for axis in leaf.names]
        whole = PartitionSpec(*[None] * len(split))
        assert sharding.spec == PartitionSpec(*split) or (sharding.spec == whole and leaf.value.size < 2**20)
        total += leaf.value.size
        local += math.prod(sharding.shard_shape(leaf.value.shape))
    networks = 5  # student, its moment, EMA, fake score, its moment
    assert total == networks * sum(leaf.size for leaf in jax.tree.leaves(state.ema))
    # What stays whole (biases, norms, small tables) is less than 1 in 1000.
    assert local - total / shards < total / 1000


def test_the_specs_of_a_published_network_are_these():
    specs = jax.tree.map(lambda s: s.spec, state_sharding(published_state("wan-14b"), abstract_mesh((1, 64, 8))))
    split = ("fsdp", "seq")
    for params in (specs.student.params, specs.ema, specs.fake_score.params, specs.student.opt_state[0].nu):
        block = params["blocks"]
        assert block["self_attention"]["q"]["kernel"] == PartitionSpec(None, split, None)  # [layers, c, n·d]
        assert block["cross_attention"]["out"]["kernel"] == PartitionSpec(None, None, split)  # [layers, n·d, c]
        assert block["mlp"]["down"]["kernel"] == PartitionSpec(None, None, split)
        assert block["modulation"] == PartitionSpec(None, None, split)
        assert block["mlp"]["up"]["bias"] == PartitionSpec(None, None)
        assert params["time_in"]["kernel"] == PartitionSpec(None, split)
        assert params["text_in"]["kernel"] == params["patch_out"]["kernel"] == PartitionSpec(split, None)


def test_names_and_shape_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        partition_spec(("embed",), (16, 16), mesh_of((2, 2, 2)))


# --- whole steps

# AdamW with an epsilon far above the gradients is smooth in them; with 1e-8 the first update is the gradient's sign.
SMOOTH = OptimizerConfig(learning_rate=1.0, eps=1.0, weight_decay=0.0, warmup_steps=0)


@functools.cache
def stepped(sizes, phase, parts=1):
    """(state after one step from step 7, metrics, shardings) on a mesh."""
    F, params = tiny.dit()
    mesh = mesh_of(sizes)
    method = tiny.distillation(F, parts, student=SMOOTH, fake_score=SMOOTH)
    state, shardings = tiny.placed(method, mesh, params)
    state = state.replace(step=jax.device_put(jnp.int32(7), replicated(mesh)))
    state = state.replace(
        fake_score=state.fake_score.replace(
            params=jax.device_put(tiny.perturbed(params, 5, 0.02), shardings.fake_score.params)
        )
    )
    batch = jax.device_put({k: jax.tree.map(lambda a: a[: parts * tiny.BATCH], v) for k, v in tiny.arrays().items()},
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


@pytest.mark.parametrize("parts", [1, 2])
def test_a_critic_step_gives_the_same_state_on_a_mesh(parts):
    expected, _, _ = stepped((1, 1, 1), "critic", parts)
    state, _, _ = stepped((2, 2, 2), "critic", parts)
    assert_trees_close(state, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("sizes", MESHES[:2], ids=str)
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

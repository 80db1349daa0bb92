"""Tokens over the seq axis: networks and whole steps give the same numbers on every mesh; what is exchanged; errors."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from rcm_jax import models
from rcm_jax.method import denoiser
from rcm_jax.method.denoiser import Velocities
from rcm_jax.models import check_network, cosmos, wan
from rcm_jax.models.mlp import MLPConfig
from rcm_jax.parallel.sharding import MeshConfig, batch_sharding, make_mesh, replicated
from rcm_jax.run import pipeline
from rcm_jax.train import trainer
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.state import Teacher
from rcm_jax.train.steps import rcm_method
from rcm_jax.util.config import revise
from tests import cosmos as tiny_cosmos
from tests import tiny
from tests import wan as tiny_wan

# The numbers do not depend on XLA's optimisations, and compiling takes half the time without them.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)


@pytest.fixture(scope="module", autouse=True)
def operations_by_name():
    """Programs are searched by `op_name`, which other tests do without (see conftest)."""
    jax.config.update("jax_include_full_tracebacks_in_locations", True)
    yield
    jax.config.update("jax_include_full_tracebacks_in_locations", False)


BATCH, HEADS, TOKENS = 4, 8, 40  # no other axis has the length of TOKENS: programs are searched for it
GRIDS = {"wan": (2, 8, 10), "cosmos": (1, 10, 16)}
CONFIGS = {
    "wan": wan.WanConfig(
        dim=96, ffn_dim=72, num_heads=HEADS, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16
    ),
    "cosmos": cosmos.CosmosConfig(
        model_channels=96, num_blocks=2, num_heads=HEADS, in_channels=4, out_channels=4, crossattn_emb_channels=8,
        adaln_lora_dim=4,
    ),
}  # fmt: skip
NETWORKS = {
    "wan": (wan.Wan, 1000.0, models.init, tiny_wan.random_params),
    "cosmos": (cosmos.Cosmos, 1.0, models.init, tiny_cosmos.random_params),
}
# An update that is the gradient, nearly: AdamW with an epsilon above all of it.
LINEAR = OptimizerConfig(learning_rate=1e4, eps=1e4, weight_decay=0.0, warmup_steps=0)


def mesh_of(sizes):
    """(data, fsdp, seq) -> a mesh of the first devices."""
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


def velocity(name, **changes):
    """F of a tiny network."""
    module, scale, _, _ = NETWORKS[name]
    config = dataclasses.replace(CONFIGS[name], **changes)

    def net(params, x, t, cond):
        return module(config).apply({"params": params}, x, t, **cond)

    return denoiser.from_rectified_flow(net, scale)


@functools.cache
def params(name, key=0):
    """Parameters of the student (0), of its teacher and of the fake score, which are near."""
    random_params = NETWORKS[name][3]
    start = random_params(CONFIGS[name])
    return jax.tree.map(lambda a, b: np.asarray(a + 0.02 * key * b), start, random_params(CONFIGS[name], key))


@functools.cache
def inputs(name):
    """(x [b, t, h, w, c], text [b, m, d], text of guidance [m, d], a direction like x)."""
    rng = np.random.default_rng(0)
    shapes = (BATCH, *GRIDS[name], 4), (BATCH, 6, 8), (6, 8), (BATCH, *GRIDS[name], 4)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def value_and_tangent(name, sizes):
    """(F, dF) with the mesh as JAX's context; the batch comes split, as in training."""
    F, mesh = velocity(name), mesh_of(sizes)
    x, text, _, dx = inputs(name)
    t = np.linspace(0.2, 1.4, BATCH, dtype=np.float32)

    def both(params, x, t, text, dx):
        return jax.jvp(lambda x, t: F(params, x, t, {"text": text}), (x, t), (dx, jnp.ones_like(t)))

    with jax.set_mesh(mesh):
        return jax.jit(both)(params(name), *jax.device_put((x, t, text, dx), batch_sharding(mesh)))


FORWARD = [("wan", (1, 1, 8)), ("wan", (2, 2, 1)), ("cosmos", (2, 2, 2))]
FORWARD += [pytest.param(*case, marks=pytest.mark.slow) for case in (("wan", (1, 1, 2)), ("cosmos", (1, 4, 2)))]


@pytest.mark.parametrize(("name", "sizes"), FORWARD, ids=str)
def test_a_network_and_its_tangent_are_the_same_on_every_mesh(name, sizes):
    expected = value_and_tangent(name, (1, 1, 1))
    for a, b in zip(value_and_tangent(name, sizes), expected, strict=True):
        assert float(jnp.std(b)) > 0.1
        assert tiny.relative(a, b) < 1e-5  # float32, other orders of summation


def test_a_batch_that_does_not_divide_is_computed_all_the_same():
    F, (x, text, _, _) = velocity("wan"), inputs("wan")
    args = params("wan"), x[:3], np.full(3, 0.7, np.float32), {"text": text[:3]}
    with jax.set_mesh(mesh_of((2, 2, 2))):
        several = jax.jit(F)(*args)
    assert tiny.relative(several, jax.jit(F)(*args)) < 1e-5


# --- whole steps


@functools.cache
def stepped(name, sizes, phase, remat="none"):
    """(state after one step from step 7, metrics, text of the compiled program)."""
    F, mesh = velocity(name, remat=remat, attention="reference"), mesh_of(sizes)
    config = tiny.rcm_config(student=LINEAR, fake_score=LINEAR)
    method = rcm_method(config, Velocities(F, denoiser.guided(F, config.guidance), F))
    boxed = jax.eval_shape(functools.partial(NETWORKS[name][2], CONFIGS[name]), jax.random.key(0))
    config = trainer.TrainConfig(steps=1, batch_size=len(inputs(name)[0]))
    training = trainer.make_training(name, config, mesh, method, boxed, jax.random.key(0))
    state, shardings = trainer.place(training, params(name)), training.shardings
    fake_score = state.fake_score.replace(params=jax.device_put(params(name, 1), shardings.fake_score.params))
    state = state.replace(step=jax.device_put(jnp.int32(7), replicated(mesh)), fake_score=fake_score)
    x0, text, uncond, _ = inputs(name)
    teacher = jax.device_put(params(name, 2), shardings.student.params)
    teacher = Teacher(teacher, jax.device_put({"text": uncond}, replicated(mesh)))
    batch = jax.device_put({"x0": x0, "cond": {"text": text}}, batch_sharding(mesh))
    program = training.steps[phase].lower(state, teacher, batch).compile()
    state, metrics = program(state, teacher, batch)
    jax.tree.map(lambda leaf, s: np.testing.assert_(leaf.sharding.is_equivalent_to(s, leaf.ndim)), state, shardings)
    return state, metrics, program.as_text()


STEPS = [
    ("wan", (2, 2, 2), "student", "full"),
    pytest.param("cosmos", (1, 2, 4), "student", "save_attention", marks=pytest.mark.slow),
    pytest.param("wan", (1, 1, 8), "critic", "none", marks=pytest.mark.slow),
    pytest.param("cosmos", (1, 4, 2), "critic", "full", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "sizes", "phase", "remat"), STEPS, ids=str)
def test_a_step_gives_the_same_losses_gradients_and_state_on_every_mesh(name, sizes, phase, remat):
    expected, expected_metrics, _ = stepped(name, (1, 1, 1), phase)
    state, metrics, _ = stepped(name, sizes, phase, remat)
    learner, start = ("student", params(name)) if phase == "student" else ("fake_score", params(name, 1))
    (moved, nu), (expected_moved, expected_nu) = (
        (jax.tree.map(lambda a, b: np.asarray(a) - b, s.params, start), s.opt_state)
        for s in (getattr(state, learner), getattr(expected, learner))
    )
    # float32: other orders of summation, then a division by the norm of the tangent and by w.
    for a, b in zip(jax.tree.leaves((moved, nu)), jax.tree.leaves((expected_moved, expected_nu)), strict=True):
        assert np.linalg.norm(b) > 0
        assert tiny.relative(a, b) < 1e-4
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected.ema), strict=True):
        assert tiny.relative(a, b) < 1e-4
    tiny.assert_trees_close(metrics, expected_metrics, rtol=1e-5, atol=0)


def collectives(text):
    """(kind, shapes of the results, operation) of every collective in a compiled program."""
    kinds = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
    for result, kind, rest in re.findall(rf"= (.*?) ({kinds})(?:-start)?\((.*)", text):
        shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", result)}
        name = re.search(r'op_name="([^"]*)"', rest)
        yield kind, shapes, name.group(1) if name else ""


@pytest.mark.parametrize(("name", "sizes", "phase", "remat"), STEPS[:2], ids=str)
def test_tokens_are_exchanged_for_heads_and_no_device_gathers_them(name, sizes, phase, remat):
    found = list(collectives(stepped(name, sizes, phase, remat)[2]))
    data, fsdp, seq = sizes
    once, guided = ((k * BATCH // (data * fsdp), TOKENS // seq, HEADS // seq, 12) for k in (1, 2))
    exchanged = [(kind, shapes, op) for kind, shapes, op in found if "self_attention/shard_map" in op]
    assert {kind for kind, _, _ in exchanged} == {"all-to-all"}
    assert {shape for _, shapes, _ in exchanged for shape in shapes} == {once, guided}  # the teacher's batch is twice
    assert [op for _, _, op in exchanged if "jvp(jvp(" in op and "transpose" not in op]  # the tangent's
    assert [op for _, _, op in exchanged if "transpose(jvp(jvp(" in op]  # its gradient's
    # The text's keys are whole everywhere; where the queries are split, the gradients of the keys are summed.
    assert {(kind, "transpose(" in op) for kind, _, op in found if "cross_attention/shard_map" in op} == {
        ("all-reduce", True)
    }
    # Whatever else moves between devices, parameters and gradients above all, has not all tokens, but for those of the
    # output, 2·2·4 latents each, where no axis of the grid divides over seq.
    assert not [op for _, shapes, op in found for shape in shapes if TOKENS in shape and shape[-1] != 16]
    assert "all-to-all" not in stepped(name, (1, 1, 1), phase)[2]


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_attention_is_not_computed_again_on_a_mesh(name, monkeypatch):
    tiny.mark_attention_kernels(monkeypatch)
    F, (x, text, _, _) = velocity(name, remat="save_attention"), inputs(name)

    def loss(params):
        return jnp.sum(F(params, x, jnp.full(BATCH, 0.7), {"text": text}))

    start = params(name)
    with jax.set_mesh(mesh_of((2, 2, 2))):
        counts = tiny.count_attention_kernels(jax.make_jaxpr(jax.grad(loss))(start))
    assert counts == {"forward": 2, "tangent": 0, "backward": 2}  # self and cross


# --- what does not fit


def test_heads_and_tokens_that_do_not_divide_are_refused_with_what_would():
    check_network(CONFIGS["wan"], (*GRIDS["wan"], 4), mesh_of((1, 1, 8)))
    check_network(MLPConfig(num_classes=2, dim=8, num_layers=1, freq_dim=4), (2,), mesh_of((1, 1, 8)))
    with pytest.raises(ValueError, match=r"2 heads do not divide over seq = 4 .*seq to one of 1, 2, which divide 2"):
        check_network(tiny_wan.TINY, (2, 8, 10, 4), mesh_of((1, 1, 4)))
    message = (
        r"2 × 3 × 5 = 30 tokens do not divide over seq = 4: set config.mesh.seq to one of 1, 2, which .* 30 tokens; "
        r"or change the latents to 4 frames \(now 2\), 4 or 8 rows \(now 6\), 8 or 12 columns \(now 10\)"
    )
    with pytest.raises(ValueError, match=message):
        check_network(CONFIGS["wan"], (2, 6, 10, 4), mesh_of((1, 1, 4)))


def test_a_network_that_does_not_fit_is_refused_where_it_is_traced():
    F, text = velocity("cosmos"), jax.ShapeDtypeStruct((4, 6, 8), jnp.float32)
    x, t = jax.ShapeDtypeStruct((4, 1, 6, 10, 4), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32)
    jax.eval_shape(F, params("cosmos"), x, t, {"text": text})
    with jax.set_mesh(mesh_of((1, 1, 2))), pytest.raises(ValueError, match="15 tokens do not divide over seq = 2"):
        jax.eval_shape(F, params("cosmos"), x, t, {"text": text})
    other = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(other), pytest.raises(ValueError, match=r"\{'x': 8\}, lacks data, fsdp, seq"):
        jax.eval_shape(F, params("cosmos"), x, t, {"text": text})


def test_training_refuses_it_before_anything_is_written(tmp_path):
    run = revise(digits.EXPERIMENT, {"mesh.data": 1, "mesh.seq": 8})
    with pytest.raises(ValueError, match="4 heads do not divide over seq = 8"):
        pipeline.train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Training an adapter is training the network: of full rank, and with A the identity, the same first steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from rcm_jax.method.denoiser import Velocities, guided
from rcm_jax.models.adapters import A, Adapted, AdapterConfig, B, flat, targets_of, whole
from rcm_jax.models.dit import DiT
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.steps import rcm_method
from tests import adapters as ours
from tests import tiny

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
MODEL = dataclasses.replace(tiny.MODEL, dtype="float64")
TARGETS = ("blocks/attention/*", "blocks/mlp/*")
# Of the real runs' kind, but for weight decay: that of A and B is not that of their product.
OPTIMIZER = OptimizerConfig(1e-3, b2=0.99, weight_decay=0.0, warmup_steps=1)
PHASES = ("warmup", "critic", "warmup")
NETWORKS = {
    "student": lambda state: state.student.params,
    "fake score": lambda state: state.fake_score.params,
    "average": lambda state: state.ema,
}


def F(params, x, t, cond):
    return DiT(MODEL).apply({"params": whole(params)}, x, t, **cond)


def method(whole):
    config = tiny.rcm_config(student=OPTIMIZER, fake_score=OPTIMIZER, guidance=2.0)
    return rcm_method(config, Velocities(F, guided(F, 2.0), F), whole=whole)


def steps(method, start, teacher):
    """The states after each of PHASES."""
    data, state, found = tiny.arrays(), method.init(start), []
    batch = {k: jax.tree.map(lambda a: jnp.asarray(a[: tiny.BATCH]), v) for k, v in data.items()}
    for i, phase in enumerate(PHASES):
        state = state.replace(step=jnp.int32(5 + i))  # warm-up is over
        state, metrics = jax.jit(method.steps[phase])(state, teacher, batch, jax.random.key(i))
        found.append((state, metrics))
    return found


def only(paths, tree):
    """The tree with a gradient of those kernels alone."""
    stop = jax.lax.stop_gradient
    leaves = {path: x if path.removesuffix("/kernel") in paths else stop(x) for path, x in flat(tree).items()}
    return unflatten_dict(leaves, sep="/")


def with_identity(teacher, adapter):
    """As wide as the kernels, A the identity: B is then the change of the kernel itself."""
    found = {path: jax.lax.stop_gradient(x) if path.endswith(A) else x for path, x in flat(adapter).items()}
    return Adapted(teacher.params, unflatten_dict(found, sep="/"), 1.0)


def test_with_a_the_identity_the_first_steps_are_those_of_the_kernels():
    narrow = tiny.dit()[1]  # which is kept for other tests
    with tiny.x64():
        base = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), narrow)
        targets = targets_of(AdapterConfig(rank=1, targets=TARGETS), TARGETS, ours.boxed(MODEL))
        start = {}
        for path in targets:
            *layers, fan_in, fan_out = flat(base)[f"{path}/kernel"].shape
            start[f"{path}/{A}"] = jnp.broadcast_to(jnp.eye(fan_in), (*layers, fan_in, fan_in))
            start[f"{path}/{B}"] = jnp.zeros((*layers, fan_in, fan_out))
        teacher = tiny.teacher(base)
        full = steps(method(lambda _, params: only(targets, params)), base, teacher)
        beside = steps(method(with_identity), unflatten_dict(start, sep="/"), teacher)
    for (a, values), (b, theirs) in zip(beside, full, strict=True):
        for name, of in NETWORKS.items():
            for path in targets:
                change = np.asarray(flat(of(b))[f"{path}/kernel"] - flat(base)[f"{path}/kernel"])
                np.testing.assert_allclose(flat(of(a))[f"{path}/{B}"], change, rtol=0, atol=1e-9, err_msg=name)
        assert values.keys() == theirs.keys()
        for name in values.keys() - {"watched"}:
            np.testing.assert_allclose(values[name], theirs[name], rtol=1e-7, atol=1e-9)
    last = flat(beside[-1][0].student.params)
    assert all(np.abs(last[f"{path}/{B}"]).max() > 1e-3 for path in targets)


@pytest.mark.parametrize("phase", ["student", "critic"])
def test_the_base_is_no_part_of_the_state_and_takes_no_gradient(phase):
    base, config = tiny.dit()[1], AdapterConfig(rank=2, alpha=4.0)
    adapter, teacher = ours.drawn(tiny.MODEL, config), tiny.teacher(base)

    def velocity(params, x, t, cond):
        return DiT(tiny.MODEL).apply({"params": whole(params)}, x, t, **cond)

    def beside(teacher, params):
        return Adapted(teacher.params, params, config.scale)

    chosen = rcm_method(tiny.rcm_config(), Velocities(velocity, guided(velocity, 2.0), velocity), whole=beside)
    state = chosen.init(adapter).replace(step=jnp.int32(7))
    sizes = {path: leaf.shape for path, leaf in flat(adapter).items()}
    assert all({path: x.shape for path, x in flat(of(state)).items()} == sizes for of in NETWORKS.values())
    batch = {k: jax.tree.map(lambda a: jnp.asarray(a[: tiny.BATCH]), v) for k, v in tiny.arrays().items()}
    after, metrics = jax.jit(chosen.steps[phase])(state, teacher, batch, jax.random.key(0))
    of = NETWORKS["student" if phase == "student" else "fake score"]
    assert all(np.any(a != b) for a, b in zip(*(jax.tree.leaves(of(s)) for s in (after, state)), strict=True))
    assert all(np.isfinite(value).all() for name, value in metrics.items() if name != "watched")

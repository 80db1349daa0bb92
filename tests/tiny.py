"""What the tests share: networks of a few hundred parameters, golden cases, float64, a walk over jaxprs."""

import contextlib
import functools
import pathlib
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rcm_jax.data import latents
from rcm_jax.kernels import attention
from rcm_jax.method import denoiser
from rcm_jax.method.objectives import DiffusionConfig, DmdConfig, ScmConfig
from rcm_jax.method.trigflow import LogNormal, ShiftedUniform
from rcm_jax.models.dit import DiT, DiTConfig
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.run import program
from rcm_jax.run.experiment import Predictor
from rcm_jax.train import trainer
from rcm_jax.train.optimizer import OptimizerConfig
from rcm_jax.train.state import Teacher
from rcm_jax.train.steps import DiffusionMethod, Method, RcmConfig, diffusion_method, rcm_method
from rcm_jax.train.trainer import TrainConfig
from tests.conftest import GOLDEN

BATCH = 8
SHAPE = (8, 8, 1)
CLASSES = 3
UNCOND = {"label": np.int32(CLASSES)}
MODEL = DiTConfig(num_classes=CLASSES, patch=4, dim=16, num_layers=1, num_heads=2, freq_dim=16)


def x64() -> contextlib.AbstractContextManager:
    """Everything inside is float64 where it was asked for."""
    return jax.enable_x64(True)


def fast_compilation() -> Iterator[None]:
    """As a fixture: programs are compiled without most of XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def cases(pattern: str) -> list[pathlib.Path]:
    """Golden files of that pattern, whatever the folder holds."""
    return sorted(GOLDEN.glob(pattern))


def abstract_params(init, config) -> dict:
    """Shapes and dtypes of the parameters of a network; nothing is allocated."""
    return nn.meta.unbox(jax.eval_shape(lambda key: init(config, key), jax.random.key(0)))


@functools.cache
def random_params(init, config, key: int = 0) -> dict:
    """Parameters of a network of which none is zero (drawn by numpy: nothing to compile); init: e.g. models.init."""
    rng, shapes = np.random.default_rng(key), abstract_params(init, config)

    def draw(path, leaf):
        return jnp.asarray((path[-1].key == "scale") + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    with jax.ensure_compile_time_eval():
        return jax.tree_util.tree_map_with_path(draw, shapes)


def write_latents(folder, x0, text, **conditions) -> str:
    """x0 [n, t, h, w, c], text [n, l, d] and other conditions [n, ...] as a data set on disk; guidance's own text is
    zeros. Returns the folder."""
    given = {"x0": x0, "text": text} | conditions
    examples = ({name: x[i].astype(np.float32) for name, x in given.items()} for i in range(len(x0)))
    latents.write(folder, examples, {"text": np.zeros(text.shape[1:], np.float32)})
    return str(folder)


def stem(path) -> str:
    """A readable test id."""
    return path.stem if isinstance(path, pathlib.Path) else str(path)


def columns(t):
    """Times of the golden data, [b, 1], as ours: [b]."""
    assert t.shape[1:] == (1,)
    return jnp.asarray(t[:, 0])


def relative(a, b) -> float:
    """‖a − b‖/‖b‖ over all elements."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@functools.cache
def dit(config: DiTConfig = MODEL, key: int = 0, noise: float = 0.1):
    """(F, params): a DiT as a velocity, with parameters moved off their zero initialisation."""
    module = DiT(config)

    def net(params, x, t, cond):
        return module.apply({"params": params}, x, t, **cond)

    with jax.ensure_compile_time_eval():  # arrays, also where the first call is inside a trace
        params = jax.jit(lambda k: nn.meta.unbox(boxed_init(config)(k)))(jax.random.key(key))
        return denoiser.from_trigflow(net), perturbed(params, key, noise)


@functools.partial(jax.jit, static_argnums=(1, 2))
def perturbed(params, key: int, noise: float = 0.1):
    """params + noise·normal, so that no layer is zero."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key + 100), len(leaves))
    moved = [p + noise * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys, strict=True)]
    return tree.unflatten(moved)


def inputs(key: int = 0, batch: int = BATCH):
    """(x [b, 8, 8, 1], t [b], cond) for a tiny DiT."""
    x = jax.random.normal(jax.random.key(key), (batch, *SHAPE))
    return x, jnp.linspace(0.1, 1.5, batch), {"label": jnp.arange(batch) % CLASSES}


def arrays(n: int = 40) -> dict:
    """A data set of n examples as `rcm_jax.data.dataset.batches` takes it."""
    rng = np.random.default_rng(0)
    return {
        "x0": rng.normal(size=(n, *SHAPE)).astype(np.float32),
        "cond": {"label": np.arange(n, dtype=np.int32) % CLASSES},
    }


def one_device():
    """A mesh of a single device."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def boxed_init(config: DiTConfig = MODEL):
    """key -> boxed parameters of a tiny DiT."""
    module = DiT(config)
    x, t, cond = jnp.zeros((1, *SHAPE)), jnp.zeros(1), {"label": jnp.zeros(1, int)}
    return lambda key: module.init(key, x, t, **cond)["params"]


OPTIMIZER = OptimizerConfig(learning_rate=1e-2, b2=0.99, warmup_steps=4)


def scm_config(**changes) -> ScmConfig:
    """sCM with scale 1."""
    return ScmConfig(**dict(time=LogNormal(0.0, 1.0), scale=1.0) | changes)


def dmd_config(**changes) -> DmdConfig:
    """Every third iteration is the student's, in rollouts of up to 3 steps."""
    values = dict(time=ShiftedUniform(5.0), scale=0.2, update_freq=3, max_rollout=3)
    return DmdConfig(**values | changes)


def rcm_config(**changes) -> RcmConfig:
    """Both, after a warm-up of 4 iterations; without DMD there is no fake score."""
    values = dict(student=OPTIMIZER, guidance=2.0, consistency=scm_config(), dmd=dmd_config(), warmup=4, ema_std=0.1)
    values |= changes
    return RcmConfig(**dict(fake_score=OPTIMIZER if values["dmd"] else None) | values)


def distillation(F: denoiser.Velocity, parts: int = 1, **changes) -> Method:
    """The rCM method on one network for all three roles."""
    config = rcm_config(**changes)
    return rcm_method(config, denoiser.Velocities(F, denoiser.guided(F, config.guidance), F), parts)


def pretraining(F: denoiser.Velocity, parts: int = 1, **averages) -> Method:
    """The diffusion method; averages: other fields of Averaged."""
    optimizer = OptimizerConfig(learning_rate=1e-2, b1=0.9, b2=0.99, warmup_steps=4)
    averages = dict(ema_std=0.1) | averages
    return diffusion_method(DiffusionMethod(DiffusionConfig(LogNormal(-0.2, 1.2)), optimizer, **averages), F, parts)


def teacher(params) -> Teacher:
    """The frozen side."""
    return Teacher(params, UNCOND)


def placed(method: Method, mesh, params, config: DiTConfig = MODEL, offload: bool = False):
    """(state, shardings) of a method on a mesh, from given parameters."""
    training = make_training(method, mesh, config, TrainConfig(steps=1, batch_size=BATCH, offload=offload))
    return trainer.place(training, params), training.shardings


def make_training(method: Method, mesh, model: DiTConfig = MODEL, config: TrainConfig | None = None, key: int = 0):
    """A method of the tiny network on a mesh."""
    boxed = jax.eval_shape(boxed_init(model), jax.random.key(0))
    config = config or TrainConfig(steps=1, batch_size=BATCH)
    return trainer.make_training("tiny", config, mesh, method, boxed, jax.random.key(key))


def make_network():
    """The tiny network as scripts/train.py makes it."""
    return program.make_network(Predictor(MODEL), arrays(1))


def equations(jaxpr, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], core.JaxprEqn]]:
    """(names of the enclosing primitives, equation) of a jaxpr and of every jaxpr inside it."""
    for eqn in jaxpr.eqns:
        yield path, eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                item = item.jaxpr if isinstance(item, core.ClosedJaxpr) else item
                if isinstance(item, core.Jaxpr):
                    yield from equations(item, (*path, eqn.primitive.name))


def assert_trees_equal(a, b) -> None:
    """The same structure, and every leaf the same to the last bit (NaN equals NaN)."""
    a, b = (jax.tree.map(_plain, tree) for tree in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, *, rtol: float, atol: float) -> None:
    """The same structure, and every leaf close."""
    a, b = (jax.tree.map(_plain, tree) for tree in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def _plain(x):
    return np.asarray(jax.device_get(x))


KERNELS = ("forward", "tangent", "backward")


def mark_attention_kernels(monkeypatch) -> None:
    """Wrap the kernels of every attention implementation in jits, so that a jaxpr shows them by name."""
    for name, implementation in attention.IMPLEMENTATIONS.items():
        there = {kernel: getattr(implementation, kernel) for kernel in KERNELS}
        marked = {kernel: _marked(kernel, function) for kernel, function in there.items() if function}
        monkeypatch.setitem(attention.IMPLEMENTATIONS, name, implementation._replace(**marked))


def _marked(name, kernel):
    def call(*args):
        arrays = [i for i, arg in enumerate(args) if isinstance(arg, jax.Array)]

        def inner(*values):
            filled = list(args)
            for i, value in zip(arrays, values, strict=True):
                filled[i] = value
            return kernel(*filled)

        inner.__name__ = f"attention_{name}"
        return jax.jit(inner)(*(args[i] for i in arrays))

    return call


def count_attention_kernels(closed: core.ClosedJaxpr, inside: str = "scan") -> dict[str, int]:
    """How often each marked kernel stands inside the scans over blocks."""
    found = [eqn.params.get("name") for path, eqn in equations(closed.jaxpr) if inside in path]
    return {name: found.count(f"attention_{name}") for name in KERNELS}

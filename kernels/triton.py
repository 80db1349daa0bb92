"""The attention of `kernels.reference` for NVIDIA GPUs, by Triton kernels through jax-triton.

    pip install 'rcm-jax[cuda12,triton]'

bfloat16, float16 and float32 (not rounded to tf32: exact and slow), 1 to 256 features a head, any numbers of queries
and keys, compute capability 8.0 and later. `forward`, `tangent` and `backward` are those of `kernels.reference`;
`forward_tangent` does the work of the first two in one pass over the keys: 6 products where they take 2 + 5. Under a
mask (`kernels.masks`) a program's loop goes over those tiles alone of which it sees something.

The functions of this module turn their arguments into `Launch`es and hand each to `launch`, which runs it: `on_gpu`
by default. The tests put Triton's interpreter there, and `kernels.triton_report` the compiler.
"""

import contextlib
import contextvars
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .masks import BlockCausal
from .reference import Gradients, K, Live, Q, Row

INSTALL = "pip install 'rcm-jax[triton]'"
INSTEAD = 'choose implementation="blockwise"'
DTYPES = ("bfloat16", "float16", "float32")
MOST_FEATURES = 256
LEAST_SCALE = 1e-30


class Config(NamedTuple):
    """How one kernel is cut: tokens in a tile, warps in a program, stages of the pipeline that loads tiles."""

    queries: int
    keys: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """One run of a kernel of kernels.triton_kernels: its arrays, the shapes of its outputs, its constants.

    `over` names what the first axis of the grid cuts into tiles, "queries" or "keys", and `length` counts them.
    """

    kernel: str
    arrays: tuple
    outputs: tuple
    over: str
    length: int
    constants: dict

    def grid(self, config):
        """(tiles, heads, batch)"""
        b, _, n, _ = self.arrays[0].shape
        return -(-self.length // getattr(config, self.over)), n, b

    def all_constants(self, config):
        """The constants with the sizes of the tiles that the kernel has, None of them left open."""
        tiles = {"BLOCK_Q": config.queries, "BLOCK_K": config.keys}
        if "K_LEN" not in self.constants:
            tiles.pop("BLOCK_K")
        return {**self.constants, **tiles}


# {(GPU, BLOCK_D): {kernel: Config}} for 16-bit inputs of up to 128 features; 16 and 32 go with 64. The GPU is "sm90"
# (H100 and later data-centre GPUs, 227 KiB of shared memory a program) or "sm80" (all others, at least 99 KiB).
# They are the largest tiles that do not spill registers, which `python -m kernels.triton_report` shows; not timed.
CONFIGS = {
    ("sm80", 64): {
        "forward": Config(128, 64, 4, 2),
        "forward_tangent": Config(64, 64, 4, 2),
        "tangent": Config(64, 64, 4, 2),
        "gradients_of_keys": Config(64, 128, 8, 2),
        "gradient_of_queries": Config(128, 64, 8, 2),
    },
    ("sm80", 128): {
        "forward": Config(128, 64, 8, 2),
        "forward_tangent": Config(64, 32, 8, 2),
        "tangent": Config(64, 32, 4, 2),
        "gradients_of_keys": Config(64, 64, 8, 2),
        "gradient_of_queries": Config(64, 64, 4, 2),
    },
    ("sm90", 64): {
        "forward": Config(128, 128, 8, 3),
        "forward_tangent": Config(128, 64, 8, 3),
        "tangent": Config(128, 64, 8, 3),
        "gradients_of_keys": Config(64, 128, 8, 3),
        "gradient_of_queries": Config(128, 128, 8, 2),
    },
    ("sm90", 128): {
        "forward": Config(128, 128, 8, 2),
        "forward_tangent": Config(128, 32, 8, 3),
        "tangent": Config(128, 64, 8, 2),
        "gradients_of_keys": Config(32, 128, 8, 3),
        "gradient_of_queries": Config(128, 64, 8, 3),
    },
}
# Where a mask needs more registers than those have left.
MASKED = {
    ("sm80", 64): {
        "forward": Config(128, 64, 8, 2),
        "forward_tangent": Config(128, 64, 8, 2),
        "tangent": Config(128, 32, 8, 2),
        "gradients_of_keys": Config(32, 128, 8, 2),
    },
    ("sm80", 128): {
        "forward": Config(128, 32, 8, 2),
        "tangent": Config(64, 32, 8, 2),
        "gradients_of_keys": Config(32, 64, 8, 2),
        "gradient_of_queries": Config(64, 64, 8, 2),
    },
}
# The rest: {(bytes of a feature, the most features in BLOCK_D): Config}, for every kernel and GPU.
OTHERS = {(2, 256): Config(32, 32, 8, 1), (4, 64): Config(32, 32, 8, 1), (4, 256): Config(16, 16, 8, 1)}
DELTA = Config(64, 64, 4, 1)


def forward(q: Q, k: K, v: K, scale, wide=False, mask: BlockCausal | None = None, *, launch=None) -> tuple[Q, Row]:
    """O in the dtype of q, or `wide` in float32, which lse has."""
    return _forward(q, k, v, (None, None, None), scale, wide, mask, launch)[:2]


def forward_tangent(
    q: Q,
    k: K,
    v: K,
    dq: Q | None,
    dk: K | None,
    dv: K | None,
    scale,
    mask: BlockCausal | None = None,
    *,
    launch=None,
) -> tuple[Q, Row, Q]:
    """(O, lse, Ȯ) in one pass: `forward`, and `tangent` along (dq, dk, dv), of which None costs nothing."""
    return _forward(q, k, v, (dq, dk, dv), scale, False, mask, launch)


def _forward(q, k, v, tangents, scale, wide, mask, launch):
    sizes = _sizes(q, k, scale, mask)
    moves = _moves(tangents)
    row = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    arrays = (q, k, v, *_stand_ins(tangents, (q, k, v)))
    o = jax.ShapeDtypeStruct(q.shape, jnp.float32 if wide else q.dtype)
    outputs = (o, row, _like(q) if any(moves.values()) else _NOTHING)
    return (launch or on_gpu)(Launch("forward", arrays, outputs, "queries", q.shape[1], sizes | moves))


def tangent(
    q: Q,
    k: K,
    v: K,
    o: Q,
    lse: Row,
    dq: Q | None,
    dk: K | None,
    dv: K | None,
    scale,
    mask: BlockCausal | None = None,
    *,
    launch=None,
) -> Q:
    """Ȯ along (dq, dk, dv), of which None stands for zero and costs nothing."""
    tangents = (dq, dk, dv)
    arrays = (q, k, v, o, lse, *_stand_ins(tangents, (q, k, v)))
    constants = _sizes(q, k, scale, mask) | _moves(tangents)
    (do,) = (launch or on_gpu)(Launch("tangent", arrays, (_like(q),), "queries", q.shape[1], constants))
    return do


def backward(
    q: Q, k: K, v: K, o: Q, lse: Row, g: Q, live: Live, scale, mask: BlockCausal | None = None, *, launch=None
) -> Gradients:
    """From g, the cotangent of Ȯ, to those of (dq, dk, dv), None where `live` is False: the transpose of `tangent`."""
    launch = launch or on_gpu
    sizes = _sizes(q, k, scale, mask)
    live_q, live_k, live_v = live
    dq = dk = dv = None
    row = lse
    if live_q or live_k:
        constants = {name: sizes[name] for name in ("Q_LEN", "HEADS", "DIM", "BLOCK_D")}
        (row,) = launch(Launch("delta", (o, g), (_like(lse),), "queries", q.shape[1], constants))
    arrays = (q, k, v, lse, g, row)
    if live_k or live_v:
        outputs = (_like(k) if live_k else _NOTHING, _like(v) if live_v else _NOTHING)
        constants = sizes | {"LIVE_K": live_k, "LIVE_V": live_v}
        dk, dv = launch(Launch("gradients_of_keys", arrays, outputs, "keys", k.shape[1], constants))
    if live_q:
        (dq,) = launch(Launch("gradient_of_queries", arrays, (_like(q),), "queries", q.shape[1], sizes))
    return dq, dk if live_k else None, dv if live_v else None


_NOTHING = jax.ShapeDtypeStruct((1,), jnp.float32)  # in the place of an output that is not computed


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _moves(tangents):
    return {f"MOVES_{name}": x is not None for name, x in zip("QKV", tangents, strict=True)}


def _stand_ins(tangents, primals):
    """The tangents, with primals, which the kernel will not look at, in the place of None."""
    return tuple(primal if x is None else x for x, primal in zip(tangents, primals, strict=True))


def _sizes(q, k, scale, mask):
    """The constants of every kernel."""
    check(q.dtype, q.shape[-1], scale)
    _, q_len, heads, dim = q.shape
    padded = max(16, 1 << (dim - 1).bit_length())
    sizes = dict(SCALE=float(scale), Q_LEN=q_len, K_LEN=k.shape[1], HEADS=heads, DIM=dim, BLOCK_D=padded)
    chunk, window, sink = (0, 0, 0) if mask is None else (mask.chunk, mask.window or 0, mask.sink)
    return sizes | dict(CHUNK=chunk, WINDOW=window, SINK=sink)


def check(dtype, features, scale):
    """ValueError where the kernels do not do what `kernels.reference` does."""
    if dtype not in DTYPES:
        raise ValueError(f"the Triton attention kernels take {', '.join(DTYPES)}, got {dtype}: cast, or {INSTEAD}")
    if not 1 <= features <= MOST_FEATURES:
        raise ValueError(
            f"the Triton attention kernels take 1 to {MOST_FEATURES} features a head, got {features}: {INSTEAD}"
        )
    if not scale >= LEAST_SCALE:
        raise ValueError(
            f"the Triton attention kernels take a scale of at least {LEAST_SCALE}, got {scale}: "
            f"scale the queries, or {INSTEAD}"
        )


def gpu_of(capability):
    """The GPU's name in CONFIGS; `capability` is 90 for 9.0. ValueError before Ampere."""
    if capability < 80:
        raise ValueError(
            "the Triton attention kernels need compute capability 8.0 (Ampere) or later, "
            f"got {capability / 10}: {INSTEAD}"
        )
    return "sm90" if 90 <= capability < 120 else "sm80"


def configuration(launch, capability):
    """The Config of a launch on a GPU of this compute capability."""
    if launch.kernel == "delta":
        return DELTA
    kernel = launch.kernel
    if kernel == "forward" and _fused(launch):
        kernel = "forward_tangent"
    width, bytes_each = launch.constants["BLOCK_D"], jnp.dtype(launch.arrays[0].dtype).itemsize
    place = gpu_of(capability), max(width, 64)
    table = CONFIGS.get(place, {}) if bytes_each == 2 else {}
    if table and launch.constants["CHUNK"]:
        table = table | MASKED.get(place, {})
    return table.get(kernel) or next(x for (size, most), x in OTHERS.items() if size == bytes_each and width <= most)


def _fused(launch):
    return any(launch.constants[f"MOVES_{name}"] for name in "QKV")


TARGET = contextvars.ContextVar[int | None]("compute capability", default=None)


@contextlib.contextmanager
def compiling_for(capability: int):
    """What is traced inside is for GPUs of that compute capability, 90 for 9.0, whatever this machine has."""
    token = TARGET.set(capability)
    try:
        yield
    finally:
        TARGET.reset(token)


def compute_capability():
    """That of `compiling_for`, else of the first GPU; all GPUs of a run are taken to be alike. ValueError without."""
    if (target := TARGET.get()) is not None:
        return target
    try:
        return round(10 * float(jax.local_devices(backend="gpu")[0].compute_capability))
    except (RuntimeError, ValueError) as error:  # no GPU; another maker's, whose capability is a name
        raise ValueError(f"the Triton attention kernels need an NVIDIA GPU, and JAX finds none: {INSTEAD}") from error


def on_gpu(launch):
    """Runs a launch through jax-triton: the arrays of its outputs."""
    triton_call, kernels = modules()
    capability = compute_capability()
    config = configuration(launch, capability)
    names = inspect.signature(triton_call).parameters
    outputs = triton_call(
        *launch.arrays,
        kernel=getattr(kernels, launch.kernel),
        grid=launch.grid(config),
        name=f"attention_{launch.kernel}",
        num_warps=config.warps,
        num_stages=config.stages,
        compute_capability=capability,
        **{"out_shape" if "out_shape" in names else "out_type": launch.outputs},  # before and since jax-triton 0.4
        **launch.all_constants(config),
    )
    # Inside shard_map JAX does not know that outputs vary as inputs do.
    axes = tuple(sorted(frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in launch.arrays))))
    return tuple(jax.lax.pcast(x, axes, to="varying") for x in outputs) if axes else tuple(outputs)


@functools.cache
def modules():
    """(jax_triton.triton_call, kernels.triton_kernels). ValueError where jax-triton is not installed."""
    try:
        import jax_triton

        from . import triton_kernels
    except ImportError as error:
        raise ValueError(f'implementation "triton" needs jax-triton, which is not installed: {INSTALL}') from error
    return jax_triton.triton_call, triton_kernels

"""How far the passes of implementations are from `blockwise` in float32, on the device that would run them.

Everything runs in a thread of its own: what JAX traces around the caller, its meshes and its other contexts belong to
the caller's thread, so numbers can be had in the middle of tracing. As in runs, a pass is called inside shard_map.

The inputs are made to show what goes wrong at the ends: all scores lie around -8, so that a key that is not there, and
is read as zero, outweighs in the softmax those that are.
"""

import functools
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from .implementations import IMPLEMENTATIONS, seeing
from .masks import BlockCausal
from .workloads import TEXT_TOKENS

# How large an error may be, by the dtype of the inputs.
TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-4}
HEADS = 2
TILE = 1024  # tokens: the sizes of all tiles divide it
MEAN_SCORE = 8.0  # below zero
OUTPUTS = {"value": ("O",), "forward": ("O", "lse"), "tangent": ("Ȯ",), "backward": ("dQ", "dK", "dV")}


class Case(NamedTuple):
    """Numbers of queries and keys. Without a mask keys of another number are the text: in a tangent they stay."""

    l: int
    m: int
    mask: BlockCausal | None = None

    def __str__(self):
        return f"{self.l} × {self.m}{'' if self.mask is None else f' under {self.mask}'}"


class Finding(NamedTuple):
    """Of one pass in one case.

    The error is the largest over its outputs, each relative to its largest entry, lse as it is; NaN where an output is
    not finite, infinite where the pass does not run.
    """

    error: float
    words: str  # the output with that error; or why it does not run
    refused: bool = False  # by a ValueError: it is not made for this

    def why_not(self, case: Case, dtype) -> str:
        """Why the pass is not to be used; "" if it may."""
        if math.isinf(self.error):
            return self.words
        if self.error <= TOLERANCE[str(dtype)]:  # not so if NaN
            return ""
        return f"error {self.error:.1e} of {self.words} at {case}, and {TOLERANCE[str(dtype)]:.0e} may be"


def cases(tokens: int, masked: bool) -> tuple[Case, ...]:
    """Short self- and cross-attention that end within a tile as those of so many tokens do. Masked: self-attention, and
    its last queries beside what came before them."""
    short = tokens if tokens < 2 * TILE else TILE + tokens % TILE
    if not masked:
        return Case(short, short), Case(short, TEXT_TOKENS if short != TEXT_TOKENS else TEXT_TOKENS // 2)
    chunk = -(-short // 6)
    window = BlockCausal(chunk, window=2, sink=1)
    return Case(short, short, window), Case(2 * chunk, short, window), Case(short, short, BlockCausal(chunk))


def findings(
    pairs: Iterable[tuple[str, str]], head_size: int, dtype, cases: Iterable[Case], heads: int = HEADS
) -> dict[tuple[str, str, Case], Finding]:
    """{(pass, name, case): Finding} for pairs of a pass and an implementation, inputs of that dtype, one sample."""

    def find():
        result = {}
        for case in cases:
            inputs = _inputs(case, head_size, dtype, heads)
            known, expected = _expected(case.mask, inputs)
            inputs, expected = inputs | known, jax.tree.map(_on_host, expected)
            for name, implementation in pairs:
                function = IMPLEMENTATIONS[implementation].does(name)
                result[name, implementation, case] = _find(name, function, case.mask, inputs, expected[name])
        return result

    pairs, cases = list(pairs), list(cases)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(find).result()


def _inputs(case: Case, head_size, dtype, heads) -> dict:
    """{what the passes take: array} but o and lse."""
    sizes = {"q": case.l, "k": case.m, "v": case.m, "dq": case.l, "dk": case.m, "dv": case.m, "g": case.l}
    rng, shift = np.random.default_rng(0), math.sqrt(MEAN_SCORE) * head_size**-0.25
    means = {"q": shift, "k": -shift, "v": 1}
    x = {
        name: jnp.asarray(rng.standard_normal((1, size, heads, head_size), np.float32) + means.get(name, 0), dtype)
        for name, size in sizes.items()
    }
    return x | ({"dk": None, "dv": None} if case.mask is None and case.l != case.m else {})


@functools.partial(jax.jit, static_argnums=0)
def _expected(mask, inputs: dict) -> tuple[dict, dict]:
    """(o and lse, {pass: its outputs}) in float32, by `blockwise`."""
    blockwise = IMPLEMENTATIONS["blockwise"]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    o, lse = forward = _call("forward", blockwise.forward, mask, wide)
    known = {"o": o, "lse": lse}
    derivatives = {name: _call(name, blockwise.does(name), mask, wide | known) for name in ("tangent", "backward")}
    return known, {"value": (o,), "forward": forward, **derivatives}


def _call(name, function, mask, x: dict) -> tuple:
    """The outputs of a pass."""
    q, k, v, scale, options = x["q"], x["k"], x["v"], x["q"].shape[-1] ** -0.5, seeing(mask)
    if name == "value":
        return (function(q, k, v, scale, **options),)
    if name == "forward":
        return function(q, k, v, scale, True, **options)
    if name == "tangent":
        return (function(q, k, v, x["o"], x["lse"], x["dq"], x["dk"], x["dv"], scale, **options),)
    return function(q, k, v, x["o"], x["lse"], x["g"], (True, True, True), scale, **options)


def _find(name, function, mask, inputs, expected) -> Finding:
    mesh, spec = Mesh(np.array(jax.local_devices()[:1]), ("batch",)), PartitionSpec("batch")
    call = functools.partial(_call, name, function, mask)
    call = jax.shard_map(call, mesh=mesh, in_specs=(spec,), out_specs=spec)
    try:
        outputs = [_on_host(x) for x in jax.jit(call)(inputs)]
    except Exception as error:  # whatever a compiler or a kernel raises
        return Finding(math.inf, one_line(error), isinstance(error, ValueError))
    found = [(_error(x, y, what), what) for x, y, what in zip(outputs, expected, OUTPUTS[name], strict=True)]
    return Finding(*max(found, key=lambda each: (math.isnan(each[0]), each[0])))


def _error(x, expected, what) -> float:
    if x.shape != expected.shape or not np.isfinite(x).all():
        return math.nan
    return float(np.abs(x - expected).max() / (1 if what == "lse" else np.abs(expected).max()))


def _on_host(x):
    return np.asarray(x, np.float32)


def one_line(error: Exception) -> str:
    """An error in so many words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

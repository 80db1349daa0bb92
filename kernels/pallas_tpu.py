"""The attention of `kernels.reference` as Pallas kernels for TPUs (Mosaic), with float32 accumulators in VMEM.

Four kernels: the online softmax, alone or with the tangent in the same pass (`forward`, `forward_tangent`); the tangent
from a known lse (`tangent`); and the two of the backward pass, one for dK and dV, one for dQ (`backward`).

Inside, arrays are [b, n, l, d] and the grid is (b, n, tiles that stay, tiles that stream): the last axis runs in order
and adds to accumulators, so that VMEM use does not depend on the number of tokens, and no two programs add to one
place: results are the same from run to run.

Scores are kept transposed, Sᵀ = K Qᵀ [keys, queries]. What belongs to a query (maximum, sum, lse, rowsum H) is then a
row along the lanes: it is reduced over sublanes, without shuffles, and lse is stored as [b, n, 1, l] in blocks of
(1, tile), 128 times less than replicated over lanes. O, Ȯ and dQ are accumulated as [d, queries] and turned at the end.

The last tile may reach beyond the array. What is read there is arbitrary, NaN too: keys beyond get P = 0 and zero rows
of V; queries beyond matter to dK and dV alone, where they are treated alike. What is written there is dropped.

`interpret` says how a kernel runs: False compiles it for a TPU, True interprets it with XLA on any backend (slowly, for
tests), and None leaves it to the platform that the program around it is lowered for, which need not be the one of the
host: compiling for a TPU topology on a machine without one needs no switch.

The tangent in the pass of the softmax: the rCM paper (arXiv 2510.08431); here with one accumulator for P V̇ + H V.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .reference import Gradients, K, Live, Q, Row

DTYPES = ("bfloat16", "float32")
MAX_FEATURES = 256
LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """The most tokens in one tile: multiples of 128 on a TPU."""

    queries: int
    keys: int


# By kernel: (bytes of one token's features in VMEM, where lanes come in 128s; tiles), the first row not exceeded.
# A step of the grid has a fixed cost of a fraction of a microsecond: tiles are as large as compile within the default
# limit of 16 MiB of VMEM. They are the compiler's choice, not yet a clock's.
TILES = {
    "forward": ((256, Tiles(1024, 1024)), (512, Tiles(512, 1024)), (1024, Tiles(256, 512))),
    "fused": ((256, Tiles(1024, 512)), (512, Tiles(512, 512)), (1024, Tiles(256, 256))),  # forward_tangent
    "tangent": ((256, Tiles(1024, 1024)), (512, Tiles(512, 512)), (1024, Tiles(256, 256))),
    "queries": ((256, Tiles(1024, 1024)), (512, Tiles(512, 512)), (1024, Tiles(256, 256))),  # dQ
    "keys": ((256, Tiles(1024, 1024)), (512, Tiles(512, 512)), (1024, Tiles(256, 256))),  # dK and dV
}


def forward(q: Q, k: K, v: K, scale, wide=False, *, interpret=None, tiles=None) -> tuple[Q, Row]:
    """O in the dtype of q, or `wide` in float32, which lse has."""
    plan = _plan("forward", q, k, scale, tiles)
    scratch = {"top": plan.row, "total": plan.row, "o": plan.turned}
    outputs = {"o": jnp.float32 if wide else q.dtype, "lse": jnp.float32}
    out = _launch(_online_kernel, plan, {"q": q, "k": k, "v": v}, outputs, scratch, 2, interpret)
    return out["o"], out["lse"]


def forward_tangent(
    q: Q, k: K, v: K, dq: Q | None, dk: K | None, dv: K | None, scale, *, interpret=None, tiles=None
) -> tuple[Q, Row, Q]:
    """(O, lse, Ȯ) in one pass over the keys: `forward` and `tangent`, with two products less."""
    if dq is None and dk is None and dv is None:
        return *forward(q, k, v, scale, interpret=interpret, tiles=tiles), jnp.zeros_like(q)
    plan = _plan("fused", q, k, scale, tiles)
    inputs = {"q": q, "k": k, "v": v, "dq": dq, "dk": dk, "dv": dv}
    scratch = {"top": plan.row, "total": plan.row, "o": plan.turned, "r": plan.row, "do": plan.turned}
    outputs = {"o": q.dtype, "lse": jnp.float32, "do": q.dtype}
    out = _launch(_online_kernel, plan, inputs, outputs, scratch, 2 + _products_of_flow(dq, dk, dv), interpret)
    return out["o"], out["lse"], out["do"]


def tangent(
    q: Q, k: K, v: K, o: Q, lse: Row, dq: Q | None, dk: K | None, dv: K | None, scale, *, interpret=None, tiles=None
) -> Q:
    """Ȯ along (dq, dk, dv), of which None stands for zero and costs nothing."""
    if dq is None and dk is None and dv is None:
        return jnp.zeros_like(q)
    plan = _plan("tangent", q, k, scale, tiles)
    inputs = {"q": q, "k": k, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if dq is not None or dk is not None:
        inputs |= {"v": v, "o": o}
    scratch = {"r": plan.row, "do": plan.turned}
    products = 1 + _products_of_flow(dq, dk, dv)
    return _launch(_tangent_kernel, plan, inputs, {"do": q.dtype}, scratch, products, interpret)["do"]


def backward(q: Q, k: K, v: K, o: Q, lse: Row, g: Q, live: Live, scale, *, interpret=None, tiles=None) -> Gradients:
    """From g, the cotangent of Ȯ, to those of (dq, dk, dv), None where `live` is False: the transpose of `tangent`."""
    live_q, live_k, live_v = live
    inputs = {"q": q, "k": k, "g": g, "lse": lse}
    moving_scores = {}
    if live_q or live_k:
        row = (g.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
        moving_scores = {"v": v, "row": row}
    out = {}
    if live_k or live_v:
        plan = _plan("keys", q, k, scale, tiles)
        names = ("dk",) * live_k + ("dv",) * live_v
        scratch = dict.fromkeys(names, plan.upright)
        used = inputs | moving_scores if live_k else inputs
        outputs = dict.fromkeys(names, k.dtype)
        out |= _launch(_keys_kernel, plan, used, outputs, scratch, 1 + 2 * live_k + live_v, interpret)
    if live_q:
        plan = _plan("queries", q, k, scale, tiles)
        outputs, scratch = {"dq": q.dtype}, {"dq": plan.turned}
        out |= _launch(_queries_kernel, plan, inputs | moving_scores, outputs, scratch, 3, interpret)
    return out.get("dq"), out.get("dk"), out.get("dv")


def _online_kernel(plan, refs, out, acc):
    """Softmax over the keys that stream by, rescaled when a score exceeds the largest so far; Ȯ too if asked for."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        for name, ref in acc.items():
            ref[...] = jnp.full(ref.shape, -jnp.inf if name == "top" else 0, ref.dtype)

    @_each_tile(plan)
    def _(valid):
        s = _mask(plan, _scores(refs["k"], refs["q"]) * (plan.scale * LOG2_E), valid, -jnp.inf)
        top = jnp.maximum(acc["top"][...], s.max(0, keepdims=True))
        shrink = jnp.exp2(acc["top"][...] - top)
        p = _rounded(jnp.exp2(s - top), refs["v"])
        acc["top"][...] = top
        acc["total"][...] = shrink * acc["total"][...] + p.sum(0, keepdims=True)
        acc["o"][...] = shrink * acc["o"][...] + _weigh(refs["v"], p, valid)
        if "do" in out:
            do, r = _flow(plan, refs, p, valid)
            acc["do"][...] = shrink * acc["do"][...] + do
            acc["r"][...] = shrink * acc["r"][...] + r

    @_after_last(plan)
    def _():
        total = acc["total"][...]
        o = acc["o"][...] / total
        out["o"][...] = o.T.astype(out["o"].dtype)
        out["lse"][...] = (acc["top"][...] + jnp.log2(total)) / LOG2_E
        if "do" in out:
            out["do"][...] = ((acc["do"][...] - acc["r"][...] * o) / total).T.astype(out["do"].dtype)


def _tangent_kernel(plan, refs, out, acc):
    """Ȯ = (P V̇ + H V) − rowsum(H)∘O, the keys streaming by."""
    _start_from_zero(acc)

    @_each_tile(plan)
    def _(valid):
        do, r = _flow(plan, refs, _probabilities(plan, refs, valid), valid)
        acc["do"][...] += do
        acc["r"][...] += r

    @_after_last(plan)
    def _():
        do = acc["do"][...]
        if "o" in refs:
            do -= acc["r"][...] * refs["o"][...].astype(do.dtype).T
        out["do"][...] = do.T.astype(out["do"].dtype)


def _queries_kernel(plan, refs, out, acc):
    """dQ = scale·dS K, the keys streaming by."""
    _start_from_zero(acc)

    @_each_tile(plan)
    def _(valid):
        p = _probabilities(plan, refs, valid)
        acc["dq"][...] += _weigh(refs["k"], _score_cotangent(plan, refs, p, valid), valid)

    @_after_last(plan)
    def _():
        out["dq"][...] = (plan.scale * acc["dq"][...]).T.astype(out["dq"].dtype)


def _keys_kernel(plan, refs, out, acc):
    """dK = scale·dSᵀ Q and dV = Pᵀ G, those of the two that are asked for, the queries streaming by."""
    _start_from_zero(acc)

    @_each_tile(plan)
    def _(valid):
        p = _probabilities(plan, refs, valid)
        if "dv" in out:
            acc["dv"][...] += _product(p, _rows(refs["g"], valid), (1, 0))
        if "dk" in out:
            acc["dk"][...] += _product(_score_cotangent(plan, refs, p, valid), _rows(refs["q"], valid), (1, 0))

    @_after_last(plan)
    def _():
        for name, factor in (("dk", plan.scale), ("dv", 1)):
            if name in out:
                out[name][...] = (factor * acc[name][...]).astype(out[name].dtype)


def _start_from_zero(acc):
    """Clears the accumulators before the first tile."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        for ref in acc.values():
            ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _each_tile(plan):
    """Decorates what is done with one tile of the stream; its argument is how much of a ragged last tile is real."""

    # Under pl.when even where it is always true: inside shard_map an interpreted kernel is checked op by op, and
    # constants at its outermost level then do not vary as they should.
    def run(step):
        at, last = pl.program_id(3), plan.grid[3] - 1
        if plan.valid is None:
            pl.when(at <= last)(lambda: step(None))
            return
        if last > 0:
            pl.when(at < last)(lambda: step(None))
        pl.when(at == last)(lambda: step(plan.valid))

    return run


def _after_last(plan):
    """Decorates what is done after the last tile of the stream."""
    return pl.when(pl.program_id(3) == plan.grid[3] - 1)


def _product(x, y, axes):
    """x and y summed over axes[0] of x and axes[1] of y, into float32; x is rounded to the dtype of y first."""
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x.astype(y.dtype), y, numbers, precision=precision, preferred_element_type=jnp.float32)


def _scores(keys, queries):
    """K Qᵀ [keys, queries], not scaled."""
    return _product(keys[...], queries[...], (1, 1))


def _weigh(values, weights, valid):
    """Vᵀ W [d, queries] of values [keys, d] and weights [keys, queries]."""
    values = _rows(values, valid)
    return _product(values, weights.astype(values.dtype), (0, 0))


def _probabilities(plan, refs, valid):
    """P [keys, queries], from lse."""
    s = _scores(refs["k"], refs["q"]) * (plan.scale * LOG2_E)
    return _mask(plan, jnp.exp2(s - refs["lse"][...] * LOG2_E), valid)


def _flow(plan, refs, p, valid):
    """(V̇ᵀP + VᵀH [d, queries], the sums of H over the keys [1, queries]) of one tile of keys."""
    do, r = 0.0, 0.0
    if "dv" in refs:
        do = _weigh(refs["dv"], p, valid)
    pairs = [(x, y) for x, y in (("k", "dq"), ("dk", "q")) if x in refs and y in refs]
    if pairs:
        h = _mask(plan, plan.scale * p * sum(_scores(refs[x], refs[y]) for x, y in pairs), valid)
        h = _rounded(h, refs["v"])
        do += _weigh(refs["v"], h, valid)
        r = h.sum(0, keepdims=True)
    return do, r


def _score_cotangent(plan, refs, p, valid):
    """dSᵀ = P∘(V Gᵀ − rowsum(G∘O)) [keys, queries]."""
    return _mask(plan, p * (_scores(refs["v"], refs["g"]) - refs["row"][...]), valid)


def _rounded(x, like):
    """x as a product with `like` will have it.

    O is a mean of V and Ȯ a difference from it: what all rows of V share cancels if the weights that
    are summed are those that V is multiplied by.
    """
    return x.astype(like.dtype).astype(x.dtype)


def _mask(plan, x, valid, fill=0.0):
    """[keys, queries] with `fill` beyond what is real of the tile that streams."""
    if valid is None:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, plan.stream_axis) < valid, x, fill)


def _rows(ref, valid):
    """The rows of a tile that streams, zeros beyond the real ones."""
    x = ref[...]
    if valid is None:
        return x
    real = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < valid
    return jnp.where(real, x.astype(jnp.float32), 0.0).astype(x.dtype)


class _Plan(NamedTuple):
    """How a kernel is cut: grid (b, n, tiles that stay, tiles that stream), tile sizes, what the last tile holds."""

    grid: tuple[int, int, int, int]
    tiles: Tiles
    features: int
    streams: str  # "queries" or "keys"
    valid: int | None  # tokens in the last tile of the stream; None if it is full
    scale: float
    flops: int  # of one product

    @property
    def stream_axis(self):
        return ("keys", "queries").index(self.streams)

    @property
    def row(self):
        return (1, self.tiles.queries)

    @property
    def turned(self):
        return (self.features, self.tiles.queries)

    @property
    def upright(self):
        return (self.tiles.keys, self.features)


def _plan(kernel, q, k, scale, tiles):
    """The plan of a kernel in TILES, with at most `tiles` tokens in a tile if given.

    Raises:
      ValueError: a dtype or a feature size that the kernels do not take.
    """
    b, l, n, d = q.shape
    m = k.shape[1]
    if q.dtype.name not in DTYPES:
        raise ValueError(
            f"attention on TPU takes {' and '.join(DTYPES)}, got {q.dtype}: cast to one of them, "
            "or choose implementation='blockwise'"
        )
    if d > MAX_FEATURES:
        raise ValueError(
            f"attention on TPU takes up to {MAX_FEATURES} features a head, got {d}: choose implementation='blockwise'"
        )
    if tiles is None:
        tiles = next(tiles for limit, tiles in TILES[kernel] if max(d, 128) * q.dtype.itemsize <= limit)
    (query_count, query_tile), (key_count, key_tile) = _cut(l, tiles.queries), _cut(m, tiles.keys)
    streams = "queries" if kernel == "keys" else "keys"
    stay, stream, length, tile = query_count, key_count, m, key_tile
    if streams == "queries":
        stay, stream, length, tile = key_count, query_count, l, query_tile
    valid = length - (stream - 1) * tile
    return _Plan(
        grid=(b, n, stay, stream),
        tiles=Tiles(query_tile, key_tile),
        features=d,
        streams=streams,
        valid=None if valid == tile else valid,
        scale=scale,
        flops=2 * b * n * l * m * d,
    )


def _cut(length, most):
    """(number of tiles, tokens in each): as few tiles of at most `most` tokens as possible, evenly filled."""
    lanes = math.gcd(most, 128)
    size = -(-length // -(-length // most))
    size = -(-size // lanes) * lanes
    return -(-length // size), size


_PER_QUERY = ("q", "o", "g", "lse", "row")  # and their tangents and gradients; the others belong to keys
_ROWS = ("lse", "row")


def _side(name):
    return "queries" if name.removeprefix("d") in _PER_QUERY else "keys"


def _spec(plan, name):
    """The tile of an array: [tokens, d], or [1, tokens] of a row."""
    side = _side(name)
    tile, axis = getattr(plan.tiles, side), 3 if side == plan.streams else 2
    if name in _ROWS:
        return pl.BlockSpec((None, None, 1, tile), lambda *at: (at[0], at[1], 0, at[axis]))
    return pl.BlockSpec((None, None, tile, plan.features), lambda *at: (at[0], at[1], at[axis], 0))


def _launch(kernel, plan, inputs, outputs, scratch, products, interpret):
    """{name: array} of outputs {name: dtype}: [b, l, n, d], or [b, n, l] of a row. None is no input."""
    inputs = {name: x for name, x in inputs.items() if x is not None}
    moved = {name: x[:, :, None] if name in _ROWS else x.swapaxes(1, 2) for name, x in inputs.items()}
    b, l, n, d = inputs["q"].shape
    tokens = {"queries": l, "keys": inputs["k"].shape[1]}
    varying = jax.typeof(inputs["q"]).manual_axis_type

    def shape(name):
        size = (b, n, 1, l) if name in _ROWS else (b, n, tokens[_side(name)], d)
        return jax.ShapeDtypeStruct(size, outputs[name], manual_axis_type=varying)

    def run(interpret):
        return pl.pallas_call(
            functools.partial(kernel, plan),
            out_shape={name: shape(name) for name in outputs},
            grid=plan.grid,
            in_specs=[{name: _spec(plan, name) for name in moved}],
            out_specs={name: _spec(plan, name) for name in outputs},
            scratch_shapes=[{name: pltpu.VMEM(size, jnp.float32) for name, size in scratch.items()}],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
            cost_estimate=pl.CostEstimate(
                flops=products * plan.flops,
                transcendentals=plan.flops // (2 * d),
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs.values()),
            ),
            interpret=interpret,
            name=f"attention{kernel.__name__}",
        )

    if interpret is None:
        out = jax.lax.platform_dependent(moved, tpu=run(False), default=run(True))
    else:
        out = run(interpret)(moved)
    return {name: x[:, :, 0] if name in _ROWS else x.swapaxes(1, 2) for name, x in out.items()}


def _products_of_flow(dq, dk, dv):
    """How many of the products of `_flow` are made."""
    scores = (dq is not None) + (dk is not None)
    return scores + bool(scores) + (dv is not None)

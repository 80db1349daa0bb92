"""The attention of `kernels.reference` as Pallas kernels for TPUs (Mosaic), with float32 accumulators in VMEM.

Three kernels (kernels.pallas_tpu_kernels): the online softmax, alone or with the tangent in the same pass (`forward`,
`forward_tangent`); the tangent from a known lse (`tangent`); and the backward pass with all three gradients
(`backward`), 5 products. This module lays the arrays out, cuts them into tiles and starts the kernels.

The grid is (b, n, visits). A visit is a pair of a tile of queries and a tile of keys, and a table that goes ahead of
the arrays says which: all pairs, or those that a mask lets see each other. One of the two tiles stays while those of
the other stream by and add to accumulators, so that VMEM does not hold more with more keys; the backward pass, whose
keys stay, also keeps dQ of all queries of a head, and takes as many of them at a time as VMEM holds. Visits run in
order and no two programs add to one place: results are the same from run to run.

Scores are kept transposed, Sᵀ = K Qᵀ [keys, queries]. What belongs to a query (maximum, lse) is then a row along the
lanes: it is reduced over sublanes, without shuffles, and lse is stored as [b, n, 1, l] in blocks of (1, tile), 128
times less than replicated over lanes. O, Ȯ and dQ are accumulated as [d, queries] and turned at the end; the arrays
that are multiplied so (V, V̇ and backward K) come as [b, n, d, m].

The last tile may reach beyond the array. What is read there is arbitrary, NaN too: pieces that can be there are taken
as zeros, and so are their weights. Whether it is the last tile is not known where a piece is worked off; but the other
pieces are full in any tile, and cost nothing. What is written there is dropped.

`interpret` says how a kernel runs: False compiles it for a TPU, True interprets it with XLA on any backend (slowly, for
tests), and None leaves it to the platform that the program around it is lowered for, which need not be the one of the
host: compiling for a TPU topology on a machine without one needs no switch.

The tangent in the pass of the softmax: the rCM paper (arXiv 2510.08431); here with one accumulator for P V̇ + H V.
"""

import contextlib
import contextvars
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import masks
from . import pallas_tpu_kernels as kernels
from .masks import BlockCausal
from .reference import Gradients, K, Live, Q, Row

DTYPES = ("bfloat16", "float32")
MAX_FEATURES = 256
VMEM = 60 * 2**20  # bytes a kernel may use; it is 16 MiB by default
DQ = 32 * 2**20  # of which dQ of a head may be so many: that of 32,768 queries at 128 features in bfloat16
ONES = 16  # rows below Vᵀ, of which the first is ones: a tile of 16-bit rows


class Tiles(NamedTuple):
    """The most tokens in one tile: multiples of 128 on a TPU."""

    queries: int
    keys: int


class Pieces(NamedTuple):
    """What of a tile is one product, and how many of these are made before the first is used."""

    queries: int
    keys: int
    ahead: int
    ones: bool  # whether sums of weights are made by a row of ones below Vᵀ, not by the vector units


# {how wide the matrix units are: {kernel: its cut}} for 16-bit inputs of up to 128 features; 256 on v6e and later. They
# are what the compiler schedules best, which `python -m kernels.tpu_report` shows; not yet a clock's choice.
CUTS = {
    128: {
        "online": (Tiles(2048, 2048), Pieces(256, 128, 1, False)),
        "fused": (Tiles(1024, 2048), Pieces(256, 128, 1, False)),
        "tangent": (Tiles(1024, 2048), Pieces(256, 128, 1, False)),
        "backward": (Tiles(1024, 2048), Pieces(256, 128, 1, False)),
    },
    256: {
        "online": (Tiles(2048, 2048), Pieces(512, 512, 1, True)),
        "fused": (Tiles(1024, 2048), Pieces(256, 256, 4, True)),
        "tangent": (Tiles(1024, 2048), Pieces(256, 256, 1, False)),
        "backward": (Tiles(1024, 2048), Pieces(256, 256, 1, False)),
    },
}
OTHERS = (Tiles(512, 512), Pieces(256, 128, 1, False))  # other dtypes and sizes, for every kernel


def forward(
    q: Q, k: K, v: K, scale, wide=False, mask: BlockCausal | None = None, *, interpret=None, tiles=None, pieces=None
) -> tuple[Q, Row]:
    """O in the dtype of q, or `wide` in float32, which lse has."""
    plan = _plan("online", q, k, scale, mask, tiles, pieces)
    inputs = {"q": q, "k": k, "v_turned": v}
    outputs = {"o": jnp.float32 if wide else q.dtype, "lse": jnp.float32}
    scratch = {"top": plan.row, "total": plan.row, "o": plan.turned}
    out = _launch(kernels.online, plan, inputs, outputs, scratch, 2, interpret)
    return out["o"], out["lse"]


def forward_tangent(
    q: Q,
    k: K,
    v: K,
    dq: Q | None,
    dk: K | None,
    dv: K | None,
    scale,
    wide=False,
    mask: BlockCausal | None = None,
    *,
    interpret=None,
    tiles=None,
    pieces=None,
) -> tuple[Q, Row, Q]:
    """(O, lse, Ȯ) in one pass over the keys: `forward` and `tangent`, with one product less."""
    if dq is None and dk is None and dv is None:
        made = forward(q, k, v, scale, wide, mask, interpret=interpret, tiles=tiles, pieces=pieces)
        return *made, jnp.zeros_like(q)
    plan = _plan("fused", q, k, scale, mask, tiles, pieces)
    inputs = {"q": q, "k": k, "v_turned": v, "dq": dq, "dk": dk, "dv_turned": dv}
    outputs = {"o": jnp.float32 if wide else q.dtype, "lse": jnp.float32, "do": q.dtype}
    scratch = {"top": plan.row, "total": plan.row, "o": plan.turned, "do": plan.turned}
    if dq is not None or dk is not None:
        scratch["r"] = plan.row
    out = _launch(kernels.online, plan, inputs, outputs, scratch, 2 + _products_of_flow(dq, dk, dv), interpret)
    return out["o"], out["lse"], out["do"]


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
    interpret=None,
    tiles=None,
    pieces=None,
) -> Q:
    """Ȯ along (dq, dk, dv), of which None stands for zero and costs nothing."""
    if dq is None and dk is None and dv is None:
        return jnp.zeros_like(q)
    plan = _plan("tangent", q, k, scale, mask, tiles, pieces)
    inputs, scratch = {"q": q, "k": k, "lse": lse, "dq": dq, "dk": dk, "dv_turned": dv}, {"do": plan.turned}
    if dq is not None or dk is not None:
        inputs |= {"v_turned": v, "o": o}
        scratch["r"] = plan.row
    products = 1 + _products_of_flow(dq, dk, dv)
    return _launch(kernels.tangent, plan, inputs, {"do": q.dtype}, scratch, products, interpret)["do"]


def backward(
    q: Q,
    k: K,
    v: K,
    o: Q,
    lse: Row,
    g: Q,
    live: Live,
    scale,
    mask: BlockCausal | None = None,
    *,
    interpret=None,
    tiles=None,
    pieces=None,
) -> Gradients:
    """From g, the cotangent of Ȯ, to those of (dq, dk, dv), None where `live` is False: the transpose of `tangent`."""
    if not any(live):
        return None, None, None
    l = q.shape[1]
    size = -(-l // -(-l // _most_queries(q)))
    cut = functools.partial(_plan, "backward", k=k, scale=scale, mask=mask, tiles=tiles, pieces=pieces)
    made = []
    for start in range(0, l, size):
        part = slice(start, start + size)
        of_queries = q[:, part], o[:, part], lse[:, :, part], g[:, part]
        plan = cut(q=of_queries[0], first_position=k.shape[1] - l + start)
        made.append(_backward(plan, k, v, *of_queries, live, k.dtype if size == l else jnp.float32, interpret))
    dq, dk, dv = (
        [x[name] for x in made] if alive else None for name, alive in zip(("dq", "dk", "dv"), live, strict=True)
    )
    dq = None if dq is None else jnp.concatenate(dq, axis=1)
    dk, dv = (None if x is None else functools.reduce(jnp.add, x).astype(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def _most_queries(q):
    """How many queries of a head have their dQ in VMEM at a time: a float32 accumulator, and the result twice."""
    d = max(q.shape[-1], 128)
    return DQ // (4 * d + 2 * q.dtype.itemsize * d)


def _backward(plan, k, v, q, o, lse, g, live, dtype, interpret):
    """{"dq": of these queries, "dk", "dv": their part, in dtype}, those that are live."""
    inputs = {"q": q, "k": k, "g": g, "lse": lse}
    if live[0] or live[1]:
        row = (g.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
        inputs |= {"v": v, "row": row}
    outputs, scratch = {}, {}
    if live[0]:
        inputs["k_turned"] = k
        outputs["dq"], scratch["dq"] = q.dtype, (plan.feature_rows, plan.padded["queries"])
    for name, alive in zip(("dk", "dv"), live[1:], strict=True):
        if alive:
            outputs[name], scratch[name] = dtype, plan.upright
    return _launch(kernels.backward, plan, inputs, outputs, scratch, 1 + (live[0] or live[1]) + sum(live), interpret)


class Visit(NamedTuple):
    """Where a step of the grid stands."""

    query_tile: jax.Array
    key_tile: jax.Array
    seen: jax.Array  # how much of the keys: NOTHING, PARTLY or WHOLLY of kernels.masks
    first: jax.Array  # of the tile that stays
    last: jax.Array
    starts: jax.Array  # the first of a head
    ends: jax.Array

    def tile(self, side):
        """That of the "queries" or the "keys"."""
        return self.query_tile if side == "queries" else self.key_tile


_PER_QUERY = ("q", "o", "g", "lse", "row")  # and their tangents and gradients; the others belong to keys
_ROWS = ("lse", "row")


class _Plan(NamedTuple):
    """How a kernel is cut; its grid is (b, n, visits)."""

    tiles: Tiles
    pieces: Pieces
    batch: int
    heads: int
    queries: int  # how many there are
    keys: int
    features: int
    first_position: int  # of the first query among the keys
    stays: str  # "queries" or "keys"
    mask: BlockCausal | None
    scale: float

    @property
    def padded(self):
        """Tokens with those that fill the last tile."""
        return {x: -(-getattr(self, x) // getattr(self.tiles, x)) * getattr(self.tiles, x) for x in ("queries", "keys")}

    @staticmethod
    def side(name):
        """Whether the tokens of an array are "queries" or "keys"."""
        return "queries" if name.removesuffix("_turned").removeprefix("d") in _PER_QUERY else "keys"

    @staticmethod
    def is_upright(name):
        """Whether it is [tokens, d]; a row and what is turned have their tokens behind."""
        return name not in _ROWS and not name.endswith("_turned")

    def is_full(self, side, tokens):
        """Whether these tokens of a tile are real in every tile."""
        return tokens.start + tokens.size <= getattr(self.tiles, side) - self.padded[side] + getattr(self, side)

    @property
    def query_tiles(self):
        """How many tiles the queries have."""
        return self.padded["queries"] // self.tiles.queries

    @property
    def feature_rows(self):
        """Of a turned array: whole tiles of rows, with those that fill the last."""
        return -(-self.features // ONES) * ONES

    @property
    def row(self):
        """The shape of what a tile of queries has one number each of."""
        return (1, self.tiles.queries)

    @property
    def turned(self):
        """The shape of an accumulator of a tile of queries."""
        return (self.feature_rows, self.tiles.queries)

    @property
    def upright(self):
        """The shape of an accumulator of a tile of keys."""
        return (self.tiles.keys, self.features)

    def visits(self) -> np.ndarray:
        """[visits] of int32: 2 bits of `seen`, 1 of first, 1 of last, 14 of the tile that streams, 14 of the other."""
        l, m, tiles = self.queries, self.keys, self.tiles
        if self.mask is None:
            table = np.full((self.query_tiles, self.padded["keys"] // tiles.keys), masks.WHOLLY)
        else:
            table = masks.tile_table(self.mask, l, m, *tiles, first=self.first_position)
        table = np.array(table if self.stays == "queries" else table.T)
        visited = table > masks.NOTHING
        visited[~visited.any(1), 0] = True  # what nobody sees gets its zeros, by a visit that computes nothing
        stay, stream = np.nonzero(visited)
        first, last = np.diff(stay, prepend=-1) > 0, np.diff(stay, append=len(table)) > 0
        return (stay << 18 | stream << 4 | last << 3 | first << 2 | table[visited]).astype(np.int32)

    def tile(self, side, visit):
        """Which tile of the queries or the keys an entry of `visits` has."""
        return visit >> 18 if side == self.stays else (visit >> 4) & (1 << 14) - 1


def _plan(kernel, q, k, scale, mask, tiles, pieces, first_position=None):
    """The plan of a kernel in CUTS, with at most `tiles` tokens in a tile if given.

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
    best = CUTS[matrix_width()][kernel] if d <= 128 and q.dtype.itemsize == 2 else OTHERS
    tiles, pieces = tiles or best[0], pieces or best[1]
    tiles = Tiles(_cut(l, tiles.queries, pieces.queries), _cut(m, tiles.keys, pieces.keys))
    return _Plan(
        tiles=tiles,
        pieces=pieces._replace(queries=math.gcd(tiles.queries, pieces.queries), keys=math.gcd(tiles.keys, pieces.keys)),
        batch=b,
        heads=n,
        queries=l,
        keys=m,
        features=d,
        first_position=m - l if first_position is None else first_position,
        stays="keys" if kernel == "backward" else "queries",
        mask=mask,
        scale=scale,
    )


TARGET = contextvars.ContextVar[str | None]("kind of TPU", default=None)


@contextlib.contextmanager
def compiling_for(kind: str):
    """What is traced inside is for TPUs of that kind ("TPU v6 lite"), whatever this machine has."""
    token = TARGET.set(kind)
    try:
        yield
    finally:
        TARGET.reset(token)


def matrix_width() -> int:
    """Rows and columns of a matrix unit of the TPU of `compiling_for`, else of the default device: a key of CUTS."""
    kind = TARGET.get() or (jax.devices()[0].device_kind if jax.default_backend() == "tpu" else "")
    return 256 if any(name in kind for name in ("v6", "7x")) else 128


def _cut(length, most, piece):
    """Tokens in a tile: of the sizes from `most` down to its half, the one that the last tile fills best."""
    lanes = math.gcd(most, 128)
    if length <= most:
        return -(-length // lanes) * lanes
    step = min(most, max(lanes, piece))
    return min(range(most, most // 2, -step), key=lambda size: -(-length // size) * size)


def _features(plan, name):
    """How many numbers a token has in an array as kernels have it."""
    if name in _ROWS:
        return 1
    if name.endswith("_turned"):
        return plan.feature_rows + ONES * (name == "v_turned" and plan.pieces.ones)
    return plan.features


def _arranged(plan, name, x):
    """An input as kernels have it."""
    if name in _ROWS:
        return x[:, :, None]
    if plan.is_upright(name):
        return x.swapaxes(1, 2)
    x = x.transpose(0, 2, 3, 1)
    rows = _features(plan, name) - plan.features
    ones = jnp.arange(rows) == plan.feature_rows - plan.features if plan.pieces.ones else jnp.zeros(rows, bool)
    below = jnp.broadcast_to(ones[:, None], (*x.shape[:2], rows, x.shape[3]))
    return jnp.concatenate([x, below.astype(x.dtype)], axis=2) if rows else x


def _spec(plan, name, features):
    """The tile of an array as `_arranged` makes it: [tokens, d], [features, tokens], or [1, tokens] of a row."""
    side = plan.side(name)
    size = getattr(plan.tiles, side)
    if name == "dq" and plan.stays == "keys":  # all queries of a head
        return pl.BlockSpec((None, None, plan.padded[side], features), lambda b, n, at, visits: (b, n, 0, 0))
    if not plan.is_upright(name):
        return pl.BlockSpec(
            (None, None, features, size), lambda b, n, at, visits: (b, n, 0, plan.tile(side, visits[at]))
        )
    return pl.BlockSpec((None, None, size, features), lambda b, n, at, visits: (b, n, plan.tile(side, visits[at]), 0))


def _launch(body, plan, inputs, outputs, scratch, products, interpret):
    """{name: array} of outputs {name: dtype}: [b, l, n, d], or [b, n, l] of a row. None is no input."""
    arrays = {name: _arranged(plan, name, x) for name, x in inputs.items() if x is not None}
    visits = plan.visits()
    varying = jax.typeof(inputs["q"]).manual_axis_type
    pairs = plan.batch * plan.heads * len(visits) * math.prod(plan.tiles)

    def kernel(visits, refs, out, acc):
        at = pl.program_id(2)
        entry, last = visits[at], pl.num_programs(2) - 1
        first_of_row, last_of_row = (entry >> i & 1 == 1 for i in (2, 3))
        tiles = (plan.tile(side, entry) for side in ("queries", "keys"))
        visit = Visit(*tiles, seen=entry & 3, first=first_of_row, last=last_of_row, starts=at == 0, ends=at == last)
        body(plan, visit, refs, out, acc)

    def shape(name):
        side = plan.side(name)
        tokens = plan.padded[side] if name == "dq" and plan.stays == "keys" else getattr(plan, side)
        size = (1, tokens) if name in _ROWS else (tokens, plan.features)
        return jax.ShapeDtypeStruct((plan.batch, plan.heads, *size), outputs[name], manual_axis_type=varying)

    def run(interpret):
        return pl.pallas_call(
            kernel,
            out_shape={name: shape(name) for name in outputs},
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(plan.batch, plan.heads, len(visits)),
                in_specs=[{name: _spec(plan, name, _features(plan, name)) for name in arrays}],
                out_specs={name: _spec(plan, name, _features(plan, name)) for name in outputs},
                scratch_shapes=[{name: pltpu.VMEM(size, jnp.float32) for name, size in scratch.items()}],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
            ),
            cost_estimate=pl.CostEstimate(
                flops=products * 2 * pairs * plan.features,
                transcendentals=pairs,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays.values()),
            ),
            interpret=interpret,
            name=f"attention_{body.__name__}",
        )

    if interpret is None:
        out = jax.lax.platform_dependent(visits, arrays, tpu=run(False), default=run(True))
    else:
        out = run(interpret)(visits, arrays)
    return {
        name: x[:, :, 0] if name in _ROWS else x[:, :, : getattr(plan, plan.side(name))].swapaxes(1, 2)
        for name, x in out.items()
    }


def _products_of_flow(dq, dk, dv):
    """How many of the products of `_flow` are made."""
    scores = (dq is not None) + (dk is not None)
    return scores + bool(scores) + (dv is not None)

"""The Triton kernels that `kernels.triton` launches. Needs triton: import this module only where it is there.

Every array of tokens is [b, l, n, d] and contiguous, every row statistic (lse, delta) [b, n, l] and float32. A program
works on one tile of the tokens of one head of one batch entry: axis 0 of the grid counts tiles, 1 heads, 2 the batch.
What a kernel does not need (a tangent that is zero, a gradient nobody asks for) is switched off by a constant; the
pointer in its place is not looked at. All sizes are constants too: JAX compiles for each shape anyhow, and constant
strides tell the compiler how loads align.

- Scores are taken to base 2, S·scale·log₂e, for exp2 is what the hardware has; lse is stored to base e.
- Offsets within a tile are 32-bit, those of tiles 64-bit: [b, l, n, d] may hold more than 2³¹ elements.
- Where the last tile is ragged, every tile is loaded with masks: a tail with a loop body of its own would double the
  code and cost registers, which are what limits these kernels. Keys behind the last get the score −∞, so that P = 0.
  Queries behind the last are zeros, with an lse of zero: they add P = 1 times zeros to dK and dV.
- A mask (`kernels.masks`) is CHUNK > 0, the tokens of a chunk. One loop goes over the tiles that are seen: those of the
  sink, then, past a gap, those of the window. What lies on an edge of the mask is masked, tile by tile, as a ragged
  tail is; where a tile lies costs a few comparisons of numbers that all threads share.
- Features are padded to BLOCK_D, a power of two, with zeros.
- Sums are float32. P, H = P∘Ṡ and dS are rounded to the dtype of the inputs for the second product,
  as O and Ȯ are; in float16 an entry of H or dS beyond 65,504 overflows. The sums of P and H are those
  of rounded ones: what all rows of V share then cancels in Ȯ, whatever the rounding.
- No atomics: a repeated run gives the same bits.
"""

# Constants are passed as plain values.
# pyright: reportArgumentType=false
import triton
import triton.language as tl

from .triton_masks import seeing_queries, seen, sees_all, visible_keys

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3e38)  # finite, so that a query that sees nothing of a tile adds exp2(−∞) to its sums


@triton.jit
def _of_head(pointer, LENGTH: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """[b, l, n, d] → its first token of this program's batch entry and head."""
    return pointer + (tl.program_id(2).to(tl.int64) * LENGTH * HEADS + tl.program_id(1)) * DIM


@triton.jit
def _of_row(pointer, LENGTH: tl.constexpr, HEADS: tl.constexpr):
    """[b, n, l] → its first token of this program's batch entry and head."""
    return pointer + (tl.program_id(2).to(tl.int64) * HEADS + tl.program_id(1)) * LENGTH


@triton.jit
def _offsets(HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * (HEADS * DIM) + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _inside(start, LENGTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D]: whether there is such a token and such a feature."""
    return (start + tl.arange(0, ROWS) < LENGTH)[:, None] & (tl.arange(0, BLOCK_D) < DIM)[None, :]


@triton.jit
def _load(
    pointer,
    start,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """[ROWS, BLOCK_D] tokens from `start` on, zeros outside; RAGGED says that they may run over the end."""
    pointers = pointer + tl.cast(start, tl.int64) * (HEADS * DIM) + _offsets(HEADS, DIM, ROWS, BLOCK_D)
    if RAGGED:
        return tl.load(pointers, mask=_inside(start, LENGTH, DIM, ROWS, BLOCK_D), other=0.0)
    elif DIM < BLOCK_D:
        return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(
    pointer,
    x,
    start,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores [ROWS, BLOCK_D] tokens from `start` on, those that are there, in the dtype of the pointer."""
    pointers = pointer + tl.cast(start, tl.int64) * (HEADS * DIM) + _offsets(HEADS, DIM, ROWS, BLOCK_D)
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=_inside(start, LENGTH, DIM, ROWS, BLOCK_D))


@triton.jit
def _load_row(pointer, start, LENGTH: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """[ROWS] row statistics from `start` on, zeros outside."""
    index = start + tl.arange(0, ROWS)
    if RAGGED:
        return tl.load(pointer + index, mask=index < LENGTH, other=0.0)
    else:
        return tl.load(pointer + index)


@triton.jit
def _store_row(pointer, x, start, LENGTH: tl.constexpr, ROWS: tl.constexpr):
    """Stores [ROWS] row statistics from `start` on, those that are there."""
    index = start + tl.arange(0, ROWS)
    tl.store(pointer + index, x, mask=index < LENGTH)


@triton.jit
def _product(x, y):
    """X Y in float32; float32 inputs are not rounded to tf32."""
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _add_product(sum, x, y):
    """sum + X Y, added up in the registers of the sum."""
    return tl.dot(x, y, sum, input_precision="ieee")


@triton.jit
def _moving_scores(q, k, dq, dk, MOVES_Q: tl.constexpr, MOVES_K: tl.constexpr):
    """Q̇ Kᵀ + Q K̇ᵀ, unscaled."""
    if MOVES_Q and MOVES_K:
        return _add_product(_product(dq, tl.trans(k)), q, tl.trans(dk))
    elif MOVES_Q:
        return _product(dq, tl.trans(k))
    else:
        return _product(q, tl.trans(dk))


@triton.jit
def _mask_keys(
    s,
    query,
    key,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINK: tl.constexpr,
):
    """−∞ for keys (the columns) that are not seen or not there. Only tiles at an edge pay for it."""
    keys = key + tl.arange(0, BLOCK_K)[None, :]
    if CHUNK > 0:
        if not sees_all(query, key, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK):
            queries = query + tl.arange(0, BLOCK_Q)[:, None]
            s = tl.where(seen(queries, keys, Q_LEN, K_LEN, CHUNK, WINDOW, SINK), s, float("-inf"))
    elif K_LEN % BLOCK_K > 0:  # noqa: SIM102, it is decided at compile time
        if key + BLOCK_K > K_LEN:
            s = tl.where(keys < K_LEN, s, float("-inf"))
    return s


@triton.jit
def _mask_queries(
    p,
    query,
    key,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINK: tl.constexpr,
):
    """Zero for queries (the columns) that do not see a key. Only tiles at an edge pay for it."""
    if CHUNK > 0:  # noqa: SIM102, the outer one is decided at compile time
        if not sees_all(query, key, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK):
            queries = query + tl.arange(0, BLOCK_Q)[None, :]
            keys = key + tl.arange(0, BLOCK_K)[:, None]
            p = tl.where(seen(queries, keys, Q_LEN, K_LEN, CHUNK, WINDOW, SINK), p, 0.0)
    return p


@triton.jit
def forward(
    q_at,
    k_at,
    v_at,
    dq_at,
    dk_at,
    dv_at,
    o_at,
    lse_at,
    do_at,
    SCALE: tl.constexpr,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOVES_Q: tl.constexpr,
    MOVES_K: tl.constexpr,
    MOVES_V: tl.constexpr,
):
    """O and lse by the online softmax; Ȯ too, in the same pass, where anything moves.

    Beside the maximum, the sum and O there are one accumulator A = Σ (P̃ V̇ + H̃ V) and r = Σ rowsum H̃, rescaled
    together when the maximum moves; in the end Ȯ = (A − r∘O) / sum, with O normalised.
    """
    SCORES_MOVE: tl.constexpr = MOVES_Q or MOVES_K
    RAGGED: tl.constexpr = K_LEN % BLOCK_K > 0
    start = tl.program_id(0) * BLOCK_Q
    k_at, v_at = _of_head(k_at, K_LEN, HEADS, DIM), _of_head(v_at, K_LEN, HEADS, DIM)
    dk_at, dv_at = _of_head(dk_at, K_LEN, HEADS, DIM), _of_head(dv_at, K_LEN, HEADS, DIM)
    q = _load(_of_head(q_at, Q_LEN, HEADS, DIM), start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, True)
    dq = q
    if MOVES_Q:
        dq = _load(_of_head(dq_at, Q_LEN, HEADS, DIM), start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, True)
    o = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    do = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    r = tl.zeros((BLOCK_Q,), tl.float32)
    sink, gap, stop = 0, 0, K_LEN
    if CHUNK > 0:
        sink, gap, stop = visible_keys(start, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK)
    for at in range(0, stop, BLOCK_K):
        key = at
        if WINDOW > 0:
            key = tl.where(at < sink, at, at + gap)
        k = _load(k_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
        s = _product(q, tl.trans(k))
        s = _mask_keys(s, start, key, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK)
        if SCORES_MOVE:
            dk = k
            if MOVES_K:
                dk = _load(dk_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
            ds = _moving_scores(q, k, dq, dk, MOVES_Q, MOVES_K)
        new_top = tl.maximum(top, tl.max(s, 1) * (SCALE * LOG2_E))
        p = tl.exp2(s * (SCALE * LOG2_E) - new_top[:, None]).to(k.dtype)
        shrink = tl.exp2(top - new_top)
        top = new_top
        total = total * shrink + tl.sum(p.to(tl.float32), 1)
        v = _load(v_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
        o = _add_product(o * shrink[:, None], p, v)
        if SCORES_MOVE or MOVES_V:
            do = do * shrink[:, None]
        if MOVES_V:
            dv = _load(dv_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
            do = _add_product(do, p, dv)
        if SCORES_MOVE:
            h = (p * (ds * SCALE)).to(v.dtype)
            r = r * shrink + tl.sum(h.to(tl.float32), 1)
            do = _add_product(do, h, v)
    o = o / total[:, None]
    _store(_of_head(o_at, Q_LEN, HEADS, DIM), o, start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D)
    _store_row(_of_row(lse_at, Q_LEN, HEADS), (top + tl.log2(total)) * LN_2, start, Q_LEN, BLOCK_Q)
    if SCORES_MOVE or MOVES_V:
        do = (do - r[:, None] * o) / total[:, None]
        _store(_of_head(do_at, Q_LEN, HEADS, DIM), do, start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D)


@triton.jit
def tangent(
    q_at,
    k_at,
    v_at,
    o_at,
    lse_at,
    dq_at,
    dk_at,
    dv_at,
    do_at,
    SCALE: tl.constexpr,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOVES_Q: tl.constexpr,
    MOVES_K: tl.constexpr,
    MOVES_V: tl.constexpr,
):
    """Ȯ = P V̇ + H V − rowsum(H)∘O, with P rebuilt from lse."""
    SCORES_MOVE: tl.constexpr = MOVES_Q or MOVES_K
    RAGGED: tl.constexpr = K_LEN % BLOCK_K > 0
    start = tl.program_id(0) * BLOCK_Q
    k_at, v_at = _of_head(k_at, K_LEN, HEADS, DIM), _of_head(v_at, K_LEN, HEADS, DIM)
    dk_at, dv_at = _of_head(dk_at, K_LEN, HEADS, DIM), _of_head(dv_at, K_LEN, HEADS, DIM)
    q = _load(_of_head(q_at, Q_LEN, HEADS, DIM), start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, True)
    dq = q
    if MOVES_Q:
        dq = _load(_of_head(dq_at, Q_LEN, HEADS, DIM), start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, True)
    lse = _load_row(_of_row(lse_at, Q_LEN, HEADS), start, Q_LEN, BLOCK_Q, True) * LOG2_E
    do = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    r = tl.zeros((BLOCK_Q,), tl.float32)
    sink, gap, stop = 0, 0, K_LEN
    if CHUNK > 0:
        sink, gap, stop = visible_keys(start, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK)
    for at in range(0, stop, BLOCK_K):
        key = at
        if WINDOW > 0:
            key = tl.where(at < sink, at, at + gap)
        k = _load(k_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
        s = _product(q, tl.trans(k))
        s = _mask_keys(s, start, key, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK)
        p = tl.exp2(s * (SCALE * LOG2_E) - lse[:, None])
        if SCORES_MOVE:
            dk = k
            if MOVES_K:
                dk = _load(dk_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
            v = _load(v_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
            h = (p * (_moving_scores(q, k, dq, dk, MOVES_Q, MOVES_K) * SCALE)).to(v.dtype)
            do = _add_product(do, h, v)
            r += tl.sum(h.to(tl.float32), 1)
        if MOVES_V:
            dv = _load(dv_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
            do = _add_product(do, p.to(dv.dtype), dv)
    if SCORES_MOVE:
        o = _load(_of_head(o_at, Q_LEN, HEADS, DIM), start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, True)
        do -= r[:, None] * o.to(tl.float32)
    _store(_of_head(do_at, Q_LEN, HEADS, DIM), do, start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D)


@triton.jit
def delta(
    o_at,
    g_at,
    delta_at,
    Q_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rowsum(G∘O)."""
    start = tl.program_id(0) * BLOCK_Q
    o = _load(_of_head(o_at, Q_LEN, HEADS, DIM), start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, True)
    g = _load(_of_head(g_at, Q_LEN, HEADS, DIM), start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, True)
    row = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    _store_row(_of_row(delta_at, Q_LEN, HEADS), row, start, Q_LEN, BLOCK_Q)


@triton.jit
def gradients_of_keys(
    q_at,
    k_at,
    v_at,
    lse_at,
    g_at,
    delta_at,
    dk_at,
    dv_at,
    SCALE: tl.constexpr,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LIVE_K: tl.constexpr,
    LIVE_V: tl.constexpr,
):
    """Of one tile of keys over all queries: dV = Pᵀ G and dK = scale·(P∘(G Vᵀ − delta))ᵀ Q. S is [keys, queries]."""
    RAGGED: tl.constexpr = Q_LEN % BLOCK_Q > 0
    start = tl.program_id(0) * BLOCK_K
    q_at, g_at = _of_head(q_at, Q_LEN, HEADS, DIM), _of_head(g_at, Q_LEN, HEADS, DIM)
    lse_at, delta_at = _of_row(lse_at, Q_LEN, HEADS), _of_row(delta_at, Q_LEN, HEADS)
    k = _load(_of_head(k_at, K_LEN, HEADS, DIM), start, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, True)
    v = k
    if LIVE_K:
        v = _load(_of_head(v_at, K_LEN, HEADS, DIM), start, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, True)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first, stop = 0, Q_LEN
    if CHUNK > 0:
        first, stop = seeing_queries(start, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK)
    for query in range(first, stop, BLOCK_Q):
        q = _load(q_at, query, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, RAGGED)
        lse = _load_row(lse_at, query, Q_LEN, BLOCK_Q, RAGGED) * LOG2_E
        p = tl.exp2(_product(k, tl.trans(q)) * (SCALE * LOG2_E) - lse[None, :])
        p = _mask_queries(p, query, start, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK)
        g = _load(g_at, query, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, RAGGED)
        if LIVE_V:
            dv = _add_product(dv, p.to(g.dtype), g)
        if LIVE_K:
            row = _load_row(delta_at, query, Q_LEN, BLOCK_Q, RAGGED)
            ds = p * (_product(v, tl.trans(g)) - row[None, :])
            dk = _add_product(dk, ds.to(q.dtype), q)
    if LIVE_K:
        _store(_of_head(dk_at, K_LEN, HEADS, DIM), dk * SCALE, start, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D)
    if LIVE_V:
        _store(_of_head(dv_at, K_LEN, HEADS, DIM), dv, start, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D)


@triton.jit
def gradient_of_queries(
    q_at,
    k_at,
    v_at,
    lse_at,
    g_at,
    delta_at,
    dq_at,
    SCALE: tl.constexpr,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of one tile of queries over all keys: dQ = scale·(P∘(G Vᵀ − delta)) K."""
    RAGGED: tl.constexpr = K_LEN % BLOCK_K > 0
    start = tl.program_id(0) * BLOCK_Q
    k_at, v_at = _of_head(k_at, K_LEN, HEADS, DIM), _of_head(v_at, K_LEN, HEADS, DIM)
    q = _load(_of_head(q_at, Q_LEN, HEADS, DIM), start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, True)
    g = _load(_of_head(g_at, Q_LEN, HEADS, DIM), start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D, True)
    lse = _load_row(_of_row(lse_at, Q_LEN, HEADS), start, Q_LEN, BLOCK_Q, True) * LOG2_E
    row = _load_row(_of_row(delta_at, Q_LEN, HEADS), start, Q_LEN, BLOCK_Q, True)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    sink, gap, stop = 0, 0, K_LEN
    if CHUNK > 0:
        sink, gap, stop = visible_keys(start, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK)
    for at in range(0, stop, BLOCK_K):
        key = at
        if WINDOW > 0:
            key = tl.where(at < sink, at, at + gap)
        k = _load(k_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
        v = _load(v_at, key, K_LEN, HEADS, DIM, BLOCK_K, BLOCK_D, RAGGED)
        s = _product(q, tl.trans(k))
        s = _mask_keys(s, start, key, Q_LEN, K_LEN, BLOCK_Q, BLOCK_K, CHUNK, WINDOW, SINK)
        ds = tl.exp2(s * (SCALE * LOG2_E) - lse[:, None]) * (_product(g, tl.trans(v)) - row[:, None])
        dq = _add_product(dq, ds.to(k.dtype), k)
    _store(_of_head(dq_at, Q_LEN, HEADS, DIM), dq * SCALE, start, Q_LEN, HEADS, DIM, BLOCK_Q, BLOCK_D)

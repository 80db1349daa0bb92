"""What the Triton kernels know of a mask: the tiles that a program visits, and the entries of a tile that are hidden.

The arithmetic of `kernels.masks`, inside kernels. CHUNK, WINDOW and SINK are those of BlockCausal; a CHUNK of 0 stands
for no mask, a WINDOW of 0 for all earlier chunks. Tiles are told apart by numbers that all threads share. Which formula
tells entries apart was chosen by the registers that it costs.
"""

# Constants are passed as plain values.
# pyright: reportArgumentType=false
import triton
import triton.language as tl


@triton.jit
def visible_keys(
    query,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINK: tl.constexpr,
):
    """(sink, gap, stop): a tile of queries sees something of those tiles in [0, sink) and [sink + gap, stop + gap)."""
    first = query + (K_LEN - Q_LEN)
    last = tl.minimum(first + BLOCK_Q, K_LEN) - 1
    stop = tl.minimum((last // CHUNK + 1) * CHUNK, K_LEN)
    if WINDOW == 0:
        return 0, 0, stop
    else:
        low = tl.maximum(first // CHUNK + 1 - WINDOW, 0) * CHUNK
        sink = tl.cdiv(tl.minimum(SINK * CHUNK, stop), BLOCK_K) * BLOCK_K
        gap = tl.maximum(low // BLOCK_K * BLOCK_K - sink, 0)
        return sink, gap, stop - gap


@triton.jit
def seeing_queries(
    key,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINK: tl.constexpr,
):
    """(first, stop) of the queries, whole tiles from the first on, that see something of a tile of keys."""
    oldest = key // CHUNK
    first = tl.maximum(oldest * CHUNK - (K_LEN - Q_LEN), 0) // BLOCK_Q * BLOCK_Q
    if WINDOW == 0:
        return first, Q_LEN
    else:
        newest = (tl.minimum(key + BLOCK_K, K_LEN) - 1) // CHUNK
        stop = tl.minimum((newest + WINDOW) * CHUNK - (K_LEN - Q_LEN), Q_LEN)
        return first, tl.where(oldest < SINK, Q_LEN, stop)


@triton.jit
def sees_all(
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
    """Whether all queries of the tile from `query` on see all keys of the tile from `key` on."""
    first = query + (K_LEN - Q_LEN)
    newest = (key + BLOCK_K - 1) // CHUNK
    result = (newest <= first // CHUNK) & (key + BLOCK_K <= K_LEN)
    if WINDOW > 0:
        result = result & ((key // CHUNK > (first + BLOCK_Q - 1) // CHUNK - WINDOW) | (newest < SINK))
    return result


@triton.jit
def seen(
    query,
    key,
    Q_LEN: tl.constexpr,
    K_LEN: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINK: tl.constexpr,
):
    """Whether queries see keys, the two broadcast."""
    position = query + (K_LEN - Q_LEN)
    if WINDOW == 0:
        return key < tl.minimum((position // CHUNK + 1) * CHUNK, K_LEN)
    else:
        chunk, of_query = tl.where(key < K_LEN, key // CHUNK, K_LEN), position // CHUNK
        return (chunk <= of_query) & ((chunk > of_query - WINDOW) | (chunk < SINK))

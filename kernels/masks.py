"""Which keys a query sees: BlockCausal, and what kernels need to visit only the tiles that somebody sees.

Nothing here holds an entry for each pair of a query and a key but `BlockCausal.seen`, the specification. A query sees
an interval of keys besides the first few, and both ends of it only grow with its position; so the first and the last
query of a tile tell what all of them see.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int8


@dataclass(frozen=True)
class BlockCausal:
    """Attention over chunks of tokens: a chunk sees itself and earlier chunks, all of them or those of a window.

    A query in chunk c sees the keys of chunk j where j ≤ c and (window is None or j > c − window or j < sink). The l
    queries are the last of the m keys: query i stands at position m − l + i. So l = m is self-attention, and l < m
    a rollout beside a cache of earlier keys. Every query sees the keys of its own chunk.

    Attributes:
      chunk: tokens in a chunk (those of a few latent frames, say); the last chunk may be shorter.
      window: how many of the latest chunks are seen, the query's own included; None: all.
      sink: how many of the first chunks are seen besides.

    Raises:
      TypeError, ValueError: sizes that are not integers, or too small.
    """

    chunk: int
    window: int | None = None
    sink: int = 0

    def __post_init__(self):
        for name, least in (("chunk", 1), ("window", 1), ("sink", 0)):
            size = getattr(self, name)
            if size is None and name == "window":
                continue
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"BlockCausal takes integers, got {name}={size!r}: a mask is static, never an array")
            if size < least:
                instead = ", or window=None for all chunks" if name == "window" else ""
                raise ValueError(f"BlockCausal takes {name} of at least {least}, got {size}: raise it{instead}")

    @property
    def sink_tokens(self) -> int:
        """How many of the first keys are seen by every query that does not stand before them."""
        return self.sink * self.chunk

    def interval(self, positions, length):
        """(low, high) of queries at `positions` among `length` keys: what they see is [low, high) and the sink's.

        Key j is seen where j < high and (j ≥ low or j < sink_tokens); low is 0 where no key lies between the two.
        positions: integers of Python, numpy or JAX, also inside a kernel; the ends have their shape.
        """
        known = isinstance(positions, (int, np.ndarray, np.integer))
        xp = np if known else jnp
        # Not by //, which asks for signs: inside a TPU kernel those depend on the chip that is there.
        chunks = positions // self.chunk if known else jax.lax.div(positions, jnp.full_like(positions, self.chunk))
        end = (chunks + 1) * self.chunk
        high = xp.minimum(end, length)
        if self.window is None:
            return xp.zeros_like(high), high
        low = end - self.window * self.chunk
        return xp.where(low <= self.sink_tokens, 0, low), high

    def queries_of(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """[low, high) of the positions of those queries that see one of the keys [start, stop), of `length` keys."""
        low = start // self.chunk * self.chunk
        if self.window is None or start < self.sink_tokens:
            return low, length
        return low, min(((stop - 1) // self.chunk + self.window) * self.chunk, length)

    def seen(self, l: int, m: int) -> Bool[np.ndarray, "l m"]:
        """Whether a query sees a key, for each pair of the two: the specification."""
        query, key = np.arange(m - l, m)[:, None] // self.chunk, np.arange(m)[None] // self.chunk
        latest = np.True_ if self.window is None else key > query - self.window
        return (key <= query) & (latest | (key < self.sink))


NOTHING, PARTLY, WHOLLY = range(3)  # how much the queries of a tile see of a tile of keys


def interval(mask: BlockCausal | None, positions, length):
    """`BlockCausal.interval`; without a mask all keys: a scalar 0 and `length`."""
    return (0, length) if mask is None else mask.interval(positions, length)


def hides(
    mask: BlockCausal | None, positions: Int[Array, "*x"], keys: Int[Array, "*x"], length: int
) -> Bool[Array, "*x"]:
    """Whether keys are not seen from positions, the two broadcast; keys behind the last never are."""
    low, high = interval(mask, positions, length)
    hidden = keys >= high
    if mask is not None and mask.window is not None:
        hidden |= (keys < low) & (keys >= mask.sink_tokens)
    return hidden


def tile_table(
    mask: BlockCausal | None, l: int, m: int, queries: int, keys: int, first: int | None = None
) -> Int8[np.ndarray, "query_tiles key_tiles"]:
    """NOTHING, PARTLY or WHOLLY for tiles of so many queries and keys, of l queries that are the last of m keys.

    `first` is the position of the first query where they are not the last.

    A last tile of keys that runs over the end is seen PARTLY at most; queries behind the last do not count. Without a
    mask every query sees all keys, whatever the two lengths.
    """
    starts = np.arange(0, m, keys)
    stops = starts + keys
    start = m - l if first is None else first
    firsts = (start + np.arange(0, l, queries))[:, None]
    lasts = np.minimum(firsts + queries, start + l) - 1
    (low_of_first, high_of_first), (low_of_last, high_of_last) = (interval(mask, x, m) for x in (firsts, lasts))
    sink = 0 if mask is None else mask.sink_tokens
    some = (starts < high_of_last) & ((stops > low_of_first) | (starts < sink))
    all_of_it = (stops <= high_of_first) & ((starts >= low_of_last) | (stops <= sink))
    table = np.where(all_of_it, WHOLLY, np.where(some, PARTLY, NOTHING))
    return np.broadcast_to(table, (len(firsts), len(starts))).astype(np.int8)

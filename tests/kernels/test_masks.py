"""BlockCausal and the tiles it lets kernels skip, against the specification entry by entry."""

import itertools
import re

import jax
import numpy as np
import pytest

from rcm_jax.kernels import masks
from rcm_jax.kernels.masks import BlockCausal

MASKS = [
    BlockCausal(*x) for x in ((8,), (12, 1), (12, 2), (5, 2, 1), (8, 1, 2), (7, 3, 2), (8, None, 1), (64,), (1, 4, 3))
]
LENGTHS = [(48, 48), (37, 37), (20, 48), (1, 33), (13, 45)]
everywhere = pytest.mark.parametrize(("mask", "length"), list(itertools.product(MASKS, LENGTHS)), ids=str)


def test_what_a_chunk_sees():
    """Of 5 chunks of 2 tokens, as one would draw it."""
    rows = {
        BlockCausal(2): ["1", "11", "111", "1111", "11111"],
        BlockCausal(2, window=1): ["1", "01", "001", "0001", "00001"],
        BlockCausal(2, window=2): ["1", "11", "011", "0011", "00011"],
        BlockCausal(2, window=2, sink=1): ["1", "11", "111", "1011", "10011"],
        BlockCausal(2, window=1, sink=2): ["1", "11", "111", "1101", "11001"],
        BlockCausal(2, sink=3): ["1", "11", "111", "1111", "11111"],
    }
    for mask, lines in rows.items():
        drawn = np.array([[int(x) for x in line.ljust(5, "0")] for line in lines], bool)
        np.testing.assert_array_equal(mask.seen(10, 10), np.kron(drawn, np.ones((2, 2), bool)), str(mask))
        np.testing.assert_array_equal(mask.seen(3, 9), mask.seen(9, 9)[6:])


@everywhere
def test_intervals_say_what_is_seen(mask, length):
    l, m = length
    positions, keys = np.arange(m - l, m), np.arange(m)
    low, high = mask.interval(positions, m)
    seen = (keys < high[:, None]) & ((keys >= low[:, None]) | (keys < mask.sink_tokens))
    np.testing.assert_array_equal(seen, mask.seen(l, m))
    np.testing.assert_array_equal(masks.hides(mask, positions[:, None], keys, m), ~seen)
    assert (np.diff(low) >= 0).all() and (np.diff(high) >= 0).all()
    assert mask.interval(m - 1, m) == (low[-1], high[-1])
    traced = jax.jit(lambda x: mask.interval(x, m))(positions.astype(np.int32))
    for x, y in zip(traced, (low, high), strict=True):
        assert x.dtype == "int32"
        np.testing.assert_array_equal(x, y)


@everywhere
def test_the_table_of_tiles(mask, length):
    l, m = length
    for queries, keys in ((8, 16), (16, 8), (12, 12), (64, 64)):
        table = masks.tile_table(mask, l, m, queries, keys)
        seen = np.zeros((-(-l // queries) * queries, -(-m // keys) * keys), bool)
        seen[:l, :m] = mask.seen(l, m)
        assert table.shape == (len(seen) // queries, seen.shape[1] // keys)
        for (i, j), kind in np.ndenumerate(table):
            tile = seen[i * queries : (i + 1) * queries, j * keys : (j + 1) * keys][: l - i * queries]
            assert kind == (masks.WHOLLY if tile.all() else masks.PARTLY if tile.any() else masks.NOTHING)
        for j in range(0, m, keys):
            low, high = mask.queries_of(j, min(j + keys, m), m)
            seers = np.flatnonzero(seen[:l, j : j + keys].any(1)) + m - l
            np.testing.assert_array_equal(seers, np.arange(max(low, m - l), max(high, m - l)))


def test_the_table_without_a_mask():
    np.testing.assert_array_equal(masks.tile_table(None, 9, 20, 8, 8), [[2, 2, 1]] * 2)
    np.testing.assert_array_equal(masks.tile_table(None, 20, 9, 8, 3), [[2, 2, 2]] * 3)


def test_a_table_for_a_long_video_is_small():
    """32,760 tokens, of which an array of pairs would take a GiB."""
    table = masks.tile_table(BlockCausal(1560, window=7, sink=1), 32_760, 32_760, 128, 128)
    assert table.shape == (256, 256)
    assert 0.3 < (table > 0).mean() < 0.4


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"chunk": 0}, ValueError, "chunk of at least 1, got 0: raise it"),
        ({"chunk": 4, "window": 0}, ValueError, "window of at least 1, got 0: raise it, or window=None for all"),
        ({"chunk": 4, "sink": -1}, ValueError, "sink of at least 0, got -1"),
        ({"chunk": 4.0}, TypeError, "integers, got chunk=4.0"),
        ({"chunk": 4, "sink": None}, TypeError, "integers, got sink=None"),
        ({"chunk": 4, "window": True}, TypeError, "integers, got window=True"),
    ],
)
def test_sizes_that_make_no_sense(sizes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        BlockCausal(**sizes)


def test_masks_are_static():
    assert BlockCausal(4, 2) == BlockCausal(4, 2)
    assert len({BlockCausal(4, 2), BlockCausal(4, 2), BlockCausal(4)}) == 2

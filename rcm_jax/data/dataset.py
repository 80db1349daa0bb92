"""What a data set gives the rest, and the stream of training batches whose position is part of the checkpoint."""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

# How samples are shown: images in a grid, a row for each class; points in the plane; latents, which take a decoder.
VIEWS = ("grid", "scatter", "video")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples {"x0": [n, ...] of unit variance, "cond": {name: [n, ...]}}, in memory or read when they are asked for.

    The first are dicts of arrays; the others have len() and give the batch of examples[rows], rows [b] of int. Those of
    several shapes have `buckets` besides: the rows of each shape, first those in whose shape samples are drawn.
    """

    train: Any
    test: Any | None
    uncond: Any  # the conditions that guidance replaces, without the leading axis: null class, negative prompt
    num_classes: int | None  # None: not of classes
    view: str  # how samples are shown; VIEWS
    to_image: Callable | None = None  # of a grid: x0 [n, ...] -> numpy images in [0, 1]
    velocity: Callable | None = None  # F(params, x, t, cond) of the data themselves, where it is known; ignores params

    def __post_init__(self):
        if self.view not in VIEWS or (self.view == "grid") != (self.to_image is not None):
            raise ValueError(
                f"view {self.view!r} must be one of {', '.join(VIEWS)}; a grid, and no other, has to_image"
            )

    @property
    def first(self) -> dict:
        """The first example of that shape in which samples are drawn, as a batch of one."""
        return random_access(self.train)[buckets_of(self.train)[0][:1]]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.first["x0"].shape[1:]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of x0; the first is sample_shape."""
        source = random_access(self.train)
        return [source[rows[:1]]["x0"].shape[1:] for rows in buckets_of(self.train)]


class Examples:
    """Random access to a pytree of arrays [n, ...], as grain wants it."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(jax.tree.leaves(self.arrays)[0])

    def __getitem__(self, i):
        return jax.tree.map(lambda a: a[i], self.arrays)


def random_access(examples):
    """Examples that have len() and take rows, from either kind of a Dataset."""
    return Examples(examples) if isinstance(examples, Mapping) else examples


def buckets_of(examples) -> Sequence[np.ndarray]:
    """The rows of every shape of examples; of one shape, all of them."""
    source = random_access(examples)
    return getattr(source, "buckets", None) or [np.arange(len(source))]


def batches(
    examples, batch_size: int, seed: int, rows: np.ndarray | slice = slice(None), leave_out: Sequence[int] = ()
) -> grain.DatasetIterator:
    """Endless shuffled batches [batch_size, ...]; get_state and set_state of the iterator are its position.

    Each has besides "index" [batch_size], int: where all of its examples stand in the data, those of other processes
    included. rows: those of every batch that are read, the others being for other processes. The position is that of
    them all. leave_out: examples in whose place the next ones stand; the order of the others stays as it is.

    Every epoch is a new permutation, and batches run over epoch borders: no example is dropped. Of examples of several
    shapes each batch has one (`Turns`). In memory are indices and four batches ahead, however many examples there are.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} must be at least 1")
    # One thread is enough to index arrays; a disk is read for four batches at a time. The order is the same.
    threads = 1 if isinstance(examples, Mapping) else 4
    source = random_access(examples)
    buckets: Any = buckets_of(examples)
    instead = replacements(leave_out, buckets)
    orders = [grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(batch_size) for rows in buckets]
    turns: Any = Turns(orders, buckets, batch_size, seed)
    order = orders[0] if len(buckets) == 1 else grain.MapDataset.source(turns)

    def read(batch):  # whole batches are gathered at once: one indexing per array, not one per example
        index = np.array([instead.get(i, i) for i in np.asarray(batch).tolist()])
        return source[index[rows]] | {"index": index}

    return iter(order.map(read).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)))


class Turns:
    """Endless batches of rows, of several buckets by turns: an epoch has those that become full in it, shuffled anew.

    So every bucket has batches as it has examples, none of its examples comes twice before all came once, and no turn
    is bound to a period of the training. Batch i is known from i alone.
    """

    def __init__(self, orders: Sequence, buckets: Sequence[np.ndarray], batch_size: int, seed: int):
        """orders: the endless batches of each bucket, by their places."""
        self.orders, self.seed, self.batch_size = orders, seed, batch_size
        self.sizes = [len(rows) for rows in buckets]
        self.turns = functools.lru_cache(4)(self._turns)

    def __len__(self):
        return 2**62 // max(sum(self.sizes), self.batch_size)  # of no end, for grain

    def full(self, epoch: int) -> list[int]:
        """How many batches of each bucket are full before an epoch."""
        return [epoch * size // self.batch_size for size in self.sizes]

    def _turns(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of every batch of an epoch, and which of that bucket's batches it is."""
        before, after = np.array(self.full(epoch)), np.array(self.full(epoch + 1))
        turns = np.repeat(np.arange(len(before)), after - before)
        turns = np.random.RandomState([self.seed, epoch]).permutation(turns)  # whose stream no numpy will change
        places = np.empty_like(turns)
        for k, first in enumerate(before):
            places[turns == k] = first + np.arange(np.sum(turns == k))
        return turns, places

    def __getitem__(self, i: int):
        most = (i + len(self.sizes)) * self.batch_size // sum(self.sizes) + 2
        epoch = bisect.bisect_right(range(most), i, key=lambda e: sum(self.full(e))) - 1
        turns, places = self.turns(epoch)
        j = i - sum(self.full(epoch))
        return self.orders[int(turns[j])][int(places[j])]


def replacements(leave_out: Sequence[int], buckets: Sequence[np.ndarray]) -> dict[int, int]:
    """{example left out: the next one of its bucket that is not}; ValueError for one that is not there, or if none is
    left."""
    gone, count, instead = set(leave_out), sum(map(len, buckets)), {}
    if strange := sorted(i for i in gone if not 0 <= i < count):
        raise ValueError(f"train.leave_out names example {strange[0]}, but the data have {count}, from 0")
    for rows in buckets if gone else ():
        if not (kept := np.setdiff1d(rows, list(gone))).size:
            raise ValueError(f"train.leave_out names all {len(rows)} examples of the data, or of one shape")
        for i in gone.intersection(rows.tolist()):
            instead[i] = int(kept[np.searchsorted(kept, i) % len(kept)])
    return instead

"""What a source gives the engine: items, known before anything is computed, and what makes examples of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Example = dict[str, np.ndarray]  # "x0" [t, h, w, c] or [h, w, c], and conditions by name


class Item(NamedTuple):
    """One example to be: where it comes from, before it is made. Its index in the list is its place in the set."""

    key: str  # names it in errors and in the set; none twice
    prompt: str
    shape: tuple[int, ...]  # of its x0; the bucket it belongs to
    origin: Mapping[str, Any] = {}  # more of where it is from, as JSON: a seed, a file, a time in it


class Source(NamedTuple):
    """The items of a set, in an order that is the same on every host and at every start, and how they are made.

    prepare(item) -> anything is the work of the host, done ahead in threads: reading, decoding.
    make(items, prepared, texts) -> examples, in the order of the items, is that of the devices; texts [n, l, d] are the
    embeddings of the prompts, None where the source brings its own: then examples have "text". Both raise ValueError
    or OSError, in words that name the file, for what is bad in the input; of one item alone if `batch` is 1.
    """

    items: Sequence[Item]
    settings: Mapping[str, Any]  # as JSON: all that decides what is made of an item; kept with the set
    make: Callable[[Sequence[Item], Sequence[Any], np.ndarray | None], list[Example]]
    prepare: Callable[[Item], Any] = lambda item: None
    batch: int = 1  # items that `make` is given at once, all of one shape
    brings_text: bool = False
    uncond: Mapping[str, np.ndarray] | None = None  # what guidance replaces; None: the embedding of a negative prompt
    bad: Mapping[str, str] = {}  # what is no item because it cannot be one: its name, and why

"""A digest of every array: two sums of 32 bits over all its words, wherever and however it lies.

Each word of an array (an element; half of one of 64 bits) goes through a bijection that its place in the whole array
chooses, and what comes out is added up, modulo 2³². One word that changes changes both sums for certain; of other
damage a share of 2⁻⁶⁴ is missed. Sums do not depend on shardings: devices add up what they hold, and 8 bytes an array
come to the hosts.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rcm_jax.train.state import fetched

CHUNK = 2**16  # words of a numpy array that are in work at a time
PLACE, FIRST, SECOND, THIRD = map(np.uint32, (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F))  # odd: no bit is lost


def of_tree(tree) -> dict[str, str]:
    """{name: digest} of the arrays of a tree, jax's where they lie and numpy's here; their dtypes and shapes included.

    Of arrays over several processes all must call it, and all get the same.
    """
    named = {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    sums = {n: _here(x) if _in_reach(x) else _on_devices(x) for n, x in named.items()}
    return {name: f"{described(leaf)} {sums[name][0]:08x}{sums[name][1]:08x}" for name, leaf in named.items()}


def _in_reach(x) -> bool:
    """Whether numpy reads x where it lies: nothing is compiled then."""
    return not isinstance(x, jax.Array) or (x.is_fully_addressable and next(iter(x.devices())).platform == "cpu")


def name_of(path) -> str:
    """Of a leaf by its path in a tree; the same where a named tuple or a dataclass has become a dict."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def described(leaf) -> str:
    """Dtype and shape, as a digest begins: float32[3,8]."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def parsed(digest: str) -> jax.ShapeDtypeStruct:
    """The dtype and shape of the array that a digest is of."""
    dtype, _, shape = digest.partition(" ")[0].rstrip("]").partition("[")
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, shape.split(",")))), np.dtype(dtype))


def _on_devices(x: jax.Array) -> np.ndarray:
    """[2] uint32. One after another: virtual devices of a CPU may wait for each other for ever in two sums at once."""
    return jax.device_get(_program(x.sharding)(x))


@functools.cache
def _program(sharding) -> Callable:
    """x -> [2] uint32, for arrays that lie so."""
    return jax.jit(
        _digest,
        out_shardings=NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None,
    )


def _digest(x):
    x = fetched(x)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    # Both sums in one pass: two reductions take twenty times as long on CPU.
    zeros = np.zeros(2, np.uint32)
    return jnp.stack(jax.lax.reduce(_lanes(words, place), tuple(zeros), _add_both, tuple(range(words.ndim))))


def _add_both(x, y):
    return x[0] + y[0], x[1] + y[1]


def _here(x) -> np.ndarray:
    """The same of numpy's, with no more memory than a copy of x."""
    x = np.ascontiguousarray(x).reshape(-1)
    words, sums = x.view(f"uint{min(8 * x.dtype.itemsize, 32)}"), np.zeros(2, np.uint32)
    for start in range(0, words.size, CHUNK):
        part = words[start : start + CHUNK].astype(np.uint32)
        place = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        sums += np.stack([np.sum(lane, dtype=np.uint32) for lane in _lanes(part, place)])
    return sums


def _lanes(words, place):
    """Two images of every word, each a bijection of it: of words and places [n] uint32."""
    a = words + place * PLACE
    a = (a ^ (a >> 16)) * FIRST
    a = (a ^ (a >> 13)) * SECOND
    b = (a ^ (a >> 16)) * THIRD
    return a, b ^ (b >> 15)

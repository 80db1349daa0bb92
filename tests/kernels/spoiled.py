"""Implementations of attention that are wrong on purpose."""

import jax
import jax.numpy as jnp

from rcm_jax.kernels.implementations import IMPLEMENTATIONS, PASSES, Implementation

REFERENCE = IMPLEMENTATIONS["reference"]


def off(function):
    """An implementation's function with 0.1 more in its first output."""

    def wrong(*args, **options):
        out = function(*args, **options)
        return (out[0] + 0.1, *out[1:]) if isinstance(out, tuple) else out + 0.1

    return wrong


def not_a_number(function):
    def wrong(*args, **options):
        return jax.tree.map(lambda x: x.at[0, -1].set(jnp.nan), function(*args, **options))

    return wrong


def raising(function):
    def wrong(*args, **options):
        raise RuntimeError("no such\n instruction")

    return wrong


def refusing(function):
    def wrong(*args, **options):
        raise ValueError("not made for this")

    return wrong


def spoiled(wrong, *passes):
    """The reference, with some of its passes made wrong."""
    right = {name: REFERENCE.does(name) for name in PASSES}
    return Implementation(**right | {name: wrong(right[name]) for name in passes})

"""Random keys by name."""

import jax


def named_keys(key, *names) -> dict:
    """One key per name, from one key."""
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))

"""Packages that only some users need."""

import importlib


def require(package: str, extra: str, what: str):
    """The package of an extra; ValueError that says how to install it, and what it is needed for."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{what}: {package} is not installed: pip install 'rcm-jax[{extra}]'") from None

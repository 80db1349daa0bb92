"""Packages that only some users need."""

import importlib
import importlib.util


def installed(package: str) -> bool:
    """Whether a package, or one inside another (a.b), is there to be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it would be inside of is not there
        return False


def require(package: str, extra: str, what: str):
    """The package of an extra; ValueError that says how to install it, and what it is needed for."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{what}: {package} is not installed: pip install 'rcm-jax[{extra}]'") from None

"""Every test sees eight virtual CPU devices, so that sharding is tested without an accelerator."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where each operation comes from is told in errors, and kept for ever: after a thousand programs of one process that is
# what lowering another one waits for.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

from tests import stores

GOLDEN = pathlib.Path(os.environ.get("RCM_GOLDEN", pathlib.Path(__file__).parent / "golden"))


def pytest_collection_modifyitems(items):
    """Whole runs first: the short tests then fill up what one worker has left of the time."""
    items.sort(key=lambda item: "scripts" not in item.path.parts)


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Folder of the reference values (see tests/golden/README.md)."""
    return GOLDEN


s3 = pytest.fixture(scope="session")(stores.s3)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A module's compiled programs go with it: a process that keeps thousands of them becomes slow, and large."""
    yield
    jax.clear_caches()

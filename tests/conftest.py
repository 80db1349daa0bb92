"""Every test sees eight virtual CPU devices, so that sharding is tested without an accelerator."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where each operation comes from is told in errors, and kept for ever: after a thousand programs of one process that is
# what lowering another one waits for.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest

GOLDEN = pathlib.Path(os.environ.get("RCM_GOLDEN", pathlib.Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Folder of the reference values (see tests/golden/README.md)."""
    return GOLDEN

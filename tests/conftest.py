"""Every test sees eight virtual CPU devices, so that sharding is tested without an accelerator."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest

GOLDEN = pathlib.Path(os.environ.get("RCM_GOLDEN", pathlib.Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Folder of the reference values (see tests/golden/README.md)."""
    return GOLDEN

"""Every test sees eight virtual CPU devices, so that sharding is tested without an accelerator."""

import os
import pathlib
import re

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


# Variants of what other tests show every day, that take long together: slow.
VARIANTS = re.compile(
    r"method/test_golden_.*float32"  # float64 judges the formulas, and every kernel's rounding has its own tests
    r"|models/test_(edm|edm2_unet|wan|wan_ti2v|cosmos)\.py.*of_the_reference.*float32"
    r"|models/test_wan\.py.*test_remat_.*(full|save_)|models/test_dit\.py.*test_remat_.*'full'"
    r"|kernels/test_attention\.py.*test_what_all_values_share.*64"
    r"|kernels/test_triton\.py.*test_numbers_in_the_interpreter"
    r"|train/test_steps\.py.*test_a_step_in_parts_needs.*(student|probe)"
    r"|train/test_trainer\.py.*test_twenty_steps.*diffusion"
    r"|train/test_checkpoint_damage\.py.*test_a_new_checkpoint_that_is_damaged.*True"
    r"|run/test_pipeline\.py.*test_a_stopped_run.*(scm_adaptive|sct)"
    r"|run/test_image_to_video\.py.*test_a_network_is_given.*cosmos_v2w"
    r"|configs/test_scm_paper\.py.*test_each_trains_in_small.*cifar10-sct"
    r"|scripts/test_compare\.py.*test_methods_are_compared|scripts/test_precision\.py.*test_picture"
    r"|scripts/test_build_dataset\.py.*test_the_same_command"
    r"|scripts/test_class_latents\.py.*test_folders|fuzz/test_readers\.py.*\[safetensors\]"
    r"|evaluate/test_precision\.py.*test_cosmos_is_studied"
)
LONG = ("scripts", "train", "run", "configs", "parallel")  # folders whose files take a worker minutes


def pytest_collection_modifyitems(items):
    """Long files first: the short ones then fill up what one worker has left of the time."""
    for item in items:
        if VARIANTS.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in item.path.parts), len(LONG)))


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

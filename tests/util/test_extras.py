"""Packages that only some users need."""

import pytest

from rcm_jax.util.extras import installed, require


@pytest.mark.parametrize(
    "package, there",
    [("numpy", True), ("numpy.linalg", True), ("numpy.no_such", False), ("no_such", False), ("no_such.within", False)],
)
def test_what_is_installed(package, there):
    assert installed(package) == there


def test_what_is_missing_is_said_with_the_way_to_it():
    with pytest.raises(ValueError, match=r"to dance: no_such is not installed: pip install 'rcm-jax\[ball\]'"):
        require("no_such", "ball", "to dance")

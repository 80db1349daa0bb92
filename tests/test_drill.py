"""A run survives what make drill does to it."""

import pytest

from tests import drill


@pytest.mark.slow
def test_every_exercise_is_survived():
    assert drill.main(kills="5") == 0

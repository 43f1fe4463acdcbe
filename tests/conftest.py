"""What holds for every test."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Lightning leaves the address of a run's processes in the environment, where a later run would take it for its."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)

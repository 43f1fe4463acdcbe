"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
import torch

from tests.tiny import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the tests from reading and writing the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that need a GPU if there is none, and Triton's interpreter (tests/kernels) does not replace it."""
    for item in items:
        replaced = "device" in getattr(item, "fixturenames", ()) and os.environ.get("TRITON_INTERPRET") == "1"
        if item.get_closest_marker("cuda") and not (torch.cuda.is_available() or replaced):
            item.add_marker(pytest.mark.skip("needs a GPU"))


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """Restores environment variables, in which Lightning leaves the addresses of a run's processes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The argument of sample.py that selects a tiny random model."""
    return f"model={save_tiny_model(tmp_path_factory.mktemp('model'))}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "images"

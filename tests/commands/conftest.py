from pathlib import Path

import pytest

from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model={save_tiny_model(tmp_path_factory.mktemp('model'))}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pictures"

import shutil
from pathlib import Path

import pytest

from ldm.weights.convert import write
from tests.weights.foreign import ODD, full_model


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "m"
    write(full_model(ODD), folder, "diffusers")
    return folder


@pytest.fixture
def folder(tmp_path: Path, written: Path) -> Path:
    """A diffusers folder of tiny networks, which a test may change."""
    return Path(shutil.copytree(written, tmp_path / "m"))

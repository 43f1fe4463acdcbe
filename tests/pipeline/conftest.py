import pytest

from ldm.pipeline.pipeline import Pipeline
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(str(save_tiny_model(tmp_path_factory.mktemp("model"))), device="cpu")

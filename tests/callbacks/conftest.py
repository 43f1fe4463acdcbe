import pytest

from tests.callbacks.painted import Painter


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> type[Painter]:
    """Replaces the pipeline that callbacks sample with."""
    fresh = type("Fresh", (Painter,), {"calls": []})
    monkeypatch.setattr("ldm.callbacks.images.sampling.Pipeline", fresh)
    return fresh

from pathlib import Path

import pytest

from ldm.app.models import default_settings, find_models
from ldm.weights.recognise import DEFAULT
from tests.tiny import SAMPLING, save_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with two runs, beside which there is another model."""
    for name in ("models/first", "models/deeper/second", "outside"):
        (tmp_path / name).mkdir(parents=True)
        save_tiny_model(tmp_path / name)
    return tmp_path / "models"


def test_without_a_folder_only_the_built_in_model_is_offered():
    assert find_models(None) == ({DEFAULT: DEFAULT}, [])


def test_models_are_found_at_any_depth_and_named_by_path(folder: Path):
    (folder / "first" / "unet.safetensors").rename(folder / "alone.safetensors")
    models, _ = find_models(str(folder))
    assert models == {
        DEFAULT: DEFAULT,
        "alone.safetensors": str(folder / "alone.safetensors"),
        "deeper/second": str(folder / "deeper" / "second"),
    }


def test_incomplete_models_are_skipped_with_a_reason(folder: Path):
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    save_tiny_model(folder)  # whose text encoder and first stage are not models
    models, skipped = find_models(str(folder))
    assert sorted(models) == ["deeper/second", "first", DEFAULT, "unet.safetensors"]
    assert len(skipped) == 3
    assert all(any(name in reason for reason in skipped) for name in ("broken", "vae", "text_tower"))


@pytest.mark.parametrize("target", ["outside", "outside/unet.safetensors"])
def test_a_link_outside_the_folder_is_refused(folder: Path, target: str):
    (folder / "link.safetensors").symlink_to(folder.parent / target)
    models, skipped = find_models(str(folder))
    assert sorted(models) == ["deeper/second", "first", DEFAULT]
    assert len(skipped) == 1 and "links outside" in skipped[0]


def test_a_link_to_a_parent_folder_is_not_followed(folder: Path):
    (folder / "deeper" / "circle").symlink_to(folder)
    assert sorted(find_models(str(folder))[0]) == ["deeper/second", "first", DEFAULT]


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        find_models(str(tmp_path / "nowhere"))


def test_default_settings_are_read_from_the_model(folder: Path):
    settings = default_settings(str(folder / "first"))
    assert settings.size == (16, 16) and settings.steps == SAMPLING["steps"] and settings.sampler == SAMPLING["sampler"]

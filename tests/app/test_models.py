import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.app.models import default_settings, find_models
from ldm.weights.native import read_about
from ldm.weights.recognise import DEFAULT
from tests.tiny import SAMPLING, save_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with two runs, and another model beside the folder."""
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
    save_tiny_model(folder)  # its text encoder and first stage are not models
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
    own = default_settings(str(folder / "first"))
    assert own.size == (16, 16) and own.steps == SAMPLING["steps"] and own.sampler == SAMPLING["sampler"]


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"steps": 2, "not_a_setting": 1}},
        {"sampling": {"steps": "many"}},
        {"size": [16]},
        {"size": ["a", "b"]},
        {"size": [10**9, 10**9]},
    ],
)
def test_a_model_with_invalid_settings_is_skipped_and_named(folder: Path, changes: dict[str, Any]):
    file = folder / "first" / "unet.safetensors"
    about = read_about(file)
    with safe_open(file, "pt") as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    save_file(state, file, {"ldm": json.dumps(about | {"model": about["model"] | changes})})
    models, refusals = find_models(str(folder))
    assert sorted(models) == ["deeper/second", DEFAULT] and any("first" in refusal for refusal in refusals)

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.app.models import offered, settings_of
from ldm.weights.native import read_about
from ldm.weights.recognise import DEFAULT
from tests.tiny import SAMPLING, save_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs, the parts that they share, and a model outside."""
    for name in ("models/first", "models/deeper/second", "outside"):
        (tmp_path / name).mkdir(parents=True)
        save_tiny_model(tmp_path / name)
    return tmp_path / "models"


def test_without_a_folder_the_model_that_ships_is_offered():
    assert offered(None) == ({DEFAULT: DEFAULT}, [])


def test_runs_and_files_are_found_at_any_depth_and_named_by_their_place(folder: Path):
    (folder / "first" / "unet.safetensors").rename(folder / "alone.safetensors")
    models, _ = offered(str(folder))
    assert models == {
        DEFAULT: DEFAULT,
        "alone.safetensors": str(folder / "alone.safetensors"),
        "deeper/second": str(folder / "deeper" / "second"),
    }


def test_what_is_no_whole_model_is_left_out_and_said(folder: Path):
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    save_tiny_model(folder)  # so that parts lie beside it
    models, refusals = offered(str(folder))
    assert sorted(models) == ["deeper/second", "first", DEFAULT, "unet.safetensors"]
    assert len(refusals) == 3
    assert all(any(name in one for one in refusals) for name in ("broken", "vae", "text_tower"))


@pytest.mark.parametrize("target", ["outside", "outside/unet.safetensors"])
def test_a_link_that_leads_out_is_refused(folder: Path, target: str):
    (folder / "link.safetensors").symlink_to(folder.parent / target)
    models, refusals = offered(str(folder))
    assert sorted(models) == ["deeper/second", "first", DEFAULT]
    assert len(refusals) == 1 and "leads out of" in refusals[0]


def test_a_link_to_its_own_folder_is_not_followed_round_in_a_circle(folder: Path):
    (folder / "deeper" / "circle").symlink_to(folder)
    assert sorted(offered(str(folder))[0]) == ["deeper/second", "first", DEFAULT]


def test_a_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        offered(str(tmp_path / "nowhere"))


def test_a_models_own_settings_are_read_without_it(folder: Path):
    own = settings_of(str(folder / "first"))
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
def test_a_model_whose_settings_are_nonsense_is_left_out_and_named(folder: Path, changes: dict[str, Any]):
    file = folder / "first" / "unet.safetensors"
    about = read_about(file)
    with safe_open(file, "pt") as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    save_file(state, file, {"ldm": json.dumps(about | {"model": about["model"] | changes})})
    models, refusals = offered(str(folder))
    assert sorted(models) == ["deeper/second", DEFAULT] and any("first" in refusal for refusal in refusals)

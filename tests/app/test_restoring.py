from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.app.adapters import AdapterFiles
from ldm.app.restoring import restore
from ldm.commands.sample import command as sample
from ldm.image import read_metadata, save_png
from tests.tiny import save_tiny_model

NONE = AdapterFiles(None, Path("dropped"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an image written by sample.py with every kind of setting."""
    folder = tmp_path_factory.mktemp("sampled")
    for name in ("init", "mask"):
        Image.new("RGB", (16, 8), "white").save(folder / f"{name}.png")
    argv = ["a red circle", "negative=blue", "seed=9007199254740993", "steps=4", "sampler=ddim", "spacing=karras"]
    argv += ["sampler_options=eta=0.5", "guidance=3", "size=8x16", "strength=0.5", "clip_skip=0", "device=cpu"]
    argv += [f"init={folder / 'init.png'}", f"mask={folder / 'mask.png'}", f"model={save_tiny_model(folder)}"]
    assert sample.main([*argv, f"out={folder / 'out'}"]) == 0
    return folder / "out" / "0000.png"


def altered(sampled: Path, to: Path, **changes: Any) -> Path:
    with Image.open(sampled) as image:
        save_png(image, to, read_metadata(sampled) | changes)
    return to


def test_controls_are_restored_and_other_settings_kept(sampled: Path):
    folder = sampled.parents[1]
    found = restore(sampled, {"tiny": str(folder / "unet.safetensors")}, folder, NONE)
    assert found.controls == {
        "prompt": "a red circle",
        "negative": "blue",
        "seed": 9007199254740993,
        "steps": 4,
        "sampler": "ddim",
        "spacing": "karras",
        "prompt_syntax": "plain",
        "guidance": 3.0,
        "height": 8,
        "width": 16,
        "strength": 0.5,
        "count": 1,
        "model": "tiny",
        "loras": [],
        "embeddings": [],
    }
    assert found.call["sampler_options"] == {"eta": 0.5} and found.warnings == []
    assert found.sources["init"].size == found.sources["mask"].size == (16, 8)


def test_a_missing_model_causes_a_warning(sampled: Path):
    found = restore(sampled, {"other": "elsewhere"}, sampled.parents[1], NONE)
    assert "model" not in found.controls and "not among the models" in found.warnings[0]


def test_sources_outside_the_folder_are_never_opened(sampled: Path, tmp_path: Path):
    found = restore(sampled, {}, tmp_path, NONE)
    assert not found.sources and sum("is outside" in warning for warning in found.warnings) == 2


@pytest.mark.parametrize("init", [7, {}, {"path": 3, "sha256": ""}, {"path": "gone.png", "sha256": "0"}])
def test_an_invalid_source_causes_a_warning(sampled: Path, tmp_path: Path, init: Any):
    png = altered(sampled, tmp_path / "altered.png", init=init)
    found = restore(png, {}, Path.cwd(), NONE)
    assert "init" not in found.sources and any("init" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": 7},
        {"seed": "7"},
        {"steps": None},
        {"sampler": "__import__"},
        {"spacing": ["karras"]},
        {"size": [64]},
        {"size": "64"},
        {"guidance": "2"},
    ],
)
def test_settings_of_the_wrong_type_are_refused(sampled: Path, tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(ValueError, match="lacks settings"):
        restore(altered(sampled, tmp_path / "altered.png", **changes), {}, tmp_path, NONE)


def test_an_image_of_another_program_is_refused(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="holds no settings"):
        restore(tmp_path / "other.png", {}, tmp_path, NONE)

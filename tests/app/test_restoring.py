from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.app.restoring import restored
from ldm.commands.sample import command as sample
from ldm.image import read_metadata, save_png
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of sample.py, with every kind of setting."""
    folder = tmp_path_factory.mktemp("drawn")
    for name in ("init", "mask"):
        Image.new("RGB", (16, 8), "white").save(folder / f"{name}.png")
    argv = ["a red circle", "negative=blue", "seed=9007199254740993", "steps=4", "sampler=ddim", "spacing=karras"]
    argv += ["sampler_options=eta=0.5", "guidance=3", "size=8x16", "strength=0.5", "clip_skip=0", "device=cpu"]
    argv += [f"init={folder / 'init.png'}", f"mask={folder / 'mask.png'}", f"model={save_tiny_model(folder)}"]
    assert sample.main([*argv, f"out={folder / 'out'}"]) == 0
    return folder / "out" / "0000.png"


def altered(drawn: Path, to: Path, **changes: Any) -> Path:
    with Image.open(drawn) as image:
        save_png(image, to, read_metadata(drawn) | changes)
    return to


def test_everything_that_has_a_control_comes_back_and_the_rest_is_kept(drawn: Path):
    top = drawn.parents[1]
    found = restored(drawn, {"tiny": str(top / "unet.safetensors")}, top)
    assert found.controls == {
        "prompt": "a red circle",
        "negative": "blue",
        "seed": 9007199254740993,
        "steps": 4,
        "sampler": "ddim",
        "spacing": "karras",
        "guidance": 3.0,
        "height": 8,
        "width": 16,
        "strength": 0.5,
        "count": 1,
        "model": "tiny",
    }
    assert found.call["sampler_options"] == {"eta": 0.5} and found.remarks == []
    assert found.sources["init"].size == found.sources["mask"].size == (16, 8)


def test_what_is_not_here_is_said(drawn: Path):
    found = restored(drawn, {"other": "elsewhere"}, drawn.parents[1])
    assert "model" not in found.controls and "none of the models" in found.remarks[0]


def test_a_picture_outside_of_the_folder_is_never_opened(drawn: Path, tmp_path: Path):
    found = restored(drawn, {}, tmp_path)
    assert not found.sources and sum("lies outside" in remark for remark in found.remarks) == 2


@pytest.mark.parametrize("init", [7, {}, {"path": 3, "sha256": ""}, {"path": "gone.png", "sha256": "0"}])
def test_a_source_that_is_none_is_said(drawn: Path, tmp_path: Path, init: Any):
    png = altered(drawn, tmp_path / "altered.png", init=init)
    found = restored(png, {}, Path.cwd())
    assert "init" not in found.sources and any("init" in remark for remark in found.remarks)


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
def test_a_record_of_the_wrong_kind_is_refused(drawn: Path, tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(ValueError, match="does not hold all settings"):
        restored(altered(drawn, tmp_path / "altered.png", **changes), {}, tmp_path)


def test_a_picture_of_another_program_is_refused(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="holds no settings"):
        restored(tmp_path / "other.png", {}, tmp_path)

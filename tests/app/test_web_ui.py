from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from ldm.app.adapters import AdapterFiles
from ldm.app.restoring import restore
from ldm.app.web_ui import parse, read_parameters
from ldm.image import save_png

TEXT = """a (red:1.2) circle, <lora:ink:0.8>
on white
Negative prompt: blurry, low quality
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 4021, Size: 512x768, Model hash: 6ce0161, \
Model: v1-5-pruned, Denoising strength: 0.4, Clip skip: 2, Lora hashes: "ink: 1f, b: 2", Version: v1.9.4"""


def png(path: Path, text: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def test_settings_of_the_web_ui_become_those_of_the_page() -> None:
    controls, call, warnings = parse(TEXT)
    assert controls == {
        **{"prompt": "a (red:1.2) circle, <lora:ink:0.8>\non white", "negative": "blurry, low quality", "steps": 28},
        **{"sampler": "dpmpp_2m", "spacing": "karras", "guidance": 6.5, "seed": 4021, "width": 512, "height": 768},
        **{"strength": 0.4, "prompt_syntax": "a1111", "count": 1},
    }
    assert call["clip_skip"] == 1 and any("v1-5-pruned" in warning for warning in warnings)


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "DPM++ 2M"])
def test_older_versions_name_the_schedule_in_the_sampler(name: str) -> None:
    controls, _, _ = parse(f"a cat\nSteps: 20, Sampler: {name}, CFG scale: 7, Seed: 1, Size: 64x64")
    assert (controls["sampler"], controls.get("spacing")) == ("dpmpp_2m", "karras" if "Karras" in name else None)
    assert controls["negative"] == ""


def test_an_unknown_sampler_is_reported_and_everything_else_restored() -> None:
    controls, call, warnings = parse("a cat\nSteps: 20, Sampler: Restart, CFG scale: 7, Seed: 1, Size: 64x64")
    assert "sampler" not in controls and call == {} and controls["steps"] == 20
    assert any("'Restart' has no counterpart" in warning for warning in warnings)


@pytest.mark.parametrize("text", ["", "a cat", "Steps", "a cat\nNegative prompt: Steps"])
def test_text_without_settings_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="holds no settings"):
        parse(text)


def test_huge_and_malformed_numbers_are_not_taken() -> None:
    controls, _, _ = parse(f"x\nSteps: {'9' * 400}, Seed: -3, Size: 1e9x2, CFG scale: nan, Sampler: Euler a")
    assert not {"steps", "seed", "width", "guidance"} & controls.keys() and controls["sampler"] == "euler_a"


def test_a_png_of_the_web_ui_is_restored_and_one_of_ldm_is_not_taken_for_it(tmp_path: Path) -> None:
    found = restore(png(tmp_path / "a.png", TEXT), {"m": "m"}, tmp_path, AdapterFiles(None, tmp_path / "dropped"))
    assert found.controls["seed"] == 4021 and "model" not in found.controls and found.controls["embeddings"] == []
    save_png(Image.new("RGB", (8, 8)), tmp_path / "b.png", {"seed": 1})
    assert read_parameters(tmp_path / "b.png") is None
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read as a PNG"):
        read_parameters(tmp_path / "c.png")

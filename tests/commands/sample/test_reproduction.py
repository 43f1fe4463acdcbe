"""Tests of `from=IMAGE.png`."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.commands.sample import command as sample
from ldm.drawing.recorded import LEGACY_SETTINGS
from ldm.image import read_metadata, save_png, to_pil
from tests.commands.sample.running import error


def test_an_image_and_its_reproduction_are_reproduced_bit_for_bit(model: str, out: Path, tmp_path: Path) -> None:
    prompts = ["a red circle", 'commas, "quotes", it\'s [x=1]', "blue"]
    assert sample.main([*prompts, "sampler=ddpm", "steps=2", "seed=9", "device=cpu", model, f"out={out}"]) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    assert sample.main([f"from={out / '0001.png'}", f"out={first}"]) == 0
    assert sample.main([f"from={first / '0000.png'}", f"out={second}"]) == 0
    assert sorted(file.name for file in first.iterdir()) == ["0000.png", "grid.png"]
    for folder in (first, second):
        assert (folder / "0000.png").read_bytes() == (out / "0001.png").read_bytes()


def test_an_inpainted_image_records_its_sources_and_is_reproduced(model: str, out: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    init, mask = to_pil(torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8))
    init.save(tmp_path / "init.png")
    mask.save(tmp_path / "mask.png")
    sources = [f"init={tmp_path / 'init.png'}", f"mask={tmp_path / 'mask.png'}", "strength=0.5"]
    guided = [
        "guidance_interval=0.3,",
        "guidance_rescale=0.5",
        "fixed_steps=true",
        f"weak={tmp_path / 'weak.safetensors'}",
    ]
    guided += ["thresholding=dynamic", "thresholding_options=share=0.9,limit=2"]
    (tmp_path / "weak.safetensors").symlink_to(Path(model.removeprefix("model=")))
    assert sample.main(["red", "blue", "steps=4", "device=cpu", model, *sources, *guided, f"out={out}"]) == 0
    recorded = read_metadata(out / "0001.png")
    assert recorded["strength"] == 0.5 and recorded["init"]["path"] == str(tmp_path / "init.png")
    assert recorded["guidance_interval"] == [0.3, None] and recorded["guidance_rescale"] == 0.5
    assert sample.main([f"from={out / '0001.png'}", f"out={tmp_path / 'reproduced'}"]) == 0
    assert (tmp_path / "reproduced" / "0000.png").read_bytes() == (out / "0001.png").read_bytes()


def test_an_image_of_an_earlier_version_is_reproduced(model: str, out: Path, tmp_path: Path) -> None:
    assert sample.main(["red", "steps=2", "device=cpu", model, f"out={out}"]) == 0
    old = {name: value for name, value in read_metadata(out / "0000.png").items() if name not in LEGACY_SETTINGS}
    save_png(Image.open(out / "0000.png"), tmp_path / "old.png", old)
    assert sample.main([f"from={tmp_path / 'old.png'}", f"out={tmp_path / 'reproduced'}"]) == 0
    assert (tmp_path / "reproduced" / "0000.png").read_bytes() == (out / "0000.png").read_bytes()


def test_keys_and_a_prompt_override_recorded_settings(model: str, out: Path, tmp_path: Path) -> None:
    assert sample.main(["red", "blue", "steps=2", "seed=9", model, f"out={out}"]) == 0
    folder = tmp_path / "reproduced"
    assert sample.main([f"from={out / '0001.png'}", "white", "seed=3", "guidance=1", f"out={folder}"]) == 0
    recorded = read_metadata(folder / "0000.png")
    assert (recorded["prompt"], recorded["seed"], recorded["guidance"], recorded["steps"]) == ("white", 3, 1.0, 2)
    assert recorded["batch"] == {"prompts": ["red", "white"], "seeds": [9, 3], "position": 1}


def test_an_image_of_a_changed_model_is_refused_unless_a_model_is_given(
    model: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(["red", "steps=1", model, f"out={out}"]) == 0
    changed = tmp_path / "changed.png"
    save_png(Image.open(out / "0000.png"), changed, read_metadata(out / "0000.png") | {"fingerprint": "0" * 64})
    message = error(capsys, 1, f"from={changed}", f"out={tmp_path / 'reproduced'}")
    assert "has changed since it generated this image" in message
    assert sample.main([f"from={changed}", model, f"out={tmp_path / 'reproduced'}"]) == 0


@pytest.mark.parametrize(
    "metadata",
    [{"grid": 2}, {"batch": {"prompts": ["a"], "seeds": [0], "position": 3}}, {"batch": {"position": None}}],
)
def test_an_image_without_all_settings_is_refused(
    metadata: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_png(Image.new("RGB", (4, 4)), tmp_path / "x.png", metadata)
    assert "lacks settings of sample.py" in error(capsys, 1, f"from={tmp_path / 'x.png'}")


EDITS: list[dict[str, object]] = [
    {"threads": 1_000_000},
    {"threads": "2"},
    {"threads": True},
    {"seed": 1.5},
    {"steps": "2"},
    {"steps": None},
    {"size": [16]},
    {"size": [96_000, 96_000]},
    {"size": "16x16"},
    {"sampler": 7},
    {"sampler_options": [1]},
    {"guidance": "high"},
    {"guidance_interval": 3},
    {"guidance_rescale": [0]},
    {"chunks": 10**9},
    {"clip_skip": 0.5},
    {"strength": "half"},
    {"negative": None},
    {"model": 5},
    {"weak": "model"},
    {"init": {"path": 1, "sha256": ""}},
    {"device": 1},
    {"precision": "64"},
    {"batch": [1]},
    {"batch": {"prompts": ["a"], "seeds": [0, 1], "position": 0}},
    {"batch": {"prompts": [1], "seeds": [0], "position": 0}},
    {"batch": {"prompts": ["a"], "seeds": [-1], "position": 0}},
    {"batch": {"prompts": ["a"], "seeds": [0], "position": -1}},
    {"batch": {"prompts": ["a"], "seeds": [0], "position": 0, "guidance": ["x"]}},
]


def test_an_image_with_edited_invalid_settings_is_refused(
    model: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(["red", "steps=1", model, f"out={out}"]) == 0
    complete = read_metadata(out / "0000.png")
    for edit in EDITS:
        save_png(Image.new("RGB", (4, 4)), tmp_path / "edited.png", complete | edit)
        message = error(capsys, 1, f"from={tmp_path / 'edited.png'}", f"out={tmp_path / 'again'}")
        assert "has invalid settings of sample.py" in message and next(iter(edit)) in message, (edit, message)

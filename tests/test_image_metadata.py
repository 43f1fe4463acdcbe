import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm.image import load_image, read_metadata, save_png

IMAGE = Image.effect_noise((8, 6), 50).convert("RGB")


def test_metadata_and_pixels_are_restored_from_a_png(tmp_path: Path) -> None:
    metadata = {"prompt": "un café 🍵\n\x00", "seed": 2**63, "steps": [1, None, 0.1]}
    save_png(IMAGE, tmp_path / "a.png", metadata)
    assert read_metadata(tmp_path / "a.png") == metadata
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(IMAGE))


def test_metadata_is_stored_in_the_text_chunk_ldm(tmp_path: Path) -> None:
    save_png(IMAGE, tmp_path / "a.png", {"seed": 1})
    with Image.open(tmp_path / "a.png") as image:
        assert isinstance(image, PngImagePlugin.PngImageFile) and json.loads(image.text["ldm"]) == {"seed": 1}


@pytest.mark.parametrize("text", [None, "[1]", "{not json"])
def test_a_png_without_settings_is_refused_with_its_path(text: str | None, tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    if text:
        chunks.add_text("ldm", text)
    IMAGE.save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.png "):
        read_metadata(tmp_path / "a.png")


def test_a_file_other_than_a_png_is_refused_with_its_path(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.jpg "):
        read_metadata(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / "b.png")

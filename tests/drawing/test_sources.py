from pathlib import Path

import pytest
from PIL import Image

from ldm.drawing.sources import sources_of
from ldm.errors import UsageError


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 2), (9, 99, 199)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_sources_are_restored_from_their_records(image_file: Path) -> None:
    first = sources_of({"init": str(image_file), "mask": str(image_file)}, {})
    restored = sources_of({}, {name: source.record for name, source in first.items()})
    assert restored["init"].image.getpixel((0, 0)) == (9, 99, 199)
    assert {name: source.record for name, source in restored.items()} == {n: s.record for n, s in first.items()}


def test_a_missing_or_changed_source_is_refused_unless_replaced(image_file: Path, tmp_path: Path) -> None:
    recorded = {"init": sources_of({"init": str(image_file)}, {})["init"].record}
    Image.new("RGB", (4, 2)).save(image_file)
    with pytest.raises(ValueError, match=r"cat.png, the init of this image, has changed since: .* init="):
        sources_of({}, recorded)
    image_file.rename(tmp_path / "dog.png")
    with pytest.raises(FileNotFoundError, match=r"cat.png, the init of this image, does not exist: .* init="):
        sources_of({}, recorded)
    assert sources_of({"init": str(tmp_path / "dog.png")}, recorded)["init"].path.endswith("dog.png")


def test_transparent_pixels_of_a_mask_are_not_repainted(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 255, 255, 0)).save(tmp_path / "x.png")
    path = str(tmp_path / "x.png")
    assert sources_of({"init": path, "mask": path}, {})["mask"].image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("given", [{"mask": "x.png"}, {"strength": 0.5}])
def test_a_mask_or_strength_without_init_is_refused(given: dict[str, object], tmp_path: Path) -> None:
    if "mask" in given:
        Image.new("L", (2, 2)).save(tmp_path / "x.png")
        given = {"mask": str(tmp_path / "x.png")}
    with pytest.raises(UsageError, match="needs a source image: give init="):
        sources_of(given, {})


def test_a_file_that_is_not_an_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image"):
        sources_of({"init": str(tmp_path / "x.png")}, {})

from pathlib import Path

import pytest
from PIL import Image

from ldm.drawing.sources import sources_of
from ldm.errors import UsageError


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 2), (9, 99, 199)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_sources_are_read_again_from_what_they_record(picture: Path) -> None:
    first = sources_of({"init": str(picture), "mask": str(picture)}, {})
    again = sources_of({}, {name: source.record for name, source in first.items()})
    assert again["init"].image.getpixel((0, 0)) == (9, 99, 199)
    assert {name: source.record for name, source in again.items()} == {n: s.record for n, s in first.items()}


def test_a_source_that_is_gone_or_changed_is_refused_but_another_may_be_given(picture: Path, tmp_path: Path) -> None:
    recorded = {"init": sources_of({"init": str(picture)}, {})["init"].record}
    Image.new("RGB", (4, 2)).save(picture)
    with pytest.raises(ValueError, match=r"cat.png, the init of this picture, is no longer what it was: .* init="):
        sources_of({}, recorded)
    picture.rename(tmp_path / "dog.png")
    with pytest.raises(FileNotFoundError, match=r"cat.png, the init of this picture, is not there: .* init="):
        sources_of({}, recorded)
    assert sources_of({"init": str(tmp_path / "dog.png")}, recorded)["init"].path.endswith("dog.png")


def test_what_is_transparent_in_a_mask_is_kept(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 255, 255, 0)).save(tmp_path / "x.png")
    path = str(tmp_path / "x.png")
    assert sources_of({"init": path, "mask": path}, {})["mask"].image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("given", [{"mask": "x.png"}, {"strength": 0.5}])
def test_a_mask_or_strength_without_init_is_refused(given: dict[str, object], tmp_path: Path) -> None:
    if "mask" in given:
        Image.new("L", (2, 2)).save(tmp_path / "x.png")
        given = {"mask": str(tmp_path / "x.png")}
    with pytest.raises(UsageError, match="needs a picture to start from: give init="):
        sources_of(given, {})


def test_a_file_that_is_no_picture_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image"):
        sources_of({"init": str(tmp_path / "x.png")}, {})

from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.commands.info.command import describe
from tests.data.tars import image_file, sample, samples, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tar(tmp_path / "a.tar", samples(3))
    extra = {"x.png": image_file(), "y.txt": b"no image", "z.jpg": image_file(), "z.json": b'{"caption": "z"}'}
    write_tar(tmp_path / "b.tar", {**sample("w"), **extra})
    return tmp_path


def test_the_images_and_captions_of_shards_are_counted(folder: Path) -> None:
    lines = describe(str(folder))
    assert lines["shards"].endswith("in 2 files)") and lines["samples"] == "7"
    assert (lines["images"], lines["captions"]) == ("6", "6, 5 in .txt and 1 in .json")
    assert (lines["images without a caption"], lines["captions without an image"]) == ("1", "1")


@pytest.mark.parametrize(("pattern", "count"), [("a.tar", "3"), ("*.tar", "7")])
def test_one_tar_and_a_pattern_of_tars_are_described(folder: Path, pattern: str, count: str) -> None:
    lines = describe(f"{folder}/{pattern}")
    assert lines["samples"] == count and lines["problems"].startswith("none at a glance")


def test_a_truncated_tar_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = folder / "a.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    assert main(["info", str(folder)]) == 0
    assert f"{tar} is truncated or corrupt" in capsys.readouterr().out

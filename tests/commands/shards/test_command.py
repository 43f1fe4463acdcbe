import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import webdataset
from pyarrow import parquet

from ldm.__main__ import main
from ldm.data.sources.folder import Folder
from ldm.data.sources.shards import Shards
from tests.data.tars import image_file


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def shards(folder: Path, out: Path, *arguments: str) -> int:
    return main(["shards", str(folder), "--out", str(out), *arguments])


def samples(data: Any) -> list[tuple[Any, str]]:
    return sorted((data[k]["image"].tolist(), data[k]["caption"]) for k in range(len(data)))


LAYOUTS: dict[str, dict[str, bytes | str]] = {
    "files beside": {f"sub/{k}.png": image_file(k) for k in range(5)}
    | {f"sub/{k}.txt": f"shade {k}" for k in range(5)},
    "imagefolder": {f"{k}.jpg": image_file(k, format="JPEG") for k in range(5)}
    | {"metadata.csv": "file_name,text\n" + "".join(f"{k}.jpg,shade {k}\n" for k in range(5))},
    "kohya": {f"10_sks dog/{k}.webp": image_file(k, format="WEBP") for k in range(5)},
    "long and unusual names": {f"{'é' * 60}/{'a' * 90}.{k}.png": image_file(k) for k in range(3)}
    | {f"{'é' * 60}/{'a' * 90}.{k}.txt": f"shade {k}" for k in range(3)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_hold_the_samples_of_the_folder(layout: str, tmp_path: Path) -> None:
    write(tmp_path / "in", LAYOUTS[layout])
    assert shards(tmp_path / "in", tmp_path / "out", "--shard-size", "2") == 0
    assert samples(Shards(tmp_path / "out", 8)) == samples(Folder(tmp_path / "in", 8))
    assert len(list((tmp_path / "out").glob("*.tar"))) == -(-len(Folder(tmp_path / "in", 8)) // 2)


def test_shards_are_read_by_webdataset(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.b/c.d.PNG": image_file(1), "a.b/c.d.txt": "one", "e.png": image_file(2), "e.txt": "two"})
    assert shards(tmp_path / "in", tmp_path / "out") == 0
    found = list(webdataset.WebDataset(str(tmp_path / "out/shard-00000.tar"), shardshuffle=False))
    assert [(s["__key__"], s["txt"], s["png"]) for s in found] == [
        ("a.b/c_d", b"one", image_file(1)),
        ("e", b"two", image_file(2)),
    ]


def test_all_captions_of_an_image_are_kept(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": "a.png", "text": text}) for text in ("x", "y")]
    write(tmp_path / "in", {"a.png": image_file(), "metadata.jsonl": "\n".join(lines)})
    assert shards(tmp_path / "in", tmp_path / "out") == 0
    assert Shards(tmp_path / "out", 8).read(0) == (image_file(), ["x", "y"])


def test_images_of_the_same_name_get_different_keys(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.png": image_file(1), "a.jpg": image_file(2, format="JPEG"), "a.x.png": image_file(3)})
    assert shards(tmp_path / "in", tmp_path / "out", "--caption", "a photo of sks dog") == 0
    data = Shards(tmp_path / "out", 8)
    assert [data.key(k) for k in range(3)] == ["a", "a_2", "a_x"]
    assert {data[k]["caption"] for k in range(3)} == {"a photo of sks dog"}


def test_skipped_images_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", {"a.png": image_file(), "a.txt": "x", "b.png": image_file(), "c.mp4": "", "d.json": "{}"})
    write(tmp_path / "in", {"d.png": image_file(), "e.png": b"<html>", "e.txt": "x"})
    assert shards(tmp_path / "in", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "warning: 1 of 4 images in" in printed.err and "captions: 1 .mp4" in printed.err
    for reason in ("its caption cannot be read", "its file is not an image that Pillow decodes"):
        assert f"images left out because {reason}: 1\n" in printed.out
    assert "wrote 1 images in 1 shards" in printed.out


def test_names_with_invalid_utf8_or_line_breaks_get_different_keys(tmp_path: Path) -> None:
    for name in (b"caf\xe9.png", b"a\nb.png"):
        write(tmp_path / "in", {name.decode("utf-8", "surrogateescape"): image_file()})
    assert shards(tmp_path / "in", tmp_path / "out", "--caption", "x") == 0
    assert [Shards(tmp_path / "out", 8)[k]["caption"] for k in range(2)] == ["x", "x"]
    assert len({*Folder(tmp_path / "in", 8, caption="x").hashes.tolist()}) == 2


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_parquet_files_with_images_become_shards(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [image_file(1), None, image_file(3, format="JPEG"), b"<html>", image_file(5)]
    values: list[Any] = [{"bytes": data, "path": None} for data in images] if kind == "struct" else images
    table = pyarrow.table({"image": values, "text": ["one", "two", None, "four", "five"]})
    (tmp_path / "in" / "data").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "in" / "data" / "train-00000-of-00001.parquet")
    assert shards(tmp_path / "in", tmp_path / "out") == 0
    data = Shards(tmp_path / "out", 8)
    assert [data.read(k) for k in range(len(data))] == [(images[0], ["one"]), (images[4], ["five"])]
    printed = capsys.readouterr().out
    for reason in ("its row has no image", "its row has no caption in the columns text, see --captions and --caption"):
        assert f"images left out because {reason}: 1\n" in printed
    assert "images left out because its file is not an image that Pillow decodes: 1\n" in printed
    assert "wrote 2 images in 1 shards" in printed


def test_another_column_of_parquet_files_can_be_the_caption(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pyarrow.table({"img": [image_file()], "prompt": ["a cat"]})
    parquet.write_table(table, tmp_path / "in" / "x.parquet")
    assert shards(tmp_path / "in", tmp_path / "out", "--captions", "json:prompt") == 0
    assert Shards(tmp_path / "out", 8).read(0)[1] == ["a cat"]


def test_the_same_folder_gives_the_same_bytes_and_replaces_only_own_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in", LAYOUTS["files beside"])
    assert shards(tmp_path / "in", tmp_path / "out") == 0
    tar = tmp_path / "out" / "shard-00000.tar"
    before = tar.read_bytes()
    assert shards(tmp_path / "in", tmp_path / "out") == 0 and tar.read_bytes() == before
    with tarfile.open(tar) as opened:
        assert {member.mtime for member in opened} == {0}
    tar.write_bytes(b"mine")
    assert shards(tmp_path / "in", tmp_path / "out") == 1 and tar.read_bytes() == b"mine"
    assert "was not written by ldm shards" in capsys.readouterr().err


def test_shards_of_another_run_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", LAYOUTS["files beside"])
    assert shards(tmp_path / "in", tmp_path / "out", "--shard-size", "1") == 0
    assert shards(tmp_path / "in", tmp_path / "out", "--shard-size", "4") == 1
    assert "also has shard-00002.tar of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"<html>", "a.txt": "x"}, "no image in .* can be used"),
        ({"a.txt": "x"}, "has no images"),
        ({"a.png": image_file()}, "has a caption: give one for all"),
    ],
)
def test_a_folder_without_usable_images_is_refused(
    files: dict[str, bytes | str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shards(write(tmp_path / "in", files), tmp_path / "out") == 1
    assert not list(tmp_path.glob("out/*.tar"))
    assert re.search(message, capsys.readouterr().err)

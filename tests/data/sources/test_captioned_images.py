import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ldm.data.sources.captioned_images import CaptionedImages
from tests.data.tars import image_file

IMAGE = image_file()


def write(root: Path, *images: str, **texts: Any) -> Path:
    """Writes images, and files with the given text or other values as JSON."""
    contents = {name: text if isinstance(text, str) else json.dumps(text) for name, text in texts.items()}
    for file, data in [*dict.fromkeys(images, IMAGE).items(), *((n, t.encode()) for n, t in contents.items())]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)
    return root


def captions(images: CaptionedImages) -> dict[str, list[str]]:
    return {key: images.captions_of(key) for key in images.keys}


def coco(*pairs: tuple[str, str]) -> dict[str, Any]:
    """Returns COCO annotations for pairs (file name, caption)."""
    names = list(dict.fromkeys(name for name, _ in pairs))
    return {
        "info": {},
        "images": [{"id": 100 + k, "file_name": name} for k, name in enumerate(names)],
        "annotations": [{"image_id": 100 + names.index(n), "id": k, "caption": c} for k, (n, c) in enumerate(pairs)],
    }


def test_cocos_annotations_caption_the_images_of_their_split(tmp_path: Path) -> None:
    write(tmp_path, "train2017/1.jpg", "val2017/1.jpg", "test2017/1.jpg")
    for split, text in (("train", "a cat"), ("val", "a dog")):
        content = coco(("1.jpg", text), ("1.jpg", f"{text} again"))
        write(tmp_path, **{f"annotations/captions_{split}2017.json": content})
    (tmp_path / "annotations/instances_train2017.json").write_text("not read, since it is large and holds boxes")
    with pytest.warns(UserWarning, match=r"1 of 3 images .* have no caption and are left out, such as test2017/1.jpg"):
        images = CaptionedImages(tmp_path)
    assert captions(images) == {
        "train2017/1.jpg": ["a cat", "a cat again"],
        "val2017/1.jpg": ["a dog", "a dog again"],
    }
    assert captions(CaptionedImages(tmp_path / "train2017")) == {"1.jpg": ["a cat", "a cat again"]}


@pytest.mark.parametrize("content", ["no JSON", {"images": 3}, {"images": [{}], "annotations": []}, [1]])
def test_annotations_of_another_form_are_refused(content: Any, tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", **{"annotations/captions.json": content})
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/annotations/captions.json (is not JSON|has not the form of COCO)"
    ):
        CaptionedImages(tmp_path)


def test_metadata_csv_is_read_as_hugging_face_writes_it(tmp_path: Path) -> None:
    table = 'file_name,text\r\na.png,"a cat, sitting"\r\nb.png,"two\nlines"\r\nc.png,\r\n'
    write(tmp_path, "train/a.png", "train/b.png", "train/c.png", **{"train/metadata.csv": table})
    with pytest.warns(UserWarning, match="1 of 3 images"):
        images = CaptionedImages(tmp_path)
    assert captions(images) == {"train/a.png": ["a cat, sitting"], "train/b.png": ["two\nlines"]}


def test_another_column_of_metadata_can_be_chosen(tmp_path: Path) -> None:
    write(tmp_path, "a.png", **{"metadata.csv": "file_name,label\na.png,a dog\n"})
    assert captions(CaptionedImages(tmp_path, ["json:label"])) == {"a.png": ["a dog"]}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("name,text\na.png,x\n", 'line 2 of .*metadata.csv has no "file_name"'),
        ("file_name,text\na.png," + "x" * 200_000, "is not CSV"),
    ],
)
def test_an_invalid_csv_is_refused_with_its_line(table: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        CaptionedImages(write(tmp_path, "a.png", **{"metadata.csv": table}))


def test_metadata_parquet_is_read(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png")
    table = pyarrow.table({"file_name": ["a.png", "b.png"], "text": ["a cat", None]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    with pytest.warns(UserWarning, match="1 of 2 images"):
        assert captions(CaptionedImages(tmp_path)) == {"a.png": ["a cat"]}


def test_caption_files_are_read_where_there_is_no_txt_or_json(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", **{"a.caption": "from caption", "b.caption": "from caption", "b.txt": "from txt"})
    assert captions(CaptionedImages(tmp_path)) == {"a.png": ["from caption"], "b.png": ["from txt"]}


def test_one_caption_can_be_given_for_all_images_without_captions(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "10_cat/b.png", **{"a.txt": "own"})
    images = CaptionedImages(tmp_path, caption="a photo of sks dog")
    assert captions(images) == {"10_cat/b.png": ["a photo of sks dog"], "a.png": ["own"]}


@pytest.mark.parametrize("root", ["", "10_sks dog"])
def test_kohyas_folders_give_a_caption_and_repeats(root: str, tmp_path: Path) -> None:
    write(tmp_path, "10_sks dog/a.png", "10_sks dog/b.png")
    (tmp_path / "10_sks dog/b.txt").write_text("own")
    images = CaptionedImages(tmp_path / root)
    first, second = images.keys
    assert (images.captions_of(first), images.captions_of(second)) == (["sks dog"], ["own"])
    assert (images.repeats(first), images.repeats(second)) == (10, 10)


@pytest.mark.parametrize("other", ["photos/b.png", "b.png", "2017_photos/b.png", "0_b/b.png"])
def test_numbered_folders_among_others_have_no_repeats(other: str, tmp_path: Path) -> None:
    images = CaptionedImages(write(tmp_path, "10_sks dog/a.png", other), caption="x")
    assert {images.repeats(key) for key in images.keys} == {1}


@pytest.mark.parametrize("extension", ["bmp", "GIF", "tif", "TIFF", "jfif", "avif", "jp2", "tga", "qoi", "ppm"])
def test_images_of_every_extension_that_pillow_decodes_are_found(extension: str, tmp_path: Path) -> None:
    assert CaptionedImages(write(tmp_path, f"a.{extension}"), caption="x").keys == [f"a.{extension}"]


def test_skipped_files_are_counted_by_extension(tmp_path: Path) -> None:
    write(tmp_path, "a.png", **{"a.txt": "x", "b.mp4": "", "c.mp4": "", "orphan.txt": "", "README.md": ""})
    with pytest.warns(UserWarning, match=r"left out of .* neither images nor their captions: 2 \.mp4, 1 \.txt$"):
        CaptionedImages(tmp_path)


def test_a_complete_folder_gives_no_warning(tmp_path: Path) -> None:
    write(tmp_path, "a.png", **{"a.txt": "x", "LICENSE": ""})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CaptionedImages(tmp_path)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("data/train.parquet", r"run ldm shards .* --out DIR to read its \.parquet files"),
        ("x.tar", "set data=shards|with data=shards data.shards="),
        ("notes.md", r"expected \.png"),
    ],
)
def test_a_folder_without_images_is_refused_with_a_remedy(file: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=f"{tmp_path} has no images: .*({remedy})"):
        CaptionedImages(tmp_path)

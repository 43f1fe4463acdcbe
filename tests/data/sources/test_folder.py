import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.data.sources.captions import choose_caption
from ldm.data.sources.folder import Folder
from ldm.image import load_image, pixels
from tests.data.tars import image_file


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def rows(*pairs: tuple[str, str], field: str = "text") -> str:
    return "".join(json.dumps({"file_name": name, field: caption}) + "\n" for name, caption in pairs)


def test_a_sample_has_image_caption_key_and_number(tmp_path: Path) -> None:
    folder = Folder(write(tmp_path, {"a.png": image_file(7, (8, 8)), "a.txt": "seven\n"}), 8)
    sample = folder[0]
    assert torch.equal(sample.pop("image"), pixels(load_image(tmp_path / "a.png")))  # type: ignore[misc]
    assert sample == {"caption": "seven", "key": "a.png", "id": 0}


def test_images_are_found_in_subfolders_and_sorted_by_path(tmp_path: Path) -> None:
    names = ["b.png", "a/z.JPG", "a/y.webp", "c/d/e.jpeg", "a.png"]
    formats = {"b.png": "PNG", "a/z.JPG": "JPEG", "a/y.webp": "WEBP", "c/d/e.jpeg": "JPEG", "a.png": "PNG"}
    write(tmp_path, {name: image_file(format=formats[name]) for name in names})
    write(tmp_path, {name.rpartition(".")[0] + ".txt": name for name in names if name != "a.png"})
    write(tmp_path, {"notes.md": "", ".hidden/x.png": image_file(), "._b.png": b"resource fork", "a.txt": "a.png"})
    folder = Folder(tmp_path, 8)
    assert [folder[k]["key"] for k in range(len(folder))] == sorted(names)
    assert all(folder[k]["caption"] == folder[k]["key"] == folder.key(k) for k in range(5))


@pytest.mark.parametrize("field", ["caption", "text"])
def test_captions_are_read_from_json_beside_the_image(field: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.png": image_file(), "a.json": json.dumps({field: "from json"})})
    assert Folder(tmp_path, 8)[0]["caption"] == "from json"


@pytest.mark.parametrize("field", ["caption", "text"])
def test_captions_are_read_from_hugging_face_metadata(field: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.png": image_file(), "sub/b.png": image_file(), "sub/c.png": image_file()})
    write(tmp_path, {"metadata.jsonl": rows(("a.png", "first"), ("sub/b.png", "second"), field=field)})
    write(tmp_path, {"sub/metadata.jsonl": "\n" + rows(("c.png", "third"), field=field)})
    folder = Folder(tmp_path, 8)
    assert [folder[k]["caption"] for k in range(3)] == ["first", "second", "third"]


def test_each_draw_has_one_of_several_captions_by_seed_id_and_draw(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": image_file(), "b.png": image_file(), "c.png": image_file()})
    write(tmp_path, {"a.alt.txt": "a2", "c.json": '{"caption": "c1", "recaptions": ["c2", "c3"]}'})
    lists = {"a.png": {"caption": "a1"}, "b.png": {"recaptions": ["b1", "", "b2"]}}
    lines = [json.dumps({"file_name": name, **fields}) for name, fields in lists.items()]
    write(tmp_path, {"metadata.jsonl": "\n".join(lines)})
    folder = Folder(tmp_path, 8, captions=["json:caption", "json:recaptions", "alt.txt"], seed=2)
    for k, captions in enumerate((["a1", "a2"], ["b1", "b2"], ["c1", "c2", "c3"])):
        chosen = [folder[draw, k]["caption"] for draw in range(40)]
        assert chosen == [choose_caption(captions, 2, k, draw) for draw in range(40)] and {*chosen} == {*captions}


def test_several_rows_of_an_image_are_several_captions(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": image_file(), "metadata.jsonl": rows(("a.png", "x"), ("a.png", "y"))})
    assert {Folder(tmp_path, 8)[draw, 0]["caption"] for draw in range(20)} == {"x", "y"}


def test_a_place_without_any_captions_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": image_file(), "a.txt": "x"})
    with pytest.raises(ValueError, match=r"has no \.alt\.text file, but captions=\['txt', 'alt\.text'\] requires one"):
        Folder(tmp_path, 8, captions=["txt", "alt.text"])


def test_metadata_rows_of_missing_images_give_a_warning(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": image_file(), "metadata.jsonl": rows(("a.png", "x"), ("b.png", "y"), ("../c.png", "z"))})
    with pytest.warns(UserWarning, match=r"names 2 files that do not exist, such as \.\./c.png"):
        assert len(Folder(tmp_path, 8)) == 1


def test_crop_and_flip_depend_on_the_draw(tmp_path: Path) -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(8, 64).numpy()
    Image.fromarray(ramp).save(tmp_path / "a.png")
    folder = Folder(write(tmp_path, {"a.txt": "x"}), 8, crop="random", flip=0.5)
    draws = [folder[draw, 0]["image"] for draw in range(8)]
    assert torch.equal(draws[0], folder[0]["image"])
    assert len({tuple(x[0, 0].tolist()) for x in draws}) > 4


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/none is not a folder"):
        Folder(tmp_path / "none", 8)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path} has no images"):
        Folder(write(tmp_path, {"a.txt": "x"}), 8)


def test_a_folder_without_any_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has a caption: .* beside the images \(a.txt or .json or .caption\)"):
        Folder(write(tmp_path, {"a.png": image_file(), "b.txt": "of no image"}), 8)


def test_images_without_a_caption_are_skipped_and_counted(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": image_file(), "a.txt": "x", "b.png": image_file(), "c.png": image_file()})
    with pytest.warns(
        UserWarning, match=f"^2 of 3 images in {tmp_path} have no caption and are left out, such as b.png"
    ):
        folder = Folder(tmp_path, 8)
    assert folder.keys == ["a.png"]


@pytest.mark.parametrize("row", ['{"file_name": "b.png", "text": null}', '{"file_name": "b.png"}'])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_row_without_a_caption_skips_only_its_image(row: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.png": image_file(), "b.png": image_file(), "metadata.jsonl": rows(("a.png", "x")) + row})
    assert Folder(tmp_path, 8).keys == ["a.png"]
    assert Folder(tmp_path, 8, caption="y")[1]["caption"] == "y"


def test_a_caption_that_is_not_utf8_is_refused_with_its_file(tmp_path: Path) -> None:
    folder = Folder(write(tmp_path, {"a.png": image_file(), "a.txt": b"caf\xe9"}), 8)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.txt is not UTF-8"):
        folder[0]


def test_a_corrupt_image_is_refused_with_its_file(tmp_path: Path) -> None:
    folder = Folder(write(tmp_path, {"a.png": image_file()[:40], "a.txt": "x"}), 8)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.png cannot be read"):
        folder[0]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("{}\n", 'line 1 of .*metadata.jsonl has no "file_name"'),
        ('\n{"file": "a.png"}\n', 'line 2 of .*metadata.jsonl has no "file_name"'),
        ("not json\n", "line 1 of .*metadata.jsonl is not JSON"),
        (b"caf\xe9", "metadata.jsonl is not UTF-8"),
    ],
)
def test_invalid_metadata_is_refused_with_its_line(metadata: str | bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        Folder(write(tmp_path, {"a.png": image_file(), "metadata.jsonl": metadata}), 8)


def test_images_in_kohya_folders_are_repeated_as_their_names_specify(tmp_path: Path) -> None:
    write(tmp_path, {"3_sks dog/a.png": image_file(1), "1_cat/b.png": image_file(2)})
    with pytest.warns(UserWarning, match=r"that many times per epoch \(1, 3\); data.repeats=false"):
        folder = Folder(tmp_path, 8, repeats=True)
    samples = [folder[k] for k in range(len(folder))]
    assert [sample["key"] for sample in samples] == ["1_cat/b.png", *["3_sks dog/a.png"] * 3]
    assert [sample["id"] for sample in samples] == [0, 1, 2, 3]
    assert {sample["caption"] for sample in samples} == {"cat", "sks dog"}
    assert len(Folder(tmp_path, 8)) == 2

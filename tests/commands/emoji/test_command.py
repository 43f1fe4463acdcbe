import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from ldm.__main__ import main
from ldm.commands.emoji.command import read_package
from ldm.data.sources.shards import Shards

EMOJI = Path(__file__).parents[4] / "shared" / "data" / "emoji"
KEYS = ["1f3c3-200d-27a1-fe0f", "1f3c3", "1f98d", "0023-fe0f-20e3"]  # as in emoji.json, not sorted
SKIN = "1f3fb"


def entry(key: str, category: str = "Symbols") -> dict:
    name = {"name": f"NAME OF {key.upper()}", "image": f"{key}.png", "short_name": f"short-{key}"}
    position = {"sheet_x": KEYS.index(key) if key in KEYS else 4, "sheet_y": 1}
    return name | position | {"category": category, "subcategory": "sub", "has_img_google": True}


def png(shade: int, mode: str = "RGBA", size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (size, size), (shade, 50, 100, 128)).convert(mode).save(file, "PNG")
    return file.getvalue()


def package(images: str = "google") -> dict[str, bytes]:
    """Returns the files of the npm package with these images by their path in it."""
    entries = [*map(entry, KEYS), entry(SKIN, "Component")]
    files = {
        "LICENSE": b"MIT",
        "package.json": json.dumps({"name": f"emoji-datasource-{images}", "version": "16.0.0"}).encode(),
        "emoji.json": json.dumps(entries).encode(),
        f"img/{images}/sheets/64.png": b"not read",
    }
    return files | {f"img/{images}/64/{key}.png": png(k) for k, key in enumerate([*KEYS, SKIN, "unlisted"])}


def tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tarball(tmp_path / "package.tgz", {f"package/{name}": data for name, data in package().items()})


def contents(out: Path) -> dict[str, dict[str, bytes]]:
    """Maps the name of each shard to its members and their bytes."""
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found[path.name] = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def test_each_emoji_has_its_image_lower_case_name_and_metadata(source: Path, tmp_path: Path) -> None:
    assert main(["emoji", str(source), "--out", str(tmp_path / "out")]) == 0
    members = contents(tmp_path / "out")["emoji-00000.tar"]
    assert members["1f98d.png"] == package()["img/google/64/1f98d.png"]
    assert members["1f98d.txt"] == b"name of 1f98d"
    assert json.loads(members["1f98d.json"]) == {
        "caption": "name of 1f98d",
        "category": "Symbols",
        "subcategory": "sub",
        "short_name": "short-1f98d",
        "width": 64,
        "height": 64,
    }


def test_emoji_are_sorted_into_shards_of_the_given_size_without_skin_tones(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["emoji", str(source), "--out", str(tmp_path / "out"), "--shard-size", "3"]) == 0
    shards = contents(tmp_path / "out")
    keys = {name: [m.removesuffix(".png") for m in members if m.endswith(".png")] for name, members in shards.items()}
    assert keys == {"emoji-00000.tar": sorted(KEYS)[:3], "emoji-00001.tar": sorted(KEYS)[3:]}
    assert capsys.readouterr().out == f"wrote 4 emoji in 2 shards to {tmp_path / 'out'}\n"


def test_the_unpacked_folder_gives_the_same_bytes_as_the_tarball(source: Path, tmp_path: Path) -> None:
    for name, data in package().items():
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_bytes(data)
    for origin, out in ((source, "a"), (tmp_path / "package", "b")):
        assert main(["emoji", str(origin), "--out", str(tmp_path / out)]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


def test_images_are_resized_with_their_transparency(source: Path, tmp_path: Path) -> None:
    assert main(["emoji", str(source), "--out", str(tmp_path / "out"), "--size", "32"]) == 0
    members = contents(tmp_path / "out")["emoji-00000.tar"]
    with Image.open(io.BytesIO(members["1f98d.png"])) as image:
        assert image.mode == "RGBA" and image.size == (32, 32)
        assert np.abs(np.asarray(image).astype(int) - [KEYS.index("1f98d"), 50, 100, 128]).max() <= 1
    assert json.loads(members["1f98d.json"])["width"] == 32


def test_webdataset_and_ldm_read_the_same_samples(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["emoji", str(source), "--out", str(out), "--shard-size", "3"]) == 0
    ours = [(s["key"], s["caption"]) for s in Shards(f"{out}/emoji-{{00000..00001}}.tar", 64)]  # type: ignore[attr-defined]
    urls = sorted(str(path) for path in out.glob("*.tar"))
    theirs = [(s["__key__"], s["txt"].decode()) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert ours == theirs == [(key, f"name of {key}") for key in sorted(KEYS)]


@pytest.mark.parametrize("name", ["emoji-00000.tar", "LICENSE.emoji-datasource"])
def test_missing_shards_are_restored_and_other_files_never_replaced(
    source: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, file = ["emoji", str(source), "--out", str(tmp_path / "out")], tmp_path / "out" / name
    assert main(command) == 0
    data = file.read_bytes()
    file.unlink()
    assert main(command) == 0 and file.read_bytes() == data
    file.write_bytes(b"theirs")
    assert main(command) == 1
    assert f"{name} was not written by this command, or was changed since" in capsys.readouterr().err
    assert file.read_bytes() == b"theirs"


def test_the_licence_is_written_beside_the_shards(source: Path, tmp_path: Path) -> None:
    assert main(["emoji", str(source), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "LICENSE.emoji-datasource").read_bytes() == b"MIT"


def test_paths_outside_the_package_are_ignored_and_nothing_is_unpacked(tmp_path: Path) -> None:
    wrong = ["../img/google/64/1f98d.png", "/etc/1f98d.png", "img/google/64/../../1f98d.png", "img/google/64/x/1.png"]
    files = {f"package/{name}": data for name, data in package().items()} | dict.fromkeys(wrong, b"evil")
    path = tarball(tmp_path / "p.tgz", files)
    expected = {name for name in package() if "sheets" not in name and "unlisted" not in name}
    assert read_package(path).files.keys() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["p.tgz"]


def test_images_outside_the_package_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    root = tmp_path / "package"
    files = package() | {"emoji.json": json.dumps([entry("../../../../secret")]).encode()}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    assert main(["emoji", str(root), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("images", ["twitter", "facebook", "apple"])
def test_other_packages_of_the_family_are_read(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = package(images)
    entries = [each | {f"has_img_{images}": each["image"] != "1f98d.png"} for each in json.loads(files["emoji.json"])]
    del files[f"img/{images}/64/1f98d.png"]
    source = tarball(tmp_path / "p.tgz", {f"package/{name}": data for name, data in files.items()} | {
        "package/emoji.json": json.dumps(entries).encode()
    })  # fmt: skip
    assert main(["emoji", str(source), "--out", str(tmp_path / "out")]) == 0
    members = contents(tmp_path / "out")["emoji-00000.tar"]
    assert {name.removesuffix(".png") for name in members if name.endswith(".png")} == set(KEYS) - {"1f98d"}
    assert members["1f3c3.png"] == files[f"img/{images}/64/1f3c3.png"]
    assert f"skipped 1 emoji of which {images} has no image" in capsys.readouterr().out


def sheets(color: tuple[int, int, int, int]) -> bytes:
    """Returns a sheet of transparent cells in which the second of the second row has this colour."""
    sheet, file = Image.new("RGBA", (5 * 34, 5 * 34)), io.BytesIO()
    sheet.paste(color, (35, 35, 67, 67))
    sheet.save(file, "PNG")
    return file.getvalue()


def test_a_set_of_the_package_without_own_images_is_cut_out_of_its_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: data for name, data in package().items() if "img/" not in name}
    files["package.json"] = b'{"name": "emoji-datasource", "version": "16.0.0"}'
    colors = {"google": (9, 8, 7, 255), "twitter": (1, 2, 3, 255)}
    files |= {f"img/{name}/sheets/32.png": sheets(color) for name, color in colors.items()}
    source = tarball(tmp_path / "p.tgz", {f"package/{name}": data for name, data in files.items()})
    command = ["emoji", str(source), "--out", str(tmp_path / "out"), "--size", "32"]
    assert main(command) == 1
    assert "no --images: emoji-datasource has the images of google, twitter" in capsys.readouterr().err
    assert main([*command, "--images", "twitter"]) == 0
    members = contents(tmp_path / "out")["emoji-00000.tar"]
    with Image.open(io.BytesIO(members[f"{KEYS[1]}.png"])) as image:
        assert image.size == (32, 32) and image.getextrema() == tuple((level, level) for level in colors["twitter"])


@pytest.mark.parametrize(
    ("selection", "keys"),
    [
        (["--include", "Animals"], ["b"]),
        (["--include", "Animals", "time"], ["b", "c"]),
        (["--exclude", "time"], ["a", "b"]),
        (["--include", "Travel", "--exclude", "time"], ["a"]),
    ],
)
def test_emoji_are_selected_by_category_and_subcategory(selection: list[str], keys: list[str], tmp_path: Path) -> None:
    kinds = {"a": ("Travel", "map"), "b": ("Animals", "bird"), "c": ("Travel", "time")}
    entries = [entry(key, category) | {"subcategory": sub} for key, (category, sub) in kinds.items()]
    files = package() | {f"img/google/64/{key}.png": png(1) for key in kinds}
    files |= {"emoji.json": json.dumps(entries).encode()}
    source = tarball(tmp_path / "p.tgz", {f"package/{name}": data for name, data in files.items()})
    assert main(["emoji", str(source), "--out", str(tmp_path / "out"), *selection]) == 0
    members = contents(tmp_path / "out")["emoji-00000.tar"]
    assert [name.removesuffix(".png") for name in members if name.endswith(".png")] == keys


def test_an_unknown_category_is_reported_with_the_known_ones(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["emoji", str(source), "--out", str(tmp_path / "out"), "--include", "Symbol"]) == 2
    assert "is called 'Symbol'; known are Symbols, sub" in capsys.readouterr().err
    assert main(["emoji", str(source), "--out", str(tmp_path / "out"), "--exclude", "sub"]) == 2
    assert "leave no emoji" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "caption"), [([], b"red heart"), (["--unicode-names"], b"heavy black heart")])
def test_everyday_names_replace_unusual_unicode_names(option: list[str], caption: bytes, tmp_path: Path) -> None:
    entries = [entry(KEYS[1]) | {"name": "HEAVY BLACK HEART"}]
    files = package() | {"emoji.json": json.dumps(entries).encode()}
    source = tarball(tmp_path / "p.tgz", {f"package/{name}": data for name, data in files.items()})
    assert main(["emoji", str(source), "--out", str(tmp_path / "out"), *option]) == 0
    assert contents(tmp_path / "out")["emoji-00000.tar"][f"{KEYS[1]}.txt"] == caption


def test_an_emoji_without_a_unicode_name_gets_its_short_name(tmp_path: Path) -> None:
    old = [{**entry("1f321-fe0f"), "name": None, "short_name": "flag-de_west", "category": "Flags"}]
    old = [{name: value for name, value in each.items() if name != "subcategory"} for each in old]
    files = package() | {"emoji.json": json.dumps(old).encode(), "img/google/64/1f321-fe0f.png": png(1)}
    source = tarball(tmp_path / "p.tgz", {f"package/{name}": data for name, data in files.items()})
    assert main(["emoji", str(source), "--out", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out")["emoji-00000.tar"]["1f321-fe0f.txt"] == b"flag-de west"


def wrong_source(what: str, tmp_path: Path) -> Path:
    files = {f"package/{name}": data for name, data in package().items()}
    path = tmp_path / "bad.tgz"
    if what == "absent":
        return tmp_path / "none.tgz"
    if what == "not a tarball":
        path.write_bytes(b"<html>")
    elif what == "truncated":
        noise = np.random.default_rng(0).bytes(100_000)  # does not compress, so the end of the file is in it
        data = tarball(path, {"package/noise": noise} | files).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif what == "another package":
        tarball(path, files | {"package/package.json": b'{"name": "emoji-datasourcery", "version": "16.0.0"}'})
    elif what == "no name":
        tarball(path, files | {"package/package.json": b"[]"})
    elif what == "no licence":
        tarball(path, {"package/package.json": b"{}"})
    elif what == "no list":
        tarball(path, files | {"package/emoji.json": b'{"emoji": 3}'})
    elif what == "wrong type":
        tarball(path, files | {"package/emoji.json": json.dumps([entry(KEYS[0]) | {"image": 3}]).encode()})
    elif what == "not JSON":
        tarball(path, files | {"package/emoji.json": b"{"})
    elif what == "no image":
        del files["package/img/google/64/1f98d.png"]
        tarball(path, files)
    return path


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("absent", "no file or folder at"),
        ("not a tarball", "is not an npm tarball, or is truncated"),
        ("truncated", "is not an npm tarball, or is truncated"),
        ("another package", "is the package emoji-datasourcery, not one of emoji-datasource"),
        ("no name", "is the package None, not one of emoji-datasource"),
        ("no licence", "it has no LICENSE"),
        ("no list", "emoji.json in the package is not a list of emoji"),
        ("wrong type", "emoji.json in the package is not a list of emoji"),
        ("not JSON", "emoji.json in the package is not JSON"),
        ("no image", "the package has no img/google/64/1f98d.png"),
    ],
)
def test_a_wrong_source_is_reported_with_how_to_get_the_package(
    what: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["emoji", str(wrong_source(what, tmp_path)), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert "npm pack emoji-datasource-google@16.0.0" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_shards_of_another_run_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["emoji", str(source), *out, "--shard-size", "1"]) == 0
    assert main(["emoji", str(source), *out, "--shard-size", "2"]) == 1
    assert "already has emoji-00002.tar" in capsys.readouterr().err
    assert main(["emoji", str(source), *out, "--shard-size", "1"]) == 0


@pytest.mark.parametrize("wrong", [["--size", "0"], ["--size", "x"], ["--shard-size", "-3"], ["--size", "1.5"], []])
def test_an_invalid_command_line_exits_with_code_2(wrong: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)] if wrong else []
    with pytest.raises(SystemExit) as exit:
        main(["emoji", "package.tgz", *out, *wrong])
    assert exit.value.code == 2


def test_help_has_units_defaults_and_the_source_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["emoji", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for part in (
        "pixels per side (default: 64)",
        "samples per tar (default: 480)",
        "npm pack emoji-datasource-google@16.0.0",
    ):
        assert part in text


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji shards are not beside this checkout")
def test_the_emoji_shards_are_reproduced_from_their_images_and_names(tmp_path: Path) -> None:
    """A package that is rebuilt from the shards, with its entries reversed, gives the same shards byte for byte."""
    given = {name: data for members in contents(EMOJI).values() for name, data in members.items()}
    metadata = {name.removesuffix(".json"): json.loads(data) for name, data in given.items() if name.endswith(".json")}
    place = {"sheet_x": 0, "sheet_y": 0}
    entries = [
        {**a, **place, "name": a["caption"].upper(), "image": f"{key}.png"} for key, a in reversed(metadata.items())
    ]
    files = package() | {"emoji.json": json.dumps(entries).encode()}
    files |= {f"img/google/64/{name}": data for name, data in given.items() if name.endswith(".png")}
    source = tarball(tmp_path / "p.tgz", {f"package/{name}": data for name, data in files.items()})
    assert main(["emoji", str(source), "--out", str(tmp_path / "out"), "--unicode-names"]) == 0
    for path in sorted(EMOJI.glob("*.tar")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()

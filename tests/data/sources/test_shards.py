import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.sources.captions import choose_caption
from ldm.data.sources.shards import Shards, find_tars
from ldm.data.sources.storage import File
from tests.data.tars import image_file, sample, samples, write_tar

EMOJI = Path(__file__).parents[4] / "shared" / "data" / "emoji"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Creates three shards with four, zero and three samples."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for k, (first, count) in enumerate([(0, 4), (4, 0), (4, 3)]):
        write_tar(shards / f"x-{k:05d}.tar", samples(count, first))
    return shards


def shades(shards: Shards) -> list[int]:
    return [int(shards[k]["image"][0, 0, 0]) for k in range(len(shards))]


def test_samples_are_numbered_across_all_shards(folder: Path) -> None:
    shards = Shards(folder, 8)
    assert len(shards) == 7 and shades(shards) == list(range(7))
    first = {k: v for k, v in shards[4].items() if k != "image"}
    assert first == {"caption": "shade 4", "key": "0004", "id": 4} and shards.key(4) == "0004"
    assert shards[4]["image"].shape == (3, 8, 8) and shards[4]["image"].dtype == torch.uint8


def test_a_pattern_a_glob_a_list_and_a_folder_give_the_same_shards(folder: Path) -> None:
    paths = sorted(folder.glob("*.tar"))
    spellings: list[Any] = [
        folder,
        f"{folder}/x-{{00000..00002}}.tar",
        f"{folder}/x-*.tar",
        [str(p) for p in paths],
        [f"{folder}/x-0000{{0..1}}.tar", paths[2]],
    ]
    for urls in spellings:
        assert [file.path for file in find_tars(urls)] == paths
    assert [file.path for file in find_tars([*reversed(paths)])] == paths[::-1]


def test_braces_keep_leading_zeros_and_multiply(tmp_path: Path) -> None:
    for name in ("a8-1", "a8-2", "a9-1", "a9-2", "a10-1", "a10-2", "b08", "b09", "b10"):
        write_tar(tmp_path / f"{name}.tar", {})
    names = [file.stem for file in find_tars([f"{tmp_path}/a{{8..10}}-{{1..2}}.tar", f"{tmp_path}/b{{08..10}}.tar"])]
    assert names == ["a8-1", "a8-2", "a9-1", "a9-2", "a10-1", "a10-2", "b08", "b09", "b10"]


@pytest.mark.parametrize("url", ["pipe:cat x.tar", "PIPE:curl http://host/{0..3}.tar"])
def test_addresses_that_run_a_command_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="would run a command"):
        Shards(url, 8)


@pytest.mark.parametrize("name", ["none.tar", "none-*.tar", "x-{00000..00003}.tar", "empty"])
def test_missing_shards_are_refused_with_their_name(name: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^no shards at {folder}/"):
        Shards(f"{folder}/{name}", 8)


def test_braces_that_count_down_and_an_empty_list_are_refused() -> None:
    with pytest.raises(ValueError, match="counts down"):
        Shards("x-{3..0}.tar", 8)
    with pytest.raises(ValueError, match="no shards were given"):
        Shards([], 8)


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.txt": b"a caption", "a.npy": b""})
    with pytest.raises(ValueError, match="has no images"):
        Shards(tmp_path, 8)


@pytest.mark.parametrize(("extension", "format"), [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_images_of_all_formats_are_read(extension: str, format: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"a.{extension}": image_file(200, format=format), "a.txt": b"x"})
    assert (Shards(tmp_path, 8)[0]["image"].int() - 200).abs().max() <= 2  # lossy formats


def test_a_caption_in_json_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.json": json.dumps({"caption": "from json"}).encode(), "a.png": image_file()})
    assert Shards(tmp_path, 8)[0]["caption"] == "from json"


def test_each_draw_has_one_of_several_captions_by_seed_id_and_draw(tmp_path: Path) -> None:
    lists = {f"{k:04d}.json": json.dumps({"captions": [f"{k}a", f"{k}b"]}).encode() for k in range(3)}
    write_tar(tmp_path / "a.tar", samples(3) | lists | {"0001.alt.txt": b"alt"})
    shards = Shards(tmp_path, 8, captions=["txt", "alt.txt", "json:captions"], seed=5)
    for k in range(3):
        captions = [f"shade {k}", *(["alt"] if k == 1 else []), f"{k}a", f"{k}b"]
        chosen = [shards[draw, k]["caption"] for draw in range(40)]
        assert chosen == [choose_caption(captions, 5, k, draw) for draw in range(40)] and {*chosen} == {*captions}
    assert Shards(tmp_path, 8)[7, 0]["caption"] == "shade 0"


def test_the_chosen_caption_decides_whether_the_image_may_be_flipped(tmp_path: Path) -> None:
    two = {"a.json": b'["to the left", "somewhere"]'}
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
    write_tar(tmp_path / "a.tar", {"a.png": file.getvalue()} | two)
    samples_of_draws = [Shards(tmp_path, 8, flip=1.0)[draw, 0] for draw in range(20)]
    assert {(s["caption"], bool(s["image"][0, 0, 0] > s["image"][0, 0, -1])) for s in samples_of_draws} == {
        ("to the left", False),
        ("somewhere", True),
    }


def test_a_place_without_any_captions_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has no \.alt\.text file, but captions=\['txt', 'alt\.text'\] requires one"):
        Shards(folder, 8, captions=["txt", "alt.text"])


def test_images_and_captions_may_be_in_the_shards_of_other_processes(folder: Path, tmp_path: Path) -> None:
    _, empty, last = find_tars(folder)
    (another,) = find_tars(write_tar(tmp_path / "y.tar", sample("a") | {"a.alt.txt": b"another"}))
    shards = Shards([last], 8, captions=["txt", "alt.txt"], others=[empty, another])
    assert len(shards) == 3 and len(Shards([empty], 8, others=[last])) == 0
    with pytest.raises(ValueError, match=r"x-00001.tar and 1 more has no images"):
        Shards([empty], 8, others=[empty])
    with pytest.raises(ValueError, match=r"x-00002.tar and 2 more has no \.syn\.txt"):
        Shards([last], 8, captions=["txt", "syn.txt"], others=[empty, another])


def test_shards_of_other_processes_are_read_only_if_something_is_missing(folder: Path) -> None:
    first, *_ = find_tars(folder)
    absent = File("/nowhere.tar", 0, "")
    assert len(Shards([first], 8, others=[absent])) == len(Shards([first], 8, captions=["txt"], others=[absent])) == 4


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"b.png": None}, "a.tar has no image for b$"),
        ({"b.txt": None}, "a.tar has no .txt or .json for b$"),
        ({"b.png": b"<html>"}, "^b in .*a.tar cannot be read as an image"),
        ({"b.png": image_file()[:45]}, "^b in .*a.tar cannot be read as an image"),
        ({"b.txt": b"caf\xe9"}, "^b.txt in .*a.tar is not UTF-8"),
    ],
)
def test_only_the_bad_sample_is_refused_with_its_shard_and_key(
    damage: dict[str, bytes | None], reason: str, tmp_path: Path
) -> None:
    contents = sample("a", 1) | sample("b", 2) | sample("c", 3) | damage
    write_tar(tmp_path / "a.tar", {name: data for name, data in contents.items() if data is not None})
    shards = Shards(tmp_path, 8)
    with pytest.raises(ValueError, match=reason):
        shards[1]
    assert [shards[k]["caption"] for k in (0, 2)] == ["shade 1", "shade 3"]


def test_a_truncated_shard_is_used_with_a_warning_on_every_start(folder: Path) -> None:
    shard = folder / "x-00000.tar"
    os.truncate(shard, 5 * 1024 + 100)  # an image and a caption take 2 KiB per sample
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{shard} is truncated or corrupt: .*2 samples before that are used"):
            shards = Shards(folder, 8)
        assert shades(shards) == [0, 1, 4, 5, 6]


def test_a_shard_truncated_at_a_header_is_reported_too(folder: Path) -> None:
    os.truncate(folder / "x-00000.tar", 4 * 1024)
    with pytest.warns(UserWarning, match="no end-of-archive marker"):
        assert len(Shards(folder, 8)) == 2 + 3


def test_a_bad_sample_is_replaced_by_samples_of_its_shard(folder: Path) -> None:
    shards = Shards(folder, 8)
    assert [shards.group(k) for k in (0, 3, 4, 6)] == [range(0, 4)] * 2 + [range(4, 7)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same_samples_as_the_main_process(method: str, folder: Path) -> None:
    write_tar(folder / "x-00000.tar", samples(4) | {"0002.json": b'["a", "b", "c"]'})
    shards = Shards(folder, 8, crop="random", flip=0.5, captions=["txt", "json"])
    order = [(draw, k) for draw in range(2) for k in range(7)]
    loader = DataLoader(
        shards,
        sampler=order,
        batch_size=None,
        num_workers=1,
        multiprocessing_context=get_context(method),
    )
    for key, sample_of_worker in zip(order, loader, strict=True):
        expected = shards[key]
        assert torch.equal(sample_of_worker.pop("image"), expected.pop("image"))
        assert sample_of_worker == expected  # type: ignore[misc]


def test_the_data_set_can_be_pickled_after_reading(folder: Path) -> None:
    shards = Shards(folder, 8)
    shards[0]
    assert shades(pickle.loads(pickle.dumps(shards))) == list(range(7))


def webdataset_samples(urls: str | list[str]) -> Iterator[dict]:
    return iter(webdataset.WebDataset(urls, shardshuffle=False))


@pytest.mark.parametrize("keys", [["a", "b", "c"], ["dir/a", "dir/sub.d/b", "x" * 120]])
def test_shards_written_by_webdataset_are_read(keys: list[str], tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for k, key in enumerate(keys):
            sink.write({"__key__": key, "png": image_file(k), "txt": f"shade {k}", "json": {"caption": "no"}})
    shards = Shards(tmp_path, 8)
    assert [(s["key"], s["caption"], int(s["image"].max())) for s in shards] == [  # type: ignore[attr-defined]
        (key, f"shade {k}", k) for k, key in enumerate(keys)
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_and_captions_match_those_that_webdataset_reads(format: int, tmp_path: Path) -> None:
    keys = ["a", "./b", "c d", "dir.x/e", "café"]
    path = write_tar(
        tmp_path / "a.tar", {n: d for k, key in enumerate(keys) for n, d in sample(key, k).items()}, format
    )
    theirs = [(s["__key__"], s["txt"].decode()) for s in webdataset_samples(str(path))]
    assert [(s["key"], s["caption"]) for s in Shards(path, 8)] == theirs  # type: ignore[attr-defined]


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji shards are not beside this checkout")
def test_the_emoji_shards_match_what_webdataset_reads() -> None:
    shards = Shards(f"{EMOJI}/emoji-{{00000..00003}}.tar", 16)
    theirs = list(webdataset_samples([file.url for file in shards.files]))
    assert len(shards) == 1906 == len(theirs)
    assert [shards.key(k) for k in range(1906)] == [s["__key__"] for s in theirs]
    for k in range(0, 1906, 61):
        assert shards[k]["caption"] == theirs[k]["txt"].decode() == json.loads(theirs[k]["json"])["caption"]

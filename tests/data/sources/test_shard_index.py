import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ldm.data.sources import shard_index
from ldm.data.sources.captions import DEFAULT
from ldm.data.sources.shard_index import ARRAYS, Index
from ldm.data.sources.storage import File, local_file
from tests.data.tars import image_file, samples, write_tar


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    return tmp_path / "home"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records the path of every shard that is scanned."""
    calls: list[Path] = []

    real = shard_index.scan

    def counted(shard: File, texts: Sequence[str]) -> Index:
        calls.append(Path(shard.url))
        return real(shard, texts)

    monkeypatch.setattr(shard_index, "scan", counted)
    return calls


def scan(shard: Path, *texts: str) -> Index:
    return shard_index.scan(local_file(shard), texts or DEFAULT)


def load_index(*shards: Path, texts: Sequence[str] = DEFAULT) -> Index:
    return shard_index.load_index([local_file(shard) for shard in shards], texts)


def keys(index: Index) -> list[str]:
    return [index.key(row) for row in range(len(index))]


def test_the_spans_are_the_members_bytes(tmp_path: Path) -> None:
    contents = samples(3)
    shard = write_tar(tmp_path / "a.tar", contents)
    data, index = shard.read_bytes(), scan(shard)
    assert len(index) == 3
    for key, ((p, p_size), (c, c_size), absent) in zip(keys(index), index.spans, strict=True):
        assert absent.tolist() == [-1, 0]
        assert data[p : p + p_size] == contents[f"{key}.png"] and data[c : c + c_size] == contents[f"{key}.txt"]


def test_members_are_grouped_by_key_in_any_order(tmp_path: Path) -> None:
    contents = samples(4)
    order = np.random.default_rng(0).permutation(list(contents))
    index = scan(write_tar(tmp_path / "a.tar", {str(name): contents[str(name)] for name in order}))
    assert sorted(keys(index)) == ["0000", "0001", "0002", "0003"] and (index.spans[:, :2] > 0).all()


def test_the_key_ends_at_the_first_dot_of_the_file_name(tmp_path: Path) -> None:
    names = ["a.b/c.d.png", "a.b/c.png", "a.b/c.TXT", "./e.JPG", "e.f.txt", "._c.png", ".hidden", "no_extension"]
    index = scan(write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x")))
    assert keys(index) == ["a.b/c", "./e"]


def test_missing_members_are_marked_and_other_files_are_ignored(tmp_path: Path) -> None:
    contents = {"a.png": b"1", "b.txt": b"22", "c.webp": b"333", "c.json": b"4444", "d.cls": b"5", "d.md": b"6"}
    index = scan(write_tar(tmp_path / "a.tar", contents))
    assert keys(index) == ["a", "b", "c"]
    assert (index.spans[..., 0] >= 0).tolist() == [[True, False, False], [False, True, False], [True, False, True]]
    assert index.spans[..., 1].tolist() == [[1, 0, 0], [0, 2, 0], [3, 0, 4]]


def test_texts_are_indexed_by_their_complete_extension(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.png": b"1", "a.txt": b"22", "a.alt.txt": b"333", "a.syn.json": b"4444"})
    assert scan(shard, "alt.txt", "syn.json").spans[..., 1].tolist() == [[1, 3, 4]]
    assert scan(shard, "json", "txt").spans[..., 1].tolist() == [[1, 0, 2]]


def test_the_last_of_two_members_of_the_same_name_counts(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    write_tar(shard, {"a.png": b"old", "a.txt": b"x"})
    with tarfile.open(shard, "a") as tar:
        tar.add(write_tar(tmp_path / "b.tar", {}), arcname="a.png")
    assert scan(shard).spans[0, 0, 1] == (tmp_path / "b.tar").stat().st_size


def test_an_empty_shard_has_no_samples_and_no_loss(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {})
    for index in (load_index(shard), load_index(shard)):
        assert len(index) == 0 and index.spans.shape == (0, 3, 2) and index.losses == {}


def test_an_incomplete_sample_of_a_truncated_tar_is_dropped(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    last = scan(shard).spans[2]
    os.truncate(shard, last[1, 0] + 1)  # within the last caption
    index = scan(shard)
    assert keys(index) == ["0000", "0001"] and "2 samples" in index.losses[0]
    os.truncate(shard, last[0, 0] + 1)  # within the last image
    assert keys(scan(shard)) == ["0000", "0001"]


def test_the_index_is_cached_beside_the_shard(tmp_path: Path, scans: list[Path]) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    first, second = load_index(shard), load_index(shard)
    assert scans == [shard] and (tmp_path / "a.tar.index").is_file()
    for name in ARRAYS:
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_an_index_for_other_texts_is_created_again(tmp_path: Path, scans: list[Path]) -> None:
    shards = [write_tar(tmp_path / f"{k}.tar", samples(2) | {"0001.alt.txt": b"x"}) for k in range(2)]
    for chosen in (shards, shards[:1]):
        for texts, present in ((DEFAULT, 1), (("alt.txt",), 0)):
            assert (load_index(*chosen, texts=texts).spans[0, 1, 0] >= 0) == present
            before = len(scans)
            load_index(*chosen, texts=texts)
            assert len(scans) == before


def test_the_cached_index_keeps_the_description_of_truncation(tmp_path: Path, scans: list[Path]) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    os.truncate(shard, shard.stat().st_size // 2 // 512 * 512 - 100)
    assert load_index(shard).losses == load_index(shard).losses != {}
    assert scans == [shard]


def test_the_index_is_created_again_if_size_or_time_of_the_tar_changes(tmp_path: Path, scans: list[Path]) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    load_index(shard)
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load_index(shard)
    assert len(scans) == 2
    stat = shard.stat()
    write_tar(shard, {f"{k}.png": image_file() for k in range(99)})
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(load_index(shard)) == 99 and len(scans) == 3


def test_a_corrupt_index_is_created_again(tmp_path: Path, scans: list[Path]) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    load_index(shard)
    index = tmp_path / "a.tar.index"
    complete = index.read_bytes()
    for _ in range(2):
        index.write_bytes(complete[:-8])
        assert len(load_index(shard)) == 3
        assert index.read_bytes() == complete
    assert len(scans) == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and more", b"0 512\n512 1024\n"])
def test_a_file_that_is_not_an_index_is_never_replaced(
    tmp_path: Path, home: Path, scans: list[Path], content: bytes
) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    (tmp_path / "a.tar.index").write_bytes(content)
    assert [len(load_index(shard)) for _ in range(2)] == [3, 3] and len(scans) == 1
    assert (tmp_path / "a.tar.index").read_bytes() == content


def test_the_index_of_a_read_only_folder_is_cached_in_the_home_folder(
    tmp_path: Path, home: Path, scans: list[Path]
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for count, folder in enumerate(folders, 1):
        folder.mkdir()
        write_tar(folder / "a.tar", samples(count))
        folder.chmod(0o555)
    try:
        counts = [len(load_index(folder / "a.tar")) for folder in [*folders, *folders]]
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert counts == [1, 2, 1, 2] and len(scans) == 2
    assert [os.listdir(folder) for folder in folders] == [["a.tar"], ["a.tar"]]
    assert len(list((home / ".cache" / "ldm" / "index").iterdir())) == 2


def test_the_index_is_created_with_a_warning_if_no_folder_is_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    tmp_path.chmod(0o555)
    monkeypatch.setenv("HOME", "/dev/null")
    try:
        with pytest.warns(UserWarning, match="cannot cache an index"):
            assert len(load_index(shard)) == 3
    finally:
        tmp_path.chmod(0o755)


def test_the_index_of_many_shards_joins_the_index_of_each(tmp_path: Path, home: Path) -> None:
    shards = [write_tar(tmp_path / f"{k}.tar", samples(n, 10 * k)) for k, n in enumerate((3, 0, 2))]
    first, second = load_index(*shards), load_index(*shards)
    assert len(list((home / ".cache" / "ldm" / "index").iterdir())) == 1
    for index in (first, second):
        assert index.starts.tolist() == [0, 3, 3, 5] and [index.shard(row) for row in range(5)] == [0, 0, 0, 2, 2]
        assert keys(index) == [key for shard in shards for key in keys(scan(shard))]
        for name in ("spans", "hashes"):
            assert np.array_equal(getattr(index, name), np.concatenate([getattr(scan(s), name) for s in shards]))
    assert first.hashes.tolist() == [zlib.crc32(key.encode()) for key in keys(first)]


def test_only_changed_shards_are_scanned_again(tmp_path: Path, scans: list[Path]) -> None:
    shards = [write_tar(tmp_path / f"{k}.tar", samples(2, 10 * k)) for k in range(3)]
    load_index(*shards)
    write_tar(shards[1], samples(5, 10))
    assert len(load_index(*shards)) == len(load_index(*shards)) == 9
    assert sorted(scans) == sorted([*shards, shards[1]])

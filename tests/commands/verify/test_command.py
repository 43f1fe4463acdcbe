"""`ldm verify` prints a sentence for each problem."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ldm.__main__ import main
from ldm.data.latents.shard import key_hashes, map_shard, write_shard
from ldm.files import write_json
from tests.data.latents.test_cache import write_cache
from tests.data.tars import sample, samples, write_tar


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache")


def lines_of(path: Path, capsys: pytest.CaptureFixture[str], code: int = 1, captions: str = "") -> list[str]:
    assert main(["verify", str(path), *(["--captions", *captions.split()] if captions else [])]) == code
    return capsys.readouterr().out.splitlines()


def test_a_complete_cache_has_no_problems(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(cache, capsys, 0) == [f"{cache}: 4 files, no problem found"]


def test_a_flipped_bit_is_reported(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((cache / "s0.safetensors").read_bytes())
    data[-1] ^= 1
    (cache / "s0.safetensors").write_bytes(data)
    (line,) = lines_of(cache, capsys)
    assert "s0.safetensors does not match its checksum" in line


@pytest.mark.parametrize("end", [None, -1, 0])
def test_hashes_other_than_those_of_the_keys_are_reported(
    end: int | None, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(cache / "hashes.npy", key_hashes(cache, ["s0", "s1", "s2"]) ^ np.uint32(end is None))
    data = (cache / "hashes.npy").read_bytes()
    (cache / "hashes.npy").write_bytes(data[:end])
    (line,) = lines_of(cache, capsys)
    assert line.startswith(f"{cache}/hashes.npy does not match the keys in the shards")


def test_missing_truncated_and_unlisted_shards_are_reported(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "s1.safetensors").rename(cache / "other.safetensors")
    os.truncate(cache / "s2.safetensors", 700)
    lines = lines_of(cache, capsys)
    assert ["other" in lines[0], "does not exist" in lines[1], "corrupt" in lines[2]] == [True] * 3 and len(lines) == 3


def test_nan_wrong_counts_and_other_settings_are_reported(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moments = map_shard(cache / "s2.safetensors").moments.copy()
    moments[1, 0, 0, 0] = np.nan
    write_shard(cache / "s2.safetensors", moments, ["a", "b"], [[""], [""]], {"settings": {}})
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][0]["samples"] = 4
    write_json(cache / "manifest.json", manifest)
    output = "\n".join(lines_of(cache, capsys))
    for words in (
        "counts 5 samples, but its shards 6",
        "has 3 latents",
        "with settings that differ",
        "1 latents with NaN",
    ):
        assert words in output


def test_a_cache_without_a_manifest_is_reported(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "manifest.json").unlink()
    assert "has no manifest.json" in lines_of(cache, capsys)[0]


def test_missing_and_empty_members_of_shards_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = write_tar(tmp_path / "a.tar", samples(3)), tmp_path / "b.tar"
    assert lines_of(good, capsys, 0) == [f"{good}: 1 shards, no problem found"]
    incomplete = {**sample("x"), **sample("y"), "z.png": b"", "z.txt": b""}
    del incomplete["x.png"], incomplete["y.txt"]
    write_tar(bad, incomplete)
    assert lines_of(bad, capsys) == [
        f"{bad} has no image for x",
        f"{bad} has no caption (.txt or .json) for y",
        f"{bad} has an image of 0 bytes for z",
    ]
    os.truncate(good, 1024)
    assert "is truncated" in lines_of(good, capsys)[0]


def test_captions_are_read_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = {"0000.alt.txt": b"a\nb", "0001.syn.json": b'{"text": ["c"]}', "0002.txt": b"caf\xe9"}
    first = {name: data for name, data in (samples(3) | several).items() if name != "0001.txt"}
    write_tar(tmp_path / "a.tar", first)
    write_tar(tmp_path / "b.tar", samples(2, 3) | {"0003.json": b"{", "0004.json": b"{}"})
    assert lines_of(tmp_path, capsys) == [
        f"{tmp_path}/a.tar has no caption (.txt or .json) for 0001",
        f"0002.txt in {tmp_path}/a.tar is not UTF-8 text: byte 3 is invalid; save it as UTF-8",
    ]
    write_tar(tmp_path / "a.tar", first | {"0002.txt": b"d"})
    assert "2 shards, no problem found" in lines_of(tmp_path, capsys, 0, "txt alt.txt:lines syn.json:text")[0]
    (line,) = lines_of(tmp_path, capsys, 1, "txt syn.json:text json:caption")
    assert line.startswith(f"0003.json in {tmp_path}/b.tar is not JSON: ")
    (line,) = lines_of(tmp_path, capsys, 1, "syn.json json txt no.txt")[-1:]
    assert line.startswith(f"{tmp_path}/a.tar and 1 more has no .no.txt file, but captions=")


def test_the_first_of_several_unreadable_captions_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3) | {f"000{k}.json": b'{"caption": 1}' for k in range(3)})
    assert lines_of(shard, capsys, 1, "json") == [
        f"0000.json in {shard} has no caption: found none in json (the first of 3 samples with unreadable captions)"
    ]


def test_options_for_the_other_kind_of_data_are_usage_errors(cache: Path, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(1))
    assert main(["verify", str(cache), "--captions", "txt"]) == 2
    assert main(["verify", str(shard), "--first-stage", "assets:vae.safetensors"]) == 2

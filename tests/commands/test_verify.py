"""`ldm verify`: a sentence for each thing that is wrong."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ldm.__main__ import main
from ldm.data.latents.shard import map_shard, write_shard
from ldm.files import write_json
from tests.data.latents.test_cache import write_cache
from tests.data.tars import sample, samples, write_tar


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache")


def told(path: Path, capsys: pytest.CaptureFixture[str], code: int = 1, captions: str = "") -> list[str]:
    assert main(["verify", str(path), *(["--captions", *captions.split()] if captions else [])]) == code
    return capsys.readouterr().out.splitlines()


def test_a_whole_cache_has_no_problem(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(cache, capsys, 0) == [f"{cache}: 4 files, no problem found"]


def test_a_flipped_bit_is_found(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((cache / "s0.safetensors").read_bytes())
    data[-1] ^= 1
    (cache / "s0.safetensors").write_bytes(data)
    (line,) = told(cache, capsys)
    assert "s0.safetensors does not have the checksum" in line


def test_a_missing_a_cut_and_a_strange_shard_are_found(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "s1.safetensors").rename(cache / "other.safetensors")
    os.truncate(cache / "s2.safetensors", 700)
    lines = told(cache, capsys)
    assert ["other" in lines[0], "not there" in lines[1], "damaged" in lines[2]] == [True] * 3 and len(lines) == 3


def test_nan_wrong_counts_and_other_settings_are_found(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moments = map_shard(cache / "s2.safetensors").moments.copy()
    moments[1, 0, 0, 0] = np.nan
    write_shard(cache / "s2.safetensors", moments, ["a", "b"], [[""], [""]], {"settings": {}})
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][0]["samples"] = 4
    write_json(cache / "manifest.json", manifest)
    found = "\n".join(told(cache, capsys))
    for words in ("counts 5 samples, its shards 6", "holds 3 latents", "other settings", "1 latents with NaN"):
        assert words in found


def test_a_cache_without_manifest_is_no_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "manifest.json").unlink()
    assert "holds no manifest.json" in told(cache, capsys)[0]


def test_shards_are_checked_for_what_they_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = write_tar(tmp_path / "a.tar", samples(3)), tmp_path / "b.tar"
    assert told(good, capsys, 0) == [f"{good}: 1 shards, no problem found"]
    lacking = {**sample("x"), **sample("y"), "z.png": b"", "z.txt": b""}
    del lacking["x.png"], lacking["y.txt"]
    write_tar(bad, lacking)
    assert told(bad, capsys) == [
        f"{bad} has no picture for x",
        f"{bad} has no caption (.txt or .json) for y",
        f"{bad} holds a picture of 0 bytes for z",
    ]
    os.truncate(good, 1024)
    assert "is cut short" in told(good, capsys)[0]


def test_captions_are_read_where_and_as_training_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = {"0000.alt.txt": b"a\nb", "0001.syn.json": b'{"text": ["c"]}', "0002.txt": b"caf\xe9"}
    first = {name: data for name, data in (samples(3) | several).items() if name != "0001.txt"}
    write_tar(tmp_path / "a.tar", first)
    write_tar(tmp_path / "b.tar", samples(2, 3) | {"0003.json": b"{", "0004.json": b"{}"})
    assert told(tmp_path, capsys) == [
        f"{tmp_path}/a.tar has no caption (.txt or .json) for 0001",
        f"0002.txt in {tmp_path}/a.tar is not UTF-8 text: byte 3 cannot be read; save it as UTF-8",
    ]
    write_tar(tmp_path / "a.tar", first | {"0002.txt": b"d"})
    assert "2 shards, no problem found" in told(tmp_path, capsys, 0, "txt alt.txt:lines syn.json:text")[0]
    (line,) = told(tmp_path, capsys, 1, "txt syn.json:text json:caption")
    assert line.startswith(f"0003.json in {tmp_path}/b.tar is not JSON: ")
    (line,) = told(tmp_path, capsys, 1, "syn.json json txt no.txt")[-1:]
    assert line.startswith(f"{tmp_path}/a.tar and 1 more holds no .no.txt, which captions=")


def test_of_many_captions_that_cannot_be_read_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3) | {f"000{k}.json": b'{"caption": 1}' for k in range(3)})
    assert told(shard, capsys, 1, "json") == [
        f"0000.json in {shard} has no caption: nothing at json; and so on, of 3 samples"
    ]


def test_options_of_the_other_kind_are_usage_errors(cache: Path, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(1))
    assert main(["verify", str(cache), "--captions", "txt"]) == 2
    assert main(["verify", str(shard), "--first-stage", "assets:vae.safetensors"]) == 2

"""Encoding: the same cache however often and wherever it was interrupted."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm.files
from ldm.data.latents.cache import read_manifest
from ldm.data.latents.encoding import EncodingJob, encode_shards, finish
from ldm.data.latents.shard import map_shard
from ldm.data.sources.shards import Shards, find_tars
from tests.data.tars import picture, samples, write_tar
from tests.tiny import save_part, tiny_vae

SETTINGS = {"first_stage": "f", "resolution": [8, 8], "version": "1"}
MOMENTS = 11  # six batches, and the renames of one quarantine, two shards, the hashes and the manifest


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of seven and five samples; one of the first cannot be read."""
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "x-0.tar", samples(7) | {"0002.png": b"<html>"})
    write_tar(tmp_path / "in" / "x-1.tar", samples(5, 7))
    return tmp_path / "in"


def encode(pictures: torch.Tensor) -> torch.Tensor:
    return pictures[:, [0, 1, 2, 0], ::4, ::4].float()


def job(shards: Path, out: Path, settings: dict[str, Any] = SETTINGS, rank: int = 0, world: int = 1) -> EncodingJob:
    files = find_tars(shards)
    return EncodingJob(files, Shards(files[rank::world], 8), out, settings)


def work(job: EncodingJob, encode: Callable[[torch.Tensor], torch.Tensor] = encode) -> int:
    """How many samples there were to encode."""
    count = sum(encode_shards(job, encode, batch_size=2))
    finish(job)
    return count


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def die_at(moment: int, job: EncodingJob) -> None:
    """Works in a forked child that kills itself before so many batches and renames."""
    child = os.fork()
    if child:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        return
    signal.alarm(60)  # the parent waits for it
    left, replace = moment, os.replace

    def countdown() -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def dying(pictures: torch.Tensor) -> torch.Tensor:
        countdown()
        return encode(pictures)

    def renamed(*paths: Any) -> None:
        countdown()
        replace(*paths)

    try:
        ldm.files.os.replace = renamed  # type: ignore[attr-defined]
        work(job, dying)
    finally:
        os._exit(1)  # never reached by a child that was killed


def test_latents_are_those_of_the_pictures_and_bad_samples_go_to_quarantine(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "out"))
    shard = map_shard(tmp_path / "out" / "x-0.safetensors")
    assert [shard.key(k) for k in range(6)] == ["0000", "0001", "0003", "0004", "0005", "0006"]
    assert shard.moments[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5, 6] and shard.moments.shape == (6, 4, 2, 2)
    (line,) = (tmp_path / "out" / "x-0.quarantine.jsonl").read_text().splitlines()
    assert '"shard": "x-0.tar", "key": "0002", "reason": "0002 in ' in line and "cannot be read" in line
    assert not (tmp_path / "out" / "x-1.quarantine.jsonl").exists()


def test_killed_at_any_moment_it_shows_whole_shards_only_and_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path
) -> None:
    work(job(folder, tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    for moment in range(MOMENTS):
        out = tmp_path / str(moment)
        die_at(moment, job(folder, out))
        left = contents(out) if out.exists() else {}
        assert all(data == whole[name] for name, data in left.items() if not name.endswith(".tmp"))
        work(job(folder, out))
        assert contents(out) == whole


def test_killed_again_and_again_it_gets_on_shard_by_shard(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "whole"))
    for moment in (2, 5, 3, 1, 0, 4):
        die_at(moment, job(folder, tmp_path / "out"))
    work(job(folder, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_shard_is_not_done_again_unless_its_tar_changed(folder: Path, tmp_path: Path) -> None:
    assert [work(job(folder, tmp_path / "out")) for _ in range(2)] == [12, 0]
    write_tar(folder / "x-1.tar", samples(9, 7))
    assert work(job(folder, tmp_path / "out")) == 9


@pytest.mark.parametrize("name", ["x-0.safetensors", "manifest.json", "hashes.npy", "x-1.quarantine.jsonl"])
def test_a_file_of_another_kind_under_a_name_of_the_caches_is_kept(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if name == "x-0.safetensors":
        save_part(out / name, "vae", tiny_vae())  # weights of ldm's
    else:
        (out / name).write_text('{"shards": 3}')
    before = contents(out)
    with pytest.raises(FileExistsError, match=f"{out / name} was not written by ldm encode, .* or give another --out"):
        work(job(folder, out))
    assert contents(out) == before


def test_ranks_share_the_shards_and_the_last_writes_the_manifest_of_one(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "one"))
    second = job(folder, tmp_path / "two", rank=1, world=2)
    assert len(second.shards) == 5 and work(second) == 5  # it does not even index the others' shards
    assert not (tmp_path / "two" / "manifest.json").exists()
    assert work(job(folder, tmp_path / "two", rank=0, world=2)) == 7
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_pictures_go_to_the_bucket_of_their_shape_whole_and_resumable(tmp_path: Path) -> None:
    shapes = {"a": (12, 8), "b": (8, 12), "c": (9, 9), "d": (8, 13), "e": (30, 5)}
    members = {f"{key}.png": picture(k, shape) for k, (key, shape) in enumerate(shapes.items())}
    write_tar(tmp_path / "x.tar", {"bad.png": b"", "bad.txt": b""} | members | {f"{key}.txt": b"" for key in shapes})
    sizes = [(8, 16), (12, 12), (16, 8)]

    def bucketed(out: Path) -> EncodingJob:
        files = find_tars(tmp_path / "x.tar")
        return EncodingJob(files, Shards(files, 12, buckets=sizes), out, SETTINGS)

    assert work(bucketed(tmp_path / "out")) == 6 and work(bucketed(tmp_path / "out")) == 0
    found = {path.stem: map_shard(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))}
    assert {name: [s.key(k) for k in range(len(s.moments))] for name, s in found.items()} == {
        "x.8x16": ["a", "e"], "x.12x12": ["c"], "x.16x8": ["b", "d"]
    }  # fmt: skip
    assert [found[f"x.{h}x{w}"].moments.shape[2:] for h, w in sizes] == [(2, 4), (3, 3), (4, 2)]
    assert found["x.16x8"].moments[:, 0, 0, 0].tolist() == [1, 3]
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["samples"], manifest["quarantined"], len(manifest["shards"])) == (5, 1, 3)
    os.unlink(tmp_path / "out" / "x.16x8.safetensors")
    whole = contents(tmp_path / "out")
    assert work(bucketed(tmp_path / "out")) == 6
    assert whole.items() < contents(tmp_path / "out").items()


def test_latents_that_float16_does_not_hold_go_to_quarantine(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "out"), lambda pictures: encode(pictures) * 1e4)
    assert "not finite" in (tmp_path / "out" / "x-1.quarantine.jsonl").read_text()
    assert map_shard(tmp_path / "out" / "x-1.safetensors").moments.shape[0] == 0


def test_another_first_stage_other_shards_and_two_of_a_name_are_refused(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "out"))
    with pytest.raises(ValueError, match="was encoded with first_stage f, not g"):
        work(job(folder, tmp_path / "out", SETTINGS | {"first_stage": "g"}))
    with pytest.raises(ValueError, match=r"already holds x-1.safetensors, which is not of these"):
        job(folder / "x-0.tar", tmp_path / "out")
    with pytest.raises(ValueError, match="two of the shards are named x-0"):
        twice = find_tars([folder / "x-0.tar", folder / "x-0.tar"])
        EncodingJob(twice, Shards(twice, 8), tmp_path / "out", SETTINGS)

"""Encoding gives the same cache wherever and however often it was interrupted."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm.files
from ldm.data.latents.cache import read_manifest, split_hash
from ldm.data.latents.encoding import encode_shards, finish
from ldm.data.latents.job import EncodingJob, Pending
from ldm.data.latents.shard import map_shard
from ldm.data.sources.shards import Shards, find_tars
from ldm.files import write_json
from tests.data.tars import image_file, samples, write_tar
from tests.tiny import save_part, tiny_vae

SETTINGS = {"first_stage": "f", "resolution": [8, 8], "version": "1"}
MOMENTS = 11  # six batches, and renames of one quarantine, two shards, the hashes and the manifest


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of seven and five samples; one sample of the first is unreadable."""
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "x-0.tar", samples(7) | {"0002.png": b"<html>"})
    write_tar(tmp_path / "in" / "x-1.tar", samples(5, 7))
    return tmp_path / "in"


def encode(images: torch.Tensor) -> torch.Tensor:
    return images[:, [0, 1, 2, 0], ::4, ::4].float()


def job(shards: Path, out: Path, settings: dict[str, Any] = SETTINGS, rank: int = 0, world: int = 1) -> EncodingJob:
    files = find_tars(shards)
    return EncodingJob(files, Shards(files[rank::world], 8), out, settings)


def work(job: EncodingJob, encode: Callable[[torch.Tensor], torch.Tensor] = encode) -> int:
    """Encodes the remaining shards and returns the number of samples in them."""
    count = sum(encode_shards(job, job.pending().shards, encode, batch_size=2))
    finish(job)
    return count


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def die_at(moment: int, job: EncodingJob) -> None:
    """Runs the job in a forked child that kills itself after `moment` batches and renames."""
    child = os.fork()
    if child:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        return
    signal.alarm(60)  # so that the parent never waits forever
    left, replace = moment, os.replace

    def countdown() -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted_encode(images: torch.Tensor) -> torch.Tensor:
        countdown()
        return encode(images)

    def counted_replace(*paths: Any) -> None:
        countdown()
        replace(*paths)

    try:
        ldm.files.os.replace = counted_replace  # type: ignore[attr-defined]
        work(job, counted_encode)
    finally:
        os._exit(1)  # never reached by a child that was killed


def test_latents_match_their_images_and_unreadable_samples_are_quarantined(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "out"))
    shard = map_shard(tmp_path / "out" / "x-0.safetensors")
    assert [shard.key(k) for k in range(6)] == ["0000", "0001", "0003", "0004", "0005", "0006"]
    assert shard.moments[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5, 6] and shard.moments.shape == (6, 4, 2, 2)
    (line,) = (tmp_path / "out" / "x-0.quarantine.jsonl").read_text().splitlines()
    assert '"shard": "x-0.tar", "key": "0002", "reason": "0002 in ' in line and "cannot be read" in line
    assert not (tmp_path / "out" / "x-1.quarantine.jsonl").exists()


def test_a_run_killed_at_any_moment_leaves_complete_shards_and_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "uninterrupted"))
    uninterrupted = contents(tmp_path / "uninterrupted")
    for moment in range(MOMENTS):
        out = tmp_path / str(moment)
        die_at(moment, job(folder, out))
        left = contents(out) if out.exists() else {}
        assert all(data == uninterrupted[name] for name, data in left.items() if not name.endswith(".tmp"))
        work(job(folder, out))
        assert contents(out) == uninterrupted


def test_a_run_killed_repeatedly_still_completes_shard_by_shard(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "uninterrupted"))
    for moment in (2, 5, 3, 1, 0, 4):
        die_at(moment, job(folder, tmp_path / "out"))
    work(job(folder, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def test_an_encoded_shard_is_skipped_unless_its_tar_changed(folder: Path, tmp_path: Path) -> None:
    assert [work(job(folder, tmp_path / "out")) for _ in range(2)] == [12, 0]
    write_tar(folder / "x-1.tar", samples(9, 7))
    assert work(job(folder, tmp_path / "out")) == 9


def test_a_new_cache_has_the_mixed_split_and_an_earlier_one_keeps_its_own(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert split_hash(manifest) == "mixed"
    del manifest["split_hash"]
    write_json(tmp_path / "out" / "manifest.json", manifest)
    write_tar(folder / "x-1.tar", samples(9, 7))
    work(job(folder, tmp_path / "out"))
    assert split_hash(read_manifest(tmp_path / "out")) == "crc32"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "a part of the header": lambda data: data[:40],
    "nothing": lambda data: b"",
    "a changed byte of the latents": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "a changed digit of the header": lambda data: data.replace(b'\\"samples\\": 5', b'\\"samples\\": 4'),
    "a changed setting in the header": lambda data: data.replace(b'_stage\\": \\"f', b'_stage\\": \\"g'),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_shard_is_found_and_only_it_is_encoded_again(
    folder: Path, tmp_path: Path, damage: str, finished: bool
) -> None:
    out = tmp_path / "out"
    work(job(folder, out))
    before = contents(out)
    if not finished:
        (out / "manifest.json").unlink()
        if "changed setting" in damage:  # without a manifest, only the header says what the settings were
            return
    path = out / "x-1.safetensors"
    path.write_bytes(DAMAGE[damage](before[path.name]))
    assert path.read_bytes() != before[path.name]
    assert job(folder, out).pending() == Pending([1], [1])
    assert work(job(folder, out)) == 5 and contents(out) == before


@pytest.mark.parametrize("name", ["manifest.json", "hashes.npy", "x-0.quarantine.jsonl"])
def test_a_truncated_list_of_a_cache_is_written_again(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    work(job(folder, out))
    before = contents(out)
    for length in (0, len(before[name]) // 2):
        (out / name).write_bytes(before[name][:length])
        work(job(folder, out))
        assert {**contents(out), name: b""} == {**before, name: b""}
        assert contents(out)[name] == before[name]


def test_a_rank_waits_for_the_one_that_encodes_a_damaged_shard_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work(job(folder, out))
    before = contents(out)
    (out / "x-1.safetensors").write_bytes(before["x-1.safetensors"][:-1])
    assert finish(job(folder, out, rank=0, world=2)) is None
    assert work(job(folder, out, rank=1, world=2)) == 5 and contents(out) == before


@pytest.mark.parametrize("name", ["x-0.safetensors", "manifest.json", "hashes.npy", "x-1.quarantine.jsonl"])
def test_encoding_never_replaces_a_file_that_is_not_part_of_a_cache(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if name == "x-0.safetensors":
        save_part(out / name, "vae", tiny_vae())  # weights written by ldm
    else:
        (out / name).write_text('{"shards": 3}')
    before = contents(out)
    with pytest.raises(FileExistsError, match=f"{out / name} was not written by ldm encode, .* or give another --out"):
        work(job(folder, out))
    assert contents(out) == before


def test_ranks_split_the_shards_and_the_last_one_writes_the_manifest(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "one"))
    second = job(folder, tmp_path / "two", rank=1, world=2)
    assert len(second.shards) == 5 and work(second) == 5  # the shards of other ranks are not even indexed
    assert not (tmp_path / "two" / "manifest.json").exists()
    assert work(job(folder, tmp_path / "two", rank=0, world=2)) == 7
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_images_are_encoded_in_the_bucket_nearest_to_their_shape(tmp_path: Path) -> None:
    shapes = {"a": (12, 8), "b": (8, 12), "c": (9, 9), "d": (8, 13), "e": (30, 5)}
    members = {f"{key}.png": image_file(k, shape) for k, (key, shape) in enumerate(shapes.items())}
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
    before = contents(tmp_path / "out")
    assert work(bucketed(tmp_path / "out")) == 6
    assert before.items() < contents(tmp_path / "out").items()


def test_latents_that_overflow_in_float16_are_quarantined(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "out"), lambda images: encode(images) * 1e4)
    assert "not finite" in (tmp_path / "out" / "x-1.quarantine.jsonl").read_text()
    assert map_shard(tmp_path / "out" / "x-1.safetensors").moments.shape[0] == 0


def test_another_first_stage_other_shards_and_duplicate_names_are_refused(folder: Path, tmp_path: Path) -> None:
    work(job(folder, tmp_path / "out"))
    with pytest.raises(ValueError, match="was encoded with first_stage f, not g"):
        work(job(folder, tmp_path / "out", SETTINGS | {"first_stage": "g"}))
    with pytest.raises(ValueError, match=r"already has x-1.safetensors, which does not belong to these"):
        job(folder / "x-0.tar", tmp_path / "out")
    with pytest.raises(ValueError, match="two of the shards are named x-0"):
        twice = find_tars([folder / "x-0.tar", folder / "x-0.tar"])
        EncodingJob(twice, Shards(twice, 8), tmp_path / "out", SETTINGS)

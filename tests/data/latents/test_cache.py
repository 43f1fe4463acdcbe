"""Cached latents are read as they were written, and a cache of another model is refused."""

import pickle
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm.data.latents.cache import (
    FORMAT,
    CachedLatents,
    Decoded,
    Frozen,
    read_manifest,
    undecoded,
)
from ldm.data.latents.shard import map_shard, write_shard
from ldm.data.mapped import read_record
from ldm.data.sources.captions import choose_caption
from ldm.files import write_json
from tests.meta_device import Waits
from tests.tiny import tiny_vae

SETTINGS = {"first_stage": "a" * 64, "scale": 0.5, "resolution": [16, 16]}
CAPTIONS = ["a red circle", "", "café \N{ROCKET}"]


def stage(fingerprint: str = "a" * 64, scale: float = 0.5) -> Frozen:
    return SimpleNamespace(source={"fingerprint": fingerprint}, network=SimpleNamespace(config={"scale": scale}))


def moments(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 8, 4, 2)).astype(np.float16)


def write_cache(folder: Path, counts: tuple[int, ...] = (3, 0, 2)) -> Path:
    shards = []
    for k, count in enumerate(counts):
        keys = [f"{k}-{row}" for row in range(count)]
        write_shard(
            folder / f"s{k}.safetensors",
            moments(count, k),
            keys,
            [[caption] for caption in CAPTIONS[:count]] if count <= 3 else [["x"]] * count,
            {"settings": SETTINGS},
        )
        record = read_record(folder / f"s{k}.safetensors")
        shards.append({"name": f"s{k}", "samples": count, "sha256": record["sha256"]})
    write_json(
        folder / "manifest.json",
        {"format": FORMAT, "settings": SETTINGS, "samples": sum(counts), "quarantined": 0, "shards": shards},
    )
    return folder


def test_samples_are_numbered_across_all_shards(tmp_path: Path) -> None:
    latents = CachedLatents(write_cache(tmp_path), stage(), (16, 16))
    assert len(latents) == 5
    for index, (shard, row) in enumerate([(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]):
        sample = latents[7, index]
        assert torch.equal(sample.pop("moments"), torch.from_numpy(moments(3, shard)[: (3, 0, 2)[shard]][row]))  # type: ignore[misc]
        assert sample == {"caption": CAPTIONS[row], "key": f"{shard}-{row}", "id": index}
        assert latents.key(index) == sample["key"]


def test_latents_in_memory_equal_mapped_ones_and_need_no_files(tmp_path: Path) -> None:
    mapped = CachedLatents(write_cache(tmp_path), stage(), (16, 16))
    loaded = CachedLatents(tmp_path, stage(), (16, 16), load="memory")
    for index in range(5):
        one, other = mapped[index], loaded[index]
        assert torch.equal(one.pop("moments"), other.pop("moments")) and one == other  # type: ignore[misc]
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert [sample["key"] for sample in loaded] == ["0-0", "0-1", "0-2", "2-0", "2-1"]  # type: ignore[attr-defined]


def test_a_cache_larger_than_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.data.latents.cache.available_memory", lambda: 500)
    with pytest.raises(ValueError, match=r"needs .* GiB of memory, but only 0.0 GiB is available: set data.load"):
        CachedLatents(write_cache(tmp_path), stage(), (16, 16), load="memory")
    with pytest.raises(ValueError, match="expected mapped or memory"):
        CachedLatents(tmp_path, stage(), (16, 16), load="disk")  # type: ignore[arg-type]


def test_hashes_are_read_from_their_file_or_computed_from_the_keys(tmp_path: Path) -> None:
    latents = CachedLatents(write_cache(tmp_path), stage(), (16, 16))
    expected = [zlib.crc32(latents.key(index).encode()) for index in range(5)]
    assert latents.hashes.tolist() == expected
    np.save(tmp_path / "hashes.npy", np.arange(5, dtype=np.uint32))
    assert latents.hashes.tolist() == [0, 1, 2, 3, 4]
    np.save(tmp_path / "hashes.npy", np.arange(4, dtype=np.uint32))
    with pytest.raises(ValueError, match="has 4 hashes, but the cache has 5 samples"):
        latents.hashes  # noqa: B018


def test_a_cache_of_several_sizes_gives_the_runs_size_or_all_if_bucketed(tmp_path: Path) -> None:
    write_cache(tmp_path)
    manifest = read_manifest(tmp_path)
    for shard, size in zip(manifest["shards"], ((8, 32), (16, 16), (16, 16)), strict=True):
        shard["size"] = size
    write_json(tmp_path / "manifest.json", manifest)
    bucketed = CachedLatents(tmp_path, stage(), (16, 16), bucketed=True)
    assert len(bucketed) == 5 and bucketed.buckets.tolist() == [0, 0, 0, 1, 1]
    np.save(tmp_path / "hashes.npy", bucketed.hashes)
    with pytest.warns(UserWarning, match=rf"^only the 2 samples of size 16x16 are used, of 5 in {tmp_path}; set data"):
        squares = CachedLatents(tmp_path, stage(), (16, 16))
    with pytest.warns(UserWarning, match=rf"^only .* used, of 5 in {tmp_path} as references, because generated images"):
        CachedLatents(tmp_path, stage(), (16, 16), purpose="reference")
    assert [squares.key(index) for index in range(2)] == ["2-0", "2-1"]
    assert squares.hashes.tolist() == bucketed.hashes[3:].tolist()


def test_all_captions_are_stored_and_each_draw_gets_one(tmp_path: Path) -> None:
    write_cache(tmp_path, (3,))
    several = [["a"], ["b", "c", "d"], ["e", "f"]]
    write_shard(tmp_path / "s0.safetensors", moments(3), ["x", "y", "z"], several, {"settings": SETTINGS})
    assert [map_shard(tmp_path / "s0.safetensors").captions_of(row) for row in range(3)] == several
    for load in ("mapped", "memory"):
        latents = CachedLatents(tmp_path, stage(), (16, 16), load=load, seed=3)  # type: ignore[arg-type]
        for row, captions in enumerate(several):
            chosen = [latents[draw, row]["caption"] for draw in range(20)]
            assert chosen == [choose_caption(captions, 3, row, draw) for draw in range(20)] and {*chosen} == {*captions}


def test_a_cached_data_set_is_pickled_without_its_latents(tmp_path: Path) -> None:
    latents = CachedLatents(write_cache(tmp_path, (3,)), stage(), (16, 16))
    before = latents[0]["moments"]
    data = pickle.dumps(latents)
    assert len(data) < 1000 and torch.equal(pickle.loads(data)[0]["moments"], before)


@pytest.mark.parametrize(
    ("first_stage", "size", "message"),
    [
        (stage("b" * 64), (16, 16), "was encoded with first_stage aaaaaaaaaaaa, not bbbbbbbbbbbb"),
        (stage(scale=0.25), (16, 16), "was encoded with scale 0.5, not 0.25"),
        (stage(), (32, 32), r"was encoded with resolution \[16, 16\], not \[32, 32\]"),
    ],
)
def test_a_cache_of_another_first_stage_scale_or_size_is_refused(
    first_stage: Frozen, size: tuple[int, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        CachedLatents(write_cache(tmp_path), first_stage, size)


def test_a_cache_in_an_older_format_is_refused(tmp_path: Path) -> None:
    write_json(write_cache(tmp_path) / "manifest.json", read_manifest(tmp_path) | {"format": FORMAT - 1})
    with pytest.raises(ValueError, match=rf"format {FORMAT - 1}, .* reads only {FORMAT}\); run ldm encode again"):
        CachedLatents(tmp_path, stage(), (16, 16))


def test_incomplete_and_empty_caches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        CachedLatents(tmp_path, stage(), (16, 16))
    with pytest.raises(ValueError, match="has no samples"):
        CachedLatents(write_cache(tmp_path, (0,)), stage(), (16, 16))


@pytest.mark.parametrize("length", [4, 100, 1000])
def test_a_truncated_shard_of_latents_is_refused(length: int, tmp_path: Path) -> None:
    path = write_cache(tmp_path, (100,)) / "s0.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="corrupt"):
        CachedLatents(tmp_path, stage(), (16, 16))[0]


def test_decoding_gives_the_first_stages_images_of_the_means() -> None:
    vae, pair = tiny_vae(), torch.randn(8, 4, 4)
    dataset: Any = [{"moments": pair, "caption": "x"}]
    decoded = Decoded(dataset, SimpleNamespace(source={}, network=vae))[0]
    with torch.no_grad():
        expected = vae.decode((pair[None, :4] - vae.shift) * vae.scale)[0]
    assert decoded["caption"] == "x" and decoded["image"].dtype == torch.uint8
    torch.testing.assert_close(decoded["image"].float(), (expected * 127.5 + 127.5).clamp(0, 255), atol=0.51, rtol=0)


class Counting:
    """A first stage that records the batch sizes that it decodes."""

    def __init__(self) -> None:
        self.vae, self.sizes = tiny_vae(), list[int]()

    def to(self, device: torch.device) -> "Counting":
        self.vae.to(device)
        return self

    def latents(self, moments: torch.Tensor) -> torch.Tensor:
        return self.vae.latents(moments)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(latents))
        return self.vae.decode(latents)


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [1, 1, 1]), ("meta", [3])])
def test_a_batch_of_latents_is_decoded_at_once_on_a_gpu_and_image_by_image_on_a_cpu(
    device: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.data.latents.cache.to_uint8", lambda images: images.byte())  # it looks for NaN
    dataset: Any = [{"moments": torch.randn(8, 4, 4), "caption": str(k)} for k in range(4)]
    decoded = Decoded(dataset, SimpleNamespace(source={}, network=(network := Counting())), torch.device(device))
    with Waits():
        samples = decoded.__getitems__([3, 0, 2])
    assert [sample["caption"] for sample in samples] == ["3", "0", "2"]
    assert network.sizes == sizes and {sample["image"].device.type for sample in samples} == {"cpu"}


def test_captions_of_decoded_latents_are_read_without_decoding() -> None:
    dataset: Any = [{"moments": torch.randn(8, 4, 4), "caption": "x"}]
    assert undecoded(Decoded(dataset, SimpleNamespace(source={}, network=None)))[0]["caption"] == "x"
    assert undecoded(dataset) is dataset

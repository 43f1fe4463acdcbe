"""Tests of `ldm info CACHE`, which describes a cache and lists problems found at a glance."""

from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.commands.info.command import describe
from ldm.data.latents.cache import FORMAT
from ldm.data.latents.shard import write_shard
from ldm.files import write_json
from ldm.weights.parts import first_stage
from tests.data.latents.test_cache import SETTINGS, moments, write_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache")


def test_a_cache_is_described(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(cache)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {name: value.strip() for name, value in lines.items()}
    sizes = [path.stat().st_size for path in cache.iterdir()]
    assert lines["folder"] == f"{cache} ({sum(sizes) / 2**20:.1f} MiB in {len(sizes)} files)"
    assert lines["kind"] == "a cache of latents" and lines["samples"] == "5 in 3 shards"
    assert lines["latents"] == "4 x 4 x 2, mean and log-variance in float16, 128 bytes each"
    assert lines["first stage"] == "a" * 12 and lines["scale"] == "0.5" and lines["images"] == "16x16"
    assert lines["captions"] == "txt, or else json" and lines["problems"].startswith("none at a glance")


def test_the_shipped_autoencoder_is_recognised_by_its_fingerprint(tmp_path: Path) -> None:
    fingerprint = first_stage("assets:vae.safetensors").source["fingerprint"]
    write_shard(
        tmp_path / "s.safetensors", moments(2), ["a", "b"], [[""], [""]], {"settings": {"first_stage": fingerprint}}
    )
    assert describe(str(tmp_path))["first stage"] == f"{fingerprint[:12]} (assets:vae.safetensors)"


def test_quarantined_samples_are_counted(cache: Path) -> None:
    shards = [{"name": f"s{k}", "samples": n, "quarantined": 2, "sha256": ""} for k, n in enumerate((3, 0, 2))]
    write_json(cache / "manifest.json", {"format": FORMAT, "settings": SETTINGS, "samples": 5, "shards": shards})
    assert describe(str(cache))["samples"] == "5 in 3 shards; 6 could not be used, see *.quarantine.jsonl"


def test_problems_are_found_without_reading_latents(cache: Path) -> None:
    (cache / "s1.safetensors").unlink()
    write_shard(cache / "s2.safetensors", moments(1), ["a"], [[""]], {"settings": {}})
    write_shard(cache / "t.safetensors", moments(1), ["a"], [[""]], {"settings": SETTINGS})
    problems = describe(str(cache))["problems"]
    for words in ("t.safetensors is not in the manifest", "s1.safetensors is in the manifest but does not exist"):
        assert words in problems
    assert "with settings that differ" in problems and "and 1 more, see ldm verify" in problems


def test_a_truncated_shard_is_found(cache: Path) -> None:
    data = (cache / "s2.safetensors").read_bytes()
    (cache / "s2.safetensors").write_bytes(data[:-10])
    assert "s2.safetensors is truncated or corrupt" in describe(str(cache))["problems"]


def test_an_incomplete_cache_is_described_with_the_remedy(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    lines = describe(str(cache))
    assert lines["kind"] == "an incomplete cache of latents" and lines["samples"] == "5 in 3 shards"
    assert lines["problems"] == "ldm encode has not finished; run it again with the same arguments"


def test_a_corrupt_manifest_is_reported_in_one_sentence(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "manifest.json").write_text("{")
    assert main(["info", str(cache)]) == 1
    assert "manifest.json is not a manifest of cached latents" in capsys.readouterr().err

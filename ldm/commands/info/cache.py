"""Describes a cache of latents for `ldm info`, from its manifest and the headers of its shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.data.latents.cache import MANIFEST, read_manifest
from ldm.data.latents.shard import map_shard
from ldm.data.latents.verification import cache_problems
from ldm.data.mapped import read_record
from ldm.weights.parts import first_stage

SHIPPED = "assets:vae.safetensors"
MAX_PROBLEMS = 3  # how many problems are printed; the others are counted


def is_cache(folder: Path) -> bool:
    """Returns whether `ldm encode` has written into the folder, complete or not."""
    return (folder / MANIFEST).is_file() or any(_is_shard(path) for path in folder.glob("*.safetensors"))


def _is_shard(path: Path) -> bool:
    try:
        return "settings" in read_record(path)
    except ValueError:
        return False


def describe_cache(folder: Path) -> dict[str, str]:
    """Returns human-readable lines, name → value. Raises ValueError for a corrupt manifest."""
    sizes = [path.stat().st_size for path in folder.iterdir()]
    lines = {"folder": f"{folder} ({sum(sizes) / 2**20:,.1f} MiB in {len(sizes)} files)"}
    return lines | (_complete(folder) if (folder / MANIFEST).is_file() else _partial(folder))


def _complete(folder: Path) -> dict[str, str]:
    manifest = read_manifest(folder)
    problems = [problem for _, problems in cache_problems(folder, headers_only=True) for problem in problems]
    return {
        **_counts("a cache of latents", manifest["shards"]),
        **_moments(folder, manifest["shards"]),
        **_settings(manifest["settings"]),
        "problems": _first(problems) or "none at a glance; ldm verify reads all of it",
    }


def _partial(folder: Path) -> dict[str, str]:
    records = [read_record(path) for path in sorted(folder.glob("*.safetensors")) if _is_shard(path)]
    lines = _counts("an incomplete cache of latents", records) | _settings(records[0]["settings"])
    return lines | {"problems": "ldm encode has not finished; run it again with the same arguments"}


def _counts(kind: str, shards: Sequence[dict[str, Any]]) -> dict[str, str]:
    samples, bad = (sum(shard.get(name, 0) for shard in shards) for name in ("samples", "quarantined"))
    quarantined = f"; {bad:,} could not be used, see *.quarantine.jsonl" if bad else ""
    return {"kind": kind, "samples": f"{samples:,} in {len(shards):,} shards{quarantined}"}


def _moments(folder: Path, shards: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Describes the latents by the first shard with samples; `cache_problems` compares the others to the manifest."""
    files = (folder / f"{shard['name']}.safetensors" for shard in shards if shard["samples"])
    for path in files:
        if path.is_file():
            moments = map_shard(path).moments
            channels, height, width = moments.shape[1:]
            size = f"{channels // 2} x {height} x {width}"
            return {"latents": f"{size}, mean and log-variance in {moments.dtype}, {moments[0].nbytes:,} bytes each"}
    return {}


def _settings(recorded: dict[str, Any]) -> dict[str, str]:
    settings = {name: value for name, value in recorded.items() if name != "dtype"}  # in the line "latents"
    fingerprint = str(settings.pop("first_stage", "unknown"))
    shipped = fingerprint == first_stage(SHIPPED).source["fingerprint"]
    size = "x".join(map(str, settings.pop("resolution", [])))
    version, captions = settings.pop("version", "unknown"), ", ".join(settings.pop("captions", []))
    text = {name: settings.pop(name) for name in [*settings] if name.startswith("text_")}
    return {
        "first stage": fingerprint[:12] + (f" ({SHIPPED})" if shipped else ""),
        "scale": str(settings.pop("scale", "unknown")),
        "images": ", ".join([size, *(f"{name}={value}" for name, value in settings.items())]),
        "captions": captions or "txt, or else json",
        **({"text encoder": f"{text['text_encoder'][:12]}, its states in {text['text_dtype']}"} if text else {}),
        "encoded by": f"ldm {version}",
    }


def _first(problems: list[str]) -> str:
    more = len(problems) - MAX_PROBLEMS
    return "; ".join(problems[:MAX_PROBLEMS]) + (f"; and {more} more, see ldm verify" if more > 0 else "")

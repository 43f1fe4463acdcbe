"""What is wrong with a cache of latents or with shards of pictures, sentence by sentence, at the speed of the disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.cache import ARRAYS, MANIFEST, check_settings, digest, map_shard, read_manifest
from ldm.data.shard_index import scan
from ldm.data.storage import File


def cache_problems(
    cache: Path, first_stage: str | None = None, glance: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """(file, problems) of the manifest and then of each shard; `first_stage` is the fingerprint asked for.

    A `glance` reads the headers of the shards only, and so sees neither changed bytes nor NaN.
    """
    try:
        manifest = read_manifest(cache)
    except (OSError, ValueError) as error:
        yield MANIFEST, [str(error)]
        return
    yield MANIFEST, list(_of_the_whole(cache, manifest, first_stage))
    for shard in manifest["shards"]:
        path = cache / f"{shard['name']}.safetensors"
        yield shard["name"], list(_of_a_shard(path, shard, manifest["settings"], glance))


def _of_the_whole(cache: Path, manifest: dict[str, Any], first_stage: str | None) -> Iterator[str]:
    names = {shard["name"] for shard in manifest["shards"]}
    for path in sorted(cache.glob("*.safetensors")):
        if path.stem not in names:
            yield f"{path} is not in the manifest: it is stale; run ldm encode again"
    total = sum(shard["samples"] for shard in manifest["shards"])
    if total != manifest["samples"]:
        yield f"{cache / MANIFEST} counts {manifest['samples']} samples, its shards {total}"
    if first_stage is not None:
        try:
            check_settings(cache, manifest["settings"], {"first_stage": first_stage})
        except ValueError as error:
            yield str(error)


def _of_a_shard(path: Path, entry: dict[str, Any], settings: dict[str, Any], glance: bool) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is in the manifest but not there; run ldm encode again"
        return
    try:
        shard = map_shard(path)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if shard.record.get("settings") != settings:
        yield f"{path} was encoded with other settings than the manifest's; encode the shards into a new folder"
    counts = {len(shard.moments), len(shard.key_ends), len(shard.caption_groups), entry["samples"]}
    if len(counts) > 1:
        yield f"{path} holds {len(shard.moments)} latents, {len(shard.key_ends)} keys and the captions of " + (
            f"{len(shard.caption_groups)} samples, where the manifest says {entry['samples']}"
        )
    if glance:
        return
    if digest({name: getattr(shard, name) for name in ARRAYS}) != entry["sha256"]:
        yield f"{path} does not have the checksum of the manifest: it was changed or damaged; delete it, encode again"
    step = max(1, (1 << 24) // max(1, shard.moments[:1].size))
    bad = sum(
        int((~np.isfinite(shard.moments[k : k + step].reshape(-1, shard.moments[0].size)).all(1)).sum())
        for k in range(0, len(shard.moments), step)
    )
    if bad:
        yield f"{path} holds {bad} latents with NaN or infinity; delete it and encode again"


def shard_problems(tar: File) -> list[str]:
    """A tar that is cut, samples without picture or caption, empty pictures; pictures are not decoded."""
    try:
        index = scan(tar)
    except (OSError, ValueError) as error:
        return [str(error)]
    told = [f"{tar} is cut short or damaged: {loss}" for loss in index.losses.values()]
    keys = [index.key(row) for row in range(len(index))]
    there = index.spans[..., 0] >= 0
    for found, what in ((there[:, 0], "picture"), (there[:, 1:].any(1), "caption (.txt or .json)")):
        if not found.all():
            told.append(f"{tar} has no {what} for {_some([keys[row] for row in np.flatnonzero(~found)])}")
    empty = np.flatnonzero(there[:, 0] & (index.spans[:, 0, 1] == 0))
    if len(empty):
        told.append(f"{tar} holds a picture of 0 bytes for {_some([keys[row] for row in empty])}")
    return told


def _some(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")

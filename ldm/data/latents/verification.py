"""What is wrong with a cache of latents or with shards of pictures, sentence by sentence, at the speed of the disk."""

from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.latents.cache import MANIFEST, check_settings, read_manifest
from ldm.data.latents.shard import digest, map_shard
from ldm.data.sources.captions import Captions, Text
from ldm.data.sources.shard_index import Index, scan
from ldm.data.sources.storage import File, summary


def cache_problems(
    cache: Path, first_stage: str | None = None, headers_only: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """(file, problems) of the manifest and then of each shard; `first_stage` is the fingerprint asked for.

    A `headers_only` reads the headers of the shards only, and so sees neither changed bytes nor NaN.
    """
    try:
        manifest = read_manifest(cache)
    except (OSError, ValueError) as error:
        yield MANIFEST, [str(error)]
        return
    yield MANIFEST, list(_of_the_whole(cache, manifest, first_stage))
    for shard in manifest["shards"]:
        path = cache / f"{shard['name']}.safetensors"
        yield shard["name"], list(_of_a_shard(path, shard, manifest["settings"], headers_only))


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


def _of_a_shard(path: Path, entry: dict[str, Any], settings: dict[str, Any], headers_only: bool) -> Iterator[str]:
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
    if headers_only:
        return
    if digest(shard.arrays) != entry["sha256"]:
        yield f"{path} does not have the checksum of the manifest: it was changed or damaged; delete it, encode again"
    for name, what in (("moments", "latents"), ("states", "captions' states")):
        if bad := _not_finite(shard.arrays.get(name)):
            yield f"{path} holds {bad} {what} with NaN or infinity; delete it and encode again"


def _not_finite(rows: np.ndarray | None) -> int:
    """How many, read a part at a time."""
    if rows is None or not rows.size:
        return 0
    step = max(1, (1 << 24) // rows[0].size)
    parts = (rows[k : k + step].reshape(-1, rows[0].size) for k in range(0, len(rows), step))
    return sum(int((~np.isfinite(part).all(1)).sum()) for part in parts)


def shard_problems(tars: Sequence[File], captions: Captions) -> Iterator[tuple[str, list[str]]]:
    """(tar, problems) of each: whether it is cut, and what its samples lack; pictures are not decoded.

    Captions are read as training reads them, and a place of captions that is in none of the tars is told last.
    """
    present: set[str] = set()
    for number, tar in enumerate(tars, 1):
        problems = []
        try:
            index = scan(tar, captions.extensions)
            present.update(compress(captions.extensions, index.present[1:]))
            problems += [*_of_members(tar, index, captions), *_of_texts(tar, index, captions)]
            if number == len(tars):
                captions.check(present, summary(tars))
        except (OSError, ValueError) as error:
            problems.append(str(error))
        yield tar.name, problems


def _of_members(tar: File, index: Index, captions: Captions) -> Iterator[str]:
    yield from (f"{tar} is cut short or damaged: {loss}" for loss in index.losses.values())
    keys = [index.key(row) for row in range(len(index))]
    there = index.spans[..., 0] >= 0
    places = " or ".join(f".{extension}" for extension in captions.extensions)
    for found, what in ((there[:, 0], "picture"), (there[:, 1:].any(1), f"caption ({places})")):
        if not found.all():
            yield f"{tar} has no {what} for {_some([keys[row] for row in np.flatnonzero(~found)])}"
    empty = np.flatnonzero(there[:, 0] & (index.spans[:, 0, 1] == 0))
    if len(empty):
        yield f"{tar} holds a picture of 0 bytes for {_some([keys[row] for row in empty])}"


def _of_texts(tar: File, index: Index, captions: Captions) -> Iterator[str]:
    reasons = tar.with_retries(lambda: _unreadable(tar, index, captions))
    if reasons:
        yield reasons[0] + (f"; and so on, of {len(reasons)} samples" if len(reasons) > 1 else "")


def _unreadable(tar: File, index: Index, captions: Captions) -> list[str]:
    """Why captions cannot be read, which is done as they lie: in object storage a request for each would take long."""
    reasons = []
    with tar.open() as file:
        for row in range(len(index)):
            texts = []
            for extension, (offset, size) in index.texts(row, captions):
                file.seek(offset)
                texts.append(Text(extension, file.read(size), f"{index.key(row)}.{extension} in {tar}"))
            try:
                if texts:
                    captions.read(texts)
            except ValueError as error:
                reasons.append(str(error))
    return reasons


def _some(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")

"""Finds problems in a cache of latents or in shards of images, each described by a sentence."""

from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.latents.cache import HASHES, MANIFEST, check_settings, read_manifest
from ldm.data.latents.shard import AGAIN, digest, key_hashes, map_shard
from ldm.data.sources.captions import Captions, Text
from ldm.data.sources.shard_index import Index, scan
from ldm.data.sources.storage import File, summary


def cache_problems(
    cache: Path, first_stage: str | None = None, headers_only: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Yields (file, problems) for the manifest and then for each shard; `first_stage` is the expected fingerprint.

    With `headers_only` only the shards' headers are read, so changed bytes and NaN are not detected.
    """
    try:
        manifest = read_manifest(cache)
    except (OSError, ValueError) as error:
        yield MANIFEST, [str(error)]
        return
    problems = [*_manifest_problems(cache, manifest, first_stage)]
    if not headers_only:
        problems += _hash_problems(cache, [shard["name"] for shard in manifest["shards"]])
    yield MANIFEST, problems
    for shard in manifest["shards"]:
        path = cache / f"{shard['name']}.safetensors"
        yield shard["name"], list(_latents_problems(path, shard, manifest["settings"], headers_only))


def _manifest_problems(cache: Path, manifest: dict[str, Any], first_stage: str | None) -> Iterator[str]:
    names = {shard["name"] for shard in manifest["shards"]}
    for path in sorted(cache.glob("*.safetensors")):
        if path.stem not in names:
            yield f"{path} is not in the manifest, so it is stale; run ldm encode again"
    total = sum(shard["samples"] for shard in manifest["shards"])
    if total != manifest["samples"]:
        yield f"{cache / MANIFEST} counts {manifest['samples']} samples, but its shards {total}; run ldm encode again"
    if first_stage is not None:
        try:
            check_settings(cache, manifest["settings"], {"first_stage": first_stage})
        except ValueError as error:
            yield str(error)


def _hash_problems(cache: Path, names: list[str]) -> Iterator[str]:
    """Yields a problem if hashes.npy, by which samples are split, is not of the keys in the shards."""
    path = cache / HASHES
    try:
        expected = key_hashes(cache, names) if path.is_file() else None
    except (OSError, ValueError):  # reported with the shard
        return
    try:
        wrong = expected is not None and not np.array_equal(np.load(path, allow_pickle=False), expected)
    except (EOFError, OSError, ValueError):
        wrong = True
    if wrong:
        yield f"{path} does not match the keys in the shards; run ldm encode again, which writes it again"


def _latents_problems(path: Path, entry: dict[str, Any], settings: dict[str, Any], headers_only: bool) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is in the manifest but does not exist; run ldm encode again"
        return
    try:
        shard = map_shard(path)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if shard.record.get("settings") != settings:
        yield f"{path} was encoded with settings that differ from the manifest's; encode the shards into a new folder"
    counts = {len(shard.moments), len(shard.key_ends), len(shard.caption_groups), entry["samples"]}
    if len(counts) > 1:
        yield (
            f"{path} has {len(shard.moments)} latents, {len(shard.key_ends)} keys and the captions of "
            f"{len(shard.caption_groups)} samples, but the manifest lists {entry['samples']}; run ldm encode again"
        )
    if headers_only:
        return
    if digest(shard.arrays) != entry["sha256"]:
        yield f"{path} does not match its checksum in the manifest, so it was changed or is corrupt; {AGAIN}"
    for name, description in (("moments", "latents"), ("states", "caption states")):
        if bad := _count_not_finite(shard.arrays.get(name)):
            yield f"{path} has {bad} {description} with NaN or infinity; delete it and run ldm encode again"


def _count_not_finite(rows: np.ndarray | None) -> int:
    """Counts the rows with NaN or infinity, in chunks to bound memory."""
    if rows is None or not rows.size:
        return 0
    step = max(1, (1 << 24) // rows[0].size)
    chunks = (rows[k : k + step].reshape(-1, rows[0].size) for k in range(0, len(rows), step))
    return sum(int((~np.isfinite(chunk).all(1)).sum()) for chunk in chunks)


def shard_problems(tars: Sequence[File], captions: Captions) -> Iterator[tuple[str, list[str]]]:
    """Yields (tar, problems) for each tar: truncation, and members that its samples lack. Images are not decoded.

    Captions are read as in training. A caption source that none of the tars has is reported with the last tar.
    """
    present: set[str] = set()
    for number, tar in enumerate(tars, 1):
        problems = []
        try:
            index = scan(tar, captions.extensions)
            present.update(compress(captions.extensions, index.present[1:]))
            problems += [*_member_problems(tar, index, captions), *_caption_problems(tar, index, captions)]
            if number == len(tars):
                captions.check(present, summary(tars))
        except (OSError, ValueError) as error:
            problems.append(str(error))
        yield tar.name, problems


def _member_problems(tar: File, index: Index, captions: Captions) -> Iterator[str]:
    yield from (f"{tar} is truncated or corrupt: {loss}" for loss in index.losses.values())
    keys = [index.key(row) for row in range(len(index))]
    present = index.spans[..., 0] >= 0
    extensions = " or ".join(f".{extension}" for extension in captions.extensions)
    for found, member in ((present[:, 0], "image"), (present[:, 1:].any(1), f"caption ({extensions})")):
        if not found.all():
            yield f"{tar} has no {member} for {_some([keys[row] for row in np.flatnonzero(~found)])}"
    empty = np.flatnonzero(present[:, 0] & (index.spans[:, 0, 1] == 0))
    if len(empty):
        yield f"{tar} has an image of 0 bytes for {_some([keys[row] for row in empty])}"


def _caption_problems(tar: File, index: Index, captions: Captions) -> Iterator[str]:
    reasons = tar.with_retries(lambda: _unreadable_captions(tar, index, captions))
    if reasons:
        yield reasons[0] + (f" (the first of {len(reasons)} samples with unreadable captions)" if reasons[1:] else "")


def _unreadable_captions(tar: File, index: Index, captions: Captions) -> list[str]:
    """Returns why captions cannot be read, one reason per sample.

    The tar is read sequentially, because one request per caption would be slow in object storage.
    """
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


def _some(keys: list[str], limit: int = 3) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")

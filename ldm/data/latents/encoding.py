"""Encodes shards of images to shards of latents (ldm/data/latents/shard.py).

Shards are encoded one after another, so an interruption loses the work on at most one.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.latents.cache import FORMAT, HASHES, MANIFEST
from ldm.data.latents.job import ENTRY, EncodingJob, name_and_size
from ldm.data.latents.shard import key_hashes, write_shard
from ldm.data.loading import worker
from ldm.data.sources.buckets import Size
from ldm.data.sources.shards import Shards
from ldm.data.sources.split import SplitHash
from ldm.files import atomic_write, write_json

Encode = Callable[[Tensor], Tensor]  # uint8 images (b, 3, h, w) → moments (b, 2z, h/f, w/f)
EncodeText = Callable[[list[str]], np.ndarray]  # c captions → states (c, tokens, d)
Bad = dict[str, str | None]


class _Readable(Dataset[dict[str, Any]]):
    """The samples of `shards`, or {"key", "reason"} for a sample that cannot be read.

    OSError is raised, because it is a failure of the storage and not of the sample.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = self.shards.key(index)
        try:
            data, captions = self.shards.read(index)
            image = self.shards.framing(data, captions[0], self.shards.name(index), index, draw=0)
        except ValueError as error:
            return {"key": key, "reason": str(error)}
        return {"image": image, "captions": captions, "key": key}


def encode_shards(
    job: EncodingJob,
    todo: Sequence[int],
    encode: Encode,
    batch_size: int,
    workers: int = 0,
    encode_text: EncodeText | None = None,
) -> Iterator[int]:
    """Encodes the shards `todo` of `job` and yields the number of samples of each batch once it is encoded.

    With `encode_text` the states of all captions are stored too, and the job's settings must name the text encoder.
    Batches never cross shards, so the bytes of a shard do not depend on where encoding was stopped and resumed.
    """
    plan = {shard: [[*r] for r in _batches(job.shards.rows(shard), batch_size)] for shard in todo}
    loader = DataLoader(
        _Readable(job.shards),
        batch_sampler=[batch for shard in todo for batch in plan[shard]],
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=worker.initialize,
        prefetch_factor=4 if workers else None,
    )
    batches = iter(loader)
    for shard in todo:
        by_size: dict[Size, _Latents] = {size: _Latents() for size in job.targets(job.shards.files[shard])}
        bad: list[Bad] = [{"key": None, "reason": loss} for k, loss in job.shards.index.losses.items() if k == shard]
        for _ in plan[shard]:
            readable, unreadable = next(batches)
            bad += unreadable
            for size, (samples, images) in readable.items():
                by_size[size].add(samples, images)
                by_size[size].encode(encode, batch_size, at_least=batch_size)
            yield len(unreadable) + sum(len(samples) for samples, _ in readable.values())
        for latents in by_size.values():
            latents.encode(encode, batch_size, at_least=1)
            bad += latents.bad
        _write(job, shard, by_size, bad, encode_text)


class _Latents:
    """Samples of one size: those waiting to fill a batch, and those that are encoded."""

    def __init__(self) -> None:
        self.waiting: list[dict[str, Any]] = []
        self.images: list[Tensor] = []
        self.good: list[dict[str, Any]] = []
        self.moments: list[np.ndarray] = []
        self.bad: list[Bad] = []

    def add(self, samples: list[dict[str, Any]], images: Tensor) -> None:
        self.waiting += samples
        self.images.append(images)

    def encode(self, encode: Encode, batch_size: int, at_least: int) -> None:
        """Encodes the waiting samples in batches while there are `at_least` that many."""
        while len(self.waiting) >= at_least:
            images = torch.cat(self.images) if len(self.images) > 1 else self.images[0]
            for sample, moments in zip(self.waiting, encode(images[:batch_size]).half().numpy(), strict=False):
                if np.isfinite(moments).all():
                    self.good.append(sample)
                    self.moments.append(moments)
                else:
                    self.bad.append({"key": sample["key"], "reason": "its latents are not finite in float16"})
            self.waiting = self.waiting[batch_size:]
            self.images = [images[batch_size:]] if self.waiting else []


def _batches(samples: range, size: int) -> Iterator[range]:
    return (samples[k : k + size] for k in range(0, len(samples), size))


def _collate(samples: list[dict[str, Any]]) -> tuple[dict[Size, tuple[list[dict[str, Any]], Tensor]], list[Bad]]:
    """Returns the samples and their images (b, 3, h, w) by size, and the unreadable samples."""
    bad = [sample for sample in samples if "reason" in sample]
    images: dict[Size, list[Tensor]] = {}
    texts: dict[Size, list[dict[str, Any]]] = {}
    for sample in samples:
        if "image" in sample:
            size = tuple(sample["image"].shape[1:])
            images.setdefault(size, []).append(sample.pop("image"))
            texts.setdefault(size, []).append(sample)
    return {size: (texts[size], torch.stack(images[size])) for size in texts}, bad


def _write(
    job: EncodingJob, shard: int, by_size: dict[Size, _Latents], bad: list[Bad], encode_text: EncodeText | None
) -> None:
    """Writes a shard's quarantine and then its latents, because the latents mark the shard as done."""
    file = job.shards.files[shard]
    quarantine = job.quarantine(file)
    lines = [json.dumps({"shard": file.name, **sample}, ensure_ascii=False) for sample in bad]
    if lines:
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        atomic_write(quarantine, lambda file: file.write(data))
    else:
        quarantine.unlink(missing_ok=True)
    for number, (size, target) in enumerate(job.targets(file).items()):
        latents = by_size[size]
        moments = np.stack(latents.moments) if latents.moments else np.empty((0, 0, 0, 0), np.float16)
        keys, captions = ([sample[name] for sample in latents.good] for name in ("key", "captions"))
        quarantined = 0 if number else len(bad)  # counted in the first file only, since bad samples have no size
        record = {"settings": job.settings, "source": job.source(shard), "quarantined": quarantined, "size": size}
        states = None if encode_text is None else encode_text([text for texts in captions for text in texts])
        write_shard(target, moments, keys, captions, record, states)


def finish(job: EncodingJob) -> dict[str, Any] | None:
    """Writes and returns the manifest if the shards of all ranks are encoded, so that the last rank writes it.

    Returns None if a shard is missing.
    """
    found = [job.records(file, name_and_size(file)) for file in job.files]
    if any(records is None for records in found):
        return None
    done = [record for records in found for record in records or ()]
    shards = [{name: record[name] for name in ENTRY} for record in done]
    manifest = {
        "format": FORMAT,
        "split_hash": _split_hash(job.out / MANIFEST),
        "settings": done[0]["settings"],
        "samples": sum(shard["samples"] for shard in shards),
        "quarantined": sum(shard["quarantined"] for shard in shards),
        "shards": shards,
    }
    hashes = key_hashes(job.out, [shard["name"] for shard in shards])
    atomic_write(job.out / HASHES, lambda file: np.save(file, hashes, allow_pickle=False))
    write_json(job.out / MANIFEST, manifest)
    return manifest


def _split_hash(manifest: Path) -> SplitHash:
    """Returns the split of the cache that has this manifest, also if it is truncated; new caches have the mixed one."""
    text = manifest.read_text(encoding="utf-8", errors="replace") if manifest.exists() else ""
    return "mixed" if not text or '"split_hash": "mixed"' in text else "crc32"

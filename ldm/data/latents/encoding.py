"""Encodes shards of images to shards of latents (ldm/data/latents/shard.py).

Shards are encoded one after another, so an interruption loses the work on at most one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.latents.cache import FORMAT, HASHES, MANIFEST, check_settings, is_manifest, split_hash
from ldm.data.latents.shard import key_hashes, write_shard
from ldm.data.loading import worker
from ldm.data.mapped import read_record
from ldm.data.sources.buckets import Size
from ldm.data.sources.shards import Shards
from ldm.data.sources.storage import File
from ldm.files import atomic_write, leftovers, write_json
from ldm.ownership import refuse

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


@dataclass(frozen=True)
class EncodingJob:
    """The encoding of this rank's `shards`, a part of the `files` of all ranks, into `out`.

    `settings` determine the latents and are stored in the manifest. Each shard gives one file per bucket, which may be
    empty. Raises ValueError if two files have the same name or if `out` holds a cache of other settings or files, and
    FileExistsError if an output would replace a file that is not part of a cache.
    """

    files: Sequence[File]
    shards: Shards
    out: Path
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        names = [file.stem for file in self.files]
        if len(set(names)) < len(names):
            duplicate = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two of the shards are named {duplicate}: encode them into two folders")
        expected = {path.stem for file in self.files for path in self.targets(file).values()}
        others = sorted({path.stem for path in self.out.glob("*.safetensors")} - expected)
        if others:
            raise ValueError(
                f"{self.out} already has {others[0]}.safetensors, which does not belong to these shards: "
                "give another --out, or remove it"
            )
        refuse(self._foreign(), "ldm encode", "move it away, or give another --out")

    def _foreign(self) -> list[Path]:
        """Returns the existing files in place of this rank's outputs that ldm encode did not write."""
        targets = [path for file in self.shards.files for path in self.targets(file).values()]
        found = [path for path in targets if path.exists() and not _is_latents(path)]
        found += [path for file in self.shards.files if not _is_replaceable(path := self.quarantine(file), file)]
        manifest, hashes = self.out / MANIFEST, self.out / HASHES
        is_cache = manifest.exists() or any(_is_latents(path) for path in self.out.glob("*.safetensors"))
        found += [manifest] if manifest.exists() and not is_manifest(manifest) else []
        return found + ([hashes] if hashes.exists() and not is_cache else [])

    def quarantine(self, file: File) -> Path:
        """Returns the path of the list of a tar's unusable samples."""
        return self.out / f"{file.stem}.quarantine.jsonl"

    def targets(self, file: File) -> dict[Size, Path]:
        """Returns the file of latents of a tar for each image size."""
        framing = self.shards.framing
        if not framing.buckets:
            return {(framing.size, framing.size): self.out / f"{file.stem}.safetensors"}
        return {(h, w): self.out / f"{file.stem}.{h}x{w}.safetensors" for h, w in framing.buckets}

    def source(self, shard: int) -> dict[str, Any]:
        """Returns what identifies the encoded tar: name, size and a digest of its samples' keys and byte ranges."""
        index, rows = self.shards.index, self.shards.rows(shard)
        in_shard = slice(rows.start, rows.stop)
        digest = hashlib.sha256(index.hashes[in_shard].tobytes() + index.spans[in_shard].tobytes()).hexdigest()
        return {**_name_and_size(self.shards.files[shard]), "index": digest}

    def records(self, file: File, source: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Returns the records of a tar's latents, or None if a file is missing or was encoded from another `source`."""
        records = []
        for target in self.targets(file).values():
            if not target.exists():
                return None
            record = read_record(target)
            wanted = {name: value for name, value in self.settings.items() if name != "version"}
            check_settings(target, record["settings"], {"text_encoder": None, **wanted})
            if not source.items() <= record["source"].items():
                return None
            records.append({"name": target.stem, **record})
        return records

    def todo(self) -> list[int]:
        """Returns the indices of this rank's shards that are not encoded yet."""
        return [k for k, file in enumerate(self.shards.files) if self.records(file, self.source(k)) is None]


def _is_latents(path: Path) -> bool:
    """Returns whether `write_shard` wrote the file."""
    try:
        return {"settings", "source", "samples"} <= read_record(path).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _is_replaceable(quarantine: Path, file: File) -> bool:
    """Returns whether the quarantine file does not exist or lists samples of this tar."""
    if not quarantine.exists():
        return True
    try:
        with open(quarantine, encoding="utf-8") as lines:
            return bool(json.loads(next(lines))["shard"] == file.name)
    except (OSError, StopIteration, ValueError, KeyError, TypeError):
        return False


def _name_and_size(file: File) -> dict[str, Any]:
    """Returns the part of a tar's source that needs no index."""
    return {"name": file.name, "bytes": file.size}


def encode_shards(
    job: EncodingJob, encode: Encode, batch_size: int, workers: int = 0, encode_text: EncodeText | None = None
) -> Iterator[int]:
    """Encodes the remaining shards of `job` and yields the number of samples of each batch once it is encoded.

    With `encode_text` the states of all captions are stored too, and the job's settings must name the text encoder.
    Batches never cross shards, so the bytes of a shard do not depend on where encoding was stopped and resumed.
    """
    _remove_leftovers(job)
    todo = job.todo()
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


def _remove_leftovers(job: EncodingJob) -> None:
    """Removes the temporary files that an interrupted run of this rank left."""
    names = []
    for file in job.shards.files:
        names += [path.name for path in (*job.targets(file).values(), job.quarantine(file))]
    only_rank = len(job.files) == len(job.shards.files)  # otherwise another rank may be writing the manifest now
    own = {*names, *([MANIFEST, HASHES] if only_rank else [])}
    for path in leftovers(job.out, own.__contains__):
        path.unlink()


def finish(job: EncodingJob) -> dict[str, Any] | None:
    """Writes and returns the manifest if the shards of all ranks are encoded, so that the last rank writes it.

    Returns None if a shard is missing.
    """
    found = [job.records(file, _name_and_size(file)) for file in job.files]
    if any(records is None for records in found):
        return None
    done = [record for records in found for record in records or ()]
    fields = ("name", "source", "samples", "quarantined", "sha256", "size")
    shards = [{name: record[name] for name in fields} for record in done]
    earlier = job.out / MANIFEST
    manifest = {
        "format": FORMAT,
        "split_hash": split_hash(json.loads(earlier.read_text(encoding="utf-8"))) if earlier.exists() else "mixed",
        "settings": done[0]["settings"],
        "samples": sum(shard["samples"] for shard in shards),
        "quarantined": sum(shard["quarantined"] for shard in shards),
        "shards": shards,
    }
    hashes = key_hashes(job.out, [shard["name"] for shard in shards])
    atomic_write(job.out / HASHES, lambda file: np.save(file, hashes, allow_pickle=False))
    write_json(job.out / MANIFEST, manifest)
    return manifest

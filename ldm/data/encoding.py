"""Shards of pictures → shards of latents (ldm/data/cache.py), one at a time, so that a kill costs at most one."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.cache import FORMAT, MANIFEST, check_settings, read_record, write_shard
from ldm.data.shards import Shards
from ldm.files import atomic_write, write_json

Encode = Callable[[Tensor], Tensor]  # uint8 pictures (b, 3, h, w) → moments (b, 2z, h/f, w/f)
Bad = dict[str, str | None]


class _Readable(Dataset[dict[str, Any]]):
    """Samples; one that cannot be read is its key and the reason. OSError is no property of a sample, and passes."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {**self.shards[index]}
        except ValueError as error:
            return {"key": self.shards.key(index), "reason": str(error)}


@dataclass(frozen=True)
class Job:
    """What there is to encode, into `out`; rank r of `world` takes each `world`-th shard from the r-th on.

    `settings` say what decides the latents, and are the manifest's. Raises ValueError for shards of one name, and
    for a cache in `out` that other settings or other shards made.
    """

    shards: Shards
    out: Path
    settings: dict[str, Any]
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        names = [path.stem for path in self.shards.paths]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two of the shards are named {twice}: encode them into two folders")
        others = sorted({path.stem for path in self.out.glob("*.safetensors")} - set(names))
        if others:
            raise ValueError(f"{self.out} already holds {others[0]}.safetensors, which is not of these shards")

    def target(self, shard: int) -> Path:
        return self.out / f"{self.shards.paths[shard].stem}.safetensors"

    def source(self, shard: int) -> dict[str, Any]:
        """What tells whether the tar is still the one that was encoded: which bytes of it are which sample's."""
        path, index = self.shards.paths[shard], self.shards.indices[shard]
        digest = hashlib.sha256(index.keys.tobytes() + index.spans.tobytes()).hexdigest()
        return {"name": path.name, "bytes": path.stat().st_size, "index": digest}

    def record(self, shard: int) -> dict[str, Any] | None:
        """The record of a shard that is done, and was made of the tar as it is now."""
        try:
            record = read_record(self.target(shard))
        except (FileNotFoundError, ValueError):  # a damaged one is made anew
            return None
        wanted = {name: value for name, value in self.settings.items() if name != "version"}
        check_settings(self.target(shard), record["settings"], wanted)
        return record if record["source"] == self.source(shard) else None

    def todo(self) -> list[int]:
        """This rank's shards that are not done."""
        own = range(self.rank, len(self.shards.paths), self.world)
        return [shard for shard in own if self.record(shard) is None]

    def samples(self, shard: int) -> range:
        return range(self.shards.starts[shard], self.shards.starts[shard + 1])


def encode_shards(job: Job, encode: Encode, batch_size: int, workers: int = 0) -> Iterator[int]:
    """Encodes what `job` has to do; gives the number of samples of each batch once it is encoded.

    Batches never cross shards, so the bytes of a shard do not depend on where the work was stopped and resumed.
    """
    _sweep(job)
    todo = job.todo()
    plan = {shard: [[*r] for r in _batches(job.samples(shard), batch_size)] for shard in todo}
    loader = DataLoader(
        _Readable(job.shards),
        batch_sampler=[batch for shard in todo for batch in plan[shard]],
        num_workers=workers,
        collate_fn=_collate,
        prefetch_factor=4 if workers else None,
    )
    batches = iter(loader)
    for shard in todo:
        good: list[dict[str, Any]] = []
        bad: list[Bad] = [{"key": None, "reason": loss} for loss in [job.shards.indices[shard].loss] if loss]
        for _ in plan[shard]:
            samples, pictures = next(batches)
            moments = encode(pictures).half().numpy() if pictures is not None else np.empty(0)
            _sort(samples, moments, good, bad)
            yield len(samples)
        _write(job, shard, good, bad)


def _batches(samples: range, size: int) -> Iterator[range]:
    return (samples[k : k + size] for k in range(0, len(samples), size))


def _collate(samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Tensor | None]:
    pictures = [sample.pop("image") for sample in samples if "image" in sample]
    return samples, torch.stack(pictures) if pictures else None


def _sort(samples: list[dict[str, Any]], moments: np.ndarray, good: list[dict[str, Any]], bad: list[Bad]) -> None:
    """Adds the samples to the good, with their moments, or to the bad, with the reason."""
    rows = iter(moments)
    for sample in samples:
        if "reason" in sample:
            bad.append(sample)
        elif np.isfinite(row := next(rows)).all():
            good.append({**sample, "moments": row})
        else:
            bad.append({"key": sample["key"], "reason": "its latents are not finite in float16"})


def _write(job: Job, shard: int, good: list[dict[str, Any]], bad: list[Bad]) -> None:
    """The quarantine first, since the shard's own file says that it is done."""
    target = job.target(shard)
    quarantine = target.with_suffix(".quarantine.jsonl")
    lines = [json.dumps({"shard": job.shards.paths[shard].name, **one}, ensure_ascii=False) for one in bad]
    if lines:
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        atomic_write(quarantine, lambda file: file.write(data))
    else:
        quarantine.unlink(missing_ok=True)
    moments = np.stack([sample["moments"] for sample in good]) if good else np.empty((0, 0, 0, 0), np.float16)
    record = {"settings": job.settings, "source": job.source(shard), "quarantined": len(bad)}
    write_shard(target, moments, [s["key"] for s in good], [s["caption"] for s in good], record)


def _sweep(job: Job) -> None:
    """Removes the temporary files that a killed run of this rank left."""
    stems = [job.target(shard).stem for shard in range(job.rank, len(job.shards.paths), job.world)]
    names = [f"{stem}{ending}" for stem in stems for ending in (".safetensors", ".quarantine.jsonl")]
    left = {path.name: path for path in job.out.glob(".*.tmp")}
    if not left:
        return
    ours = {*names, *([MANIFEST] if job.world == 1 else [])}  # another rank may be writing the manifest now
    for name, path in left.items():
        if name[1:].rsplit(".", 2)[0] in ours:
            path.unlink()


def finish(job: Job) -> dict[str, Any] | None:
    """Writes the manifest if the shards of all ranks are done: the last rank does it. None if they are not."""
    records = [job.record(shard) for shard in range(len(job.shards.paths))]
    done = [record for record in records if record is not None]
    if len(done) < len(records):
        return None
    shards = [
        {"name": job.target(k).stem, **{name: r[name] for name in ("source", "samples", "quarantined", "sha256")}}
        for k, r in enumerate(done)
    ]
    manifest = {
        "format": FORMAT,
        "settings": done[0]["settings"],
        "samples": sum(shard["samples"] for shard in shards),
        "quarantined": sum(shard["quarantined"] for shard in shards),
        "shards": shards,
    }
    write_json(job.out / MANIFEST, manifest)
    return manifest

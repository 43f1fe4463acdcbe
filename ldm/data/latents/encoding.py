"""Shards of pictures → files of latents (ldm/data/latents/shard.py), one at a time: a kill costs at most one."""

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

from ldm.data.latents.cache import FORMAT, HASHES, MANIFEST, check_settings, is_manifest
from ldm.data.latents.shard import key_hashes, write_shard
from ldm.data.loading import worker
from ldm.data.mapped import read_record
from ldm.data.sources.buckets import Size
from ldm.data.sources.shards import Shards
from ldm.data.sources.storage import File
from ldm.files import atomic_write, leftovers, write_json
from ldm.ownership import refuse

Encode = Callable[[Tensor], Tensor]  # uint8 pictures (b, 3, h, w) → moments (b, 2z, h/f, w/f)
EncodeText = Callable[[list[str]], np.ndarray]  # c captions → states (c, tokens, d)
Bad = dict[str, str | None]


class _Readable(Dataset[dict[str, Any]]):
    """Samples; one that cannot be read is its key and the reason. OSError is no property of a sample, and passes."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = self.shards.key(index)
        try:
            picture, captions = self.shards.read(index)
            image = self.shards.framing(picture, captions[0], self.shards.name(index), index, draw=0)
        except ValueError as error:
            return {"key": key, "reason": str(error)}
        return {"image": image, "captions": captions, "key": key}


@dataclass(frozen=True)
class EncodingJob:
    """What there is to encode into `out`: of the `files` of all ranks, this rank's `shards`, which it alone indexes.

    `settings` say what decides the latents, and are the manifest's. Of each shard there is a file for each bucket that
    the shards have, be it empty. Raises ValueError for files of one name, and for a cache in `out` that other settings
    or other files made; FileExistsError where what is to be written there would replace a file of another kind.
    """

    files: Sequence[File]
    shards: Shards
    out: Path
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        names = [file.stem for file in self.files]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two of the shards are named {twice}: encode them into two folders")
        ours = {path.stem for file in self.files for path in self.targets(file).values()}
        others = sorted({path.stem for path in self.out.glob("*.safetensors")} - ours)
        if others:
            raise ValueError(f"{self.out} already holds {others[0]}.safetensors, which is not of these shards")
        refuse(self._foreign(), "ldm encode", "move it away, or give another --out")

    def _foreign(self) -> list[Path]:
        """The files where the cache's own are to be, of those that this rank writes, that are of another kind."""
        targets = [path for file in self.shards.files for path in self.targets(file).values()]
        found = [path for path in targets if path.exists() and not _is_latents(path)]
        found += [path for file in self.shards.files if not _is_of(path := self.quarantine(file), file)]
        manifest, hashes = self.out / MANIFEST, self.out / HASHES
        begun = manifest.exists() or any(_is_latents(path) for path in self.out.glob("*.safetensors"))
        found += [manifest] if manifest.exists() and not is_manifest(manifest) else []
        return found + ([hashes] if hashes.exists() and not begun else [])

    def quarantine(self, file: File) -> Path:
        """Where the samples of a tar that cannot be used are listed."""
        return self.out / f"{file.stem}.quarantine.jsonl"

    def targets(self, file: File) -> dict[Size, Path]:
        """What a tar becomes, for each size of pictures."""
        framing = self.shards.framing
        if not framing.buckets:
            return {(framing.size, framing.size): self.out / f"{file.stem}.safetensors"}
        return {(h, w): self.out / f"{file.stem}.{h}x{w}.safetensors" for h, w in framing.buckets}

    def source(self, shard: int) -> dict[str, Any]:
        """What tells whether the tar is still the one that was encoded: which bytes of it are which sample's."""
        index, rows = self.shards.index, self.shards.rows(shard)
        inside = slice(rows.start, rows.stop)
        digest = hashlib.sha256(index.hashes[inside].tobytes() + index.spans[inside].tobytes()).hexdigest()
        return {**_known(self.shards.files[shard]), "index": digest}

    def records(self, file: File, source: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The records of what a tar became, if all of it is there and was made of the same `source`."""
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
        """This rank's shards that are not done."""
        return [k for k, file in enumerate(self.shards.files) if self.records(file, self.source(k)) is None]


def _is_latents(path: Path) -> bool:
    """Whether `write_shard` wrote it."""
    try:
        return {"settings", "source", "samples"} <= read_record(path).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _is_of(quarantine: Path, file: File) -> bool:
    """Whether there is no file there, or one that lists samples of this tar."""
    if not quarantine.exists():
        return True
    try:
        with open(quarantine, encoding="utf-8") as lines:
            return bool(json.loads(next(lines))["shard"] == file.name)
    except (OSError, StopIteration, ValueError, KeyError, TypeError):
        return False


def _known(file: File) -> dict[str, Any]:
    """What is known of a tar without its index."""
    return {"name": file.name, "bytes": file.size}


def encode_shards(
    job: EncodingJob, encode: Encode, batch_size: int, workers: int = 0, encode_text: EncodeText | None = None
) -> Iterator[int]:
    """Encodes what `job` has to do; gives the number of samples of each batch once it is encoded.

    With `encode_text` the states of all captions are kept too; then the job's settings must say of which text encoder.
    Batches never cross shards, so the bytes of a shard do not depend on where the work was stopped and resumed.
    """
    _sweep(job)
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
        made: dict[Size, _Latents] = {size: _Latents() for size in job.targets(job.shards.files[shard])}
        bad: list[Bad] = [{"key": None, "reason": loss} for k, loss in job.shards.index.losses.items() if k == shard]
        for _ in plan[shard]:
            arrived, unreadable = next(batches)
            bad += unreadable
            for size, (samples, pictures) in arrived.items():
                made[size].take(samples, pictures)
                made[size].encode(encode, batch_size, least=batch_size)
            yield len(unreadable) + sum(len(samples) for samples, _ in arrived.values())
        for latents in made.values():
            latents.encode(encode, batch_size, least=1)
            bad += latents.bad
        _write(job, shard, made, bad, encode_text)


class _Latents:
    """Samples of one size: those whose pictures wait until they fill a batch, and those that are encoded."""

    def __init__(self) -> None:
        self.waiting: list[dict[str, Any]] = []
        self.pictures: list[Tensor] = []
        self.good: list[dict[str, Any]] = []
        self.moments: list[np.ndarray] = []
        self.bad: list[Bad] = []

    def take(self, samples: list[dict[str, Any]], pictures: Tensor) -> None:
        self.waiting += samples
        self.pictures.append(pictures)

    def encode(self, encode: Encode, batch_size: int, least: int) -> None:
        """What waits, batch by batch, while there are at least so many."""
        while len(self.waiting) >= least:
            pictures = torch.cat(self.pictures) if len(self.pictures) > 1 else self.pictures[0]
            for sample, moments in zip(self.waiting, encode(pictures[:batch_size]).half().numpy(), strict=False):
                if np.isfinite(moments).all():
                    self.good.append(sample)
                    self.moments.append(moments)
                else:
                    self.bad.append({"key": sample["key"], "reason": "its latents are not finite in float16"})
            self.waiting = self.waiting[batch_size:]
            self.pictures = [pictures[batch_size:]] if self.waiting else []


def _batches(samples: range, size: int) -> Iterator[range]:
    return (samples[k : k + size] for k in range(0, len(samples), size))


def _collate(samples: list[dict[str, Any]]) -> tuple[dict[Size, tuple[list[dict[str, Any]], Tensor]], list[Bad]]:
    """Samples and pictures (b, 3, h, w) by size, and the unreadable."""
    bad = [sample for sample in samples if "reason" in sample]
    pictures: dict[Size, list[Tensor]] = {}
    texts: dict[Size, list[dict[str, Any]]] = {}
    for sample in samples:
        if "image" in sample:
            size = tuple(sample["image"].shape[1:])
            pictures.setdefault(size, []).append(sample.pop("image"))
            texts.setdefault(size, []).append(sample)
    return {size: (texts[size], torch.stack(pictures[size])) for size in texts}, bad


def _write(
    job: EncodingJob, shard: int, made: dict[Size, _Latents], bad: list[Bad], encode_text: EncodeText | None
) -> None:
    """The quarantine first, since the shard's own files say that it is done."""
    file = job.shards.files[shard]
    quarantine = job.quarantine(file)
    lines = [json.dumps({"shard": file.name, **one}, ensure_ascii=False) for one in bad]
    if lines:
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        atomic_write(quarantine, lambda file: file.write(data))
    else:
        quarantine.unlink(missing_ok=True)
    for number, (size, target) in enumerate(job.targets(file).items()):
        latents = made[size]
        moments = np.stack(latents.moments) if latents.moments else np.empty((0, 0, 0, 0), np.float16)
        keys, captions = ([sample[name] for sample in latents.good] for name in ("key", "captions"))
        quarantined = 0 if number else len(bad)  # counted once, whatever the size that a sample would have had
        record = {"settings": job.settings, "source": job.source(shard), "quarantined": quarantined, "size": size}
        states = None if encode_text is None else encode_text([text for one in captions for text in one])
        write_shard(target, moments, keys, captions, record, states)


def _sweep(job: EncodingJob) -> None:
    """Removes the temporary files that a killed run of this rank left."""
    names = []
    for file in job.shards.files:
        names += [path.name for path in (*job.targets(file).values(), job.quarantine(file))]
    alone = len(job.files) == len(job.shards.files)  # otherwise another rank may be writing the manifest now
    ours = {*names, *([MANIFEST, HASHES] if alone else [])}
    for path in leftovers(job.out, ours.__contains__):
        path.unlink()


def finish(job: EncodingJob) -> dict[str, Any] | None:
    """Writes the manifest if the shards of all ranks are done: the last rank does it. None if they are not."""
    found = [job.records(file, _known(file)) for file in job.files]
    if any(records is None for records in found):
        return None
    done = [record for records in found for record in records or ()]
    told = ("name", "source", "samples", "quarantined", "sha256", "size")
    shards = [{name: record[name] for name in told} for record in done]
    manifest = {
        "format": FORMAT,
        "settings": done[0]["settings"],
        "samples": sum(shard["samples"] for shard in shards),
        "quarantined": sum(shard["quarantined"] for shard in shards),
        "shards": shards,
    }
    hashes = key_hashes(job.out, [shard["name"] for shard in shards])
    atomic_write(job.out / HASHES, lambda file: np.save(file, hashes, allow_pickle=False))
    write_json(job.out / MANIFEST, manifest)
    return manifest

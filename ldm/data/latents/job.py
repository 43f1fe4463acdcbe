"""Plans the encoding of shards into a cache, and finds the shards that are not encoded yet.

An encoded shard whose bytes do not match their checksum is encoded again.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.data.latents.cache import HASHES, MANIFEST, check_settings, read_manifest
from ldm.data.latents.outputs import is_latents, is_manifest, is_quarantine
from ldm.data.latents.shard import is_intact, map_shard
from ldm.data.sources.buckets import Size
from ldm.data.sources.shards import Shards
from ldm.data.sources.storage import File
from ldm.ownership import refuse
from ldm.progress import Progress

ENTRY = ("name", "source", "samples", "quarantined", "sha256", "size")  # fields of a shard in the manifest


@dataclass(frozen=True)
class EncodingJob:
    """The encoding of this rank's `shards`, a part of the `files` of all ranks, into `out`.

    `settings` determine the latents and are stored in the manifest. Each shard produces one file per bucket, which may
    be empty. Raises ValueError if two files have the same name or if `out` contains a cache of other settings or files,
    and FileExistsError if an output would replace a file that is not part of a cache.
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
        """Returns the existing files at the paths of this rank's outputs that `ldm encode` did not write."""
        listed = _manifest_entries(self.out).keys()
        targets = [path for file in self.shards.files for path in self.targets(file).values()]
        found = [path for path in targets if path.exists() and path.stem not in listed and not is_latents(path)]
        quarantines = [(self.quarantine(file), file.name) for file in self.shards.files]
        found += [path for path, shard in quarantines if path.exists() and not is_quarantine(path, shard)]
        manifest, hashes = self.out / MANIFEST, self.out / HASHES
        is_cache = manifest.exists() or any(is_latents(path) for path in self.out.glob("*.safetensors"))
        found += [manifest] if manifest.exists() and not is_manifest(manifest) else []
        return found + ([hashes] if hashes.exists() and not is_cache else [])

    def quarantine(self, file: File) -> Path:
        """Returns the path of the list of unusable samples in a tar."""
        return self.out / f"{file.stem}.quarantine.jsonl"

    def targets(self, file: File) -> dict[Size, Path]:
        """Returns the path of a tar's latents for each image size."""
        framing = self.shards.framing
        if not framing.buckets:
            return {(framing.size, framing.size): self.out / f"{file.stem}.safetensors"}
        return {(h, w): self.out / f"{file.stem}.{h}x{w}.safetensors" for h, w in framing.buckets}

    def source(self, shard: int) -> dict[str, Any]:
        """Returns the identity of a tar: name, size and a digest of its samples' keys and byte ranges."""
        index, rows = self.shards.index, self.shards.rows(shard)
        in_shard = slice(rows.start, rows.stop)
        digest = hashlib.sha256(index.hashes[in_shard].tobytes() + index.spans[in_shard].tobytes()).hexdigest()
        return {**name_and_size(self.shards.files[shard]), "index": digest}

    def records(self, file: File, source: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Returns the records of a tar's latents.

        Returns None if a file is missing, truncated, or was encoded from another `source`. Raises ValueError if one was
        encoded with other settings.
        """
        records = []
        for target in self.targets(file).values():
            try:
                record = map_shard(target).record
            except (FileNotFoundError, ValueError):
                return None
            wanted = {name: value for name, value in self.settings.items() if name != "version"}
            check_settings(target, record["settings"], {"text_encoder": None, **wanted})
            if not source.items() <= record["source"].items():
                return None
            records.append({"name": target.stem, **record})
        return records

    def pending(self) -> "Pending":
        """Returns this rank's shards that are to be encoded, after verifying the checksums of the encoded ones."""
        entries, states = _manifest_entries(self.out), []
        progress = Progress(len(self.shards.files), "shards", "verifying: ")
        with ThreadPoolExecutor(8) as pool:
            for state in pool.map(lambda shard: self._state(shard, entries), range(len(self.shards.files))):
                states.append(state)
                if any(state != "missing" for state in states):
                    progress.step()
        todo = [shard for shard, state in enumerate(states) if state != "done"]
        return Pending(todo, [shard for shard in todo if states[shard] == "damaged"])

    def _state(self, shard: int, entries: Mapping[str, dict[str, Any]]) -> Literal["missing", "damaged", "done"]:
        """Returns the state of a shard's latents; `entries` are those of the manifest, by name."""
        file, source = self.shards.files[shard], self.source(shard)
        paths = [*self.targets(file).values()]
        if not all(path.exists() for path in paths):
            return "missing"
        if not all(is_intact(path) for path in paths):
            return "damaged"
        records = [map_shard(path).record for path in paths]
        for path, record in zip(paths, records, strict=True):
            entry = entries.get(path.stem, {})
            if entry.get("source") == source and not entry.items() <= _entry(path.stem, record).items():
                return "damaged"  # the header is damaged, which the checksum does not cover
        listed = _line_count(self.quarantine(file))
        if listed is not None and listed != sum(record["quarantined"] for record in records):
            return "damaged"
        return "missing" if self.records(file, source) is None else "done"


@dataclass(frozen=True)
class Pending:
    """The positions of the shards to encode, and the subset whose files are damaged."""

    shards: list[int]
    damaged: list[int]


def _entry(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Returns a shard's entry of the manifest, without the version of ldm."""
    return {"name": name, **record, "settings": {**record["settings"], "version": None}}


def _manifest_entries(cache: Path) -> dict[str, dict[str, Any]]:
    """Returns the entries of the shards in the manifest, by name; none if there is no readable manifest."""
    try:
        manifest = read_manifest(cache)
        shards = [{**shard, "settings": manifest["settings"]} for shard in manifest["shards"]]
        return {shard["name"]: _entry(shard["name"], shard) for shard in shards}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _line_count(path: Path) -> int | None:
    """Returns the number of complete lines, or None if there is no such file."""
    return path.read_bytes().count(b"\n") if path.exists() else None


def name_and_size(file: File) -> dict[str, Any]:
    """Returns the part of a tar's source that needs no index."""
    return {"name": file.name, "bytes": file.size}

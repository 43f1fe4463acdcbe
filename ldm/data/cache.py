"""Latents on disk: the posterior's moments of shards of pictures, and a manifest of what made them.

NAME.safetensors holds, of the n readable samples of NAME.tar in their order, `moments` (n, 2z, h, w) float16,
`keys` and `captions` as UTF-8 one after the other, and where each ends, `key_ends` and `caption_ends` (n,) int64;
its metadata holds the shard's record. One file, so that one rename makes all of a shard visible; a fixed stride, so
that a sample is a slice of the mapped file, shared by all workers through the page cache; no parsing of captions to
open it, no library but safetensors, nothing that unpickles. manifest.json comes last: without it a cache is not whole.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.picture import draw_and_index
from ldm.files import atomic_write
from ldm.image import to_uint8

FORMAT = 1
MANIFEST = "manifest.json"
TYPES: dict[str, np.dtype] = {"F16": np.dtype("<f2"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}
ARRAYS = ("moments", "keys", "key_ends", "captions", "caption_ends")
OPEN = 1000  # shards mapped at once: a process may have 65,530 mappings
_MAX_HEADER = 1 << 20


class LatentSample(TypedDict):
    moments: Tensor  # float16 (2z, h, w)
    caption: str
    key: str
    id: int


class FirstStage(Protocol):
    @property
    def source(self) -> dict[str, Any]: ...

    @property
    def network(self) -> Any: ...


@dataclass(frozen=True)
class Shard:
    """A mapped file of the cache; `record` is {"settings", "source", "samples", "quarantined", "sha256"}."""

    moments: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray
    captions: np.ndarray
    caption_ends: np.ndarray
    record: dict[str, Any]

    def key(self, row: int) -> str:
        return _text(self.keys, self.key_ends, row)

    def caption(self, row: int) -> str:
        return _text(self.captions, self.caption_ends, row)


def _text(column: np.ndarray, ends: np.ndarray, row: int) -> str:
    return column[ends[row - 1] if row else 0 : ends[row]].tobytes().decode()


def _column(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    data = [text.encode("utf-8", "replace") for text in texts]  # JSON can hold half a surrogate pair
    return np.frombuffer(b"".join(data), np.uint8), np.cumsum([len(text) for text in data], dtype=np.int64)


def write_shard(
    path: Path, moments: np.ndarray, keys: Sequence[str], captions: Sequence[str], record: dict[str, Any]
) -> None:
    """Atomically; the same samples and record give the same bytes."""
    columns = (moments, *_column(keys), *_column(captions))  # safetensors stores bytes as they lie
    arrays = {name: np.ascontiguousarray(column) for name, column in zip(ARRAYS, columns, strict=True)}
    record = {**record, "samples": len(keys), "sha256": digest(arrays)}
    data = save(arrays, {"ldm": json.dumps(record, sort_keys=True)})
    atomic_write(path, lambda file: file.write(data))


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {list(array.shape)}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """What a shard says of itself, from its header alone; ValueError for a file that is no shard of a cache."""
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The record, the header's entries and where the data begins."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        return json.loads(header.pop("__metadata__")["ldm"]), header, 8 + length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no shard of cached latents, or is damaged; run ldm encode again") from error


def map_shard(path: Path) -> Shard:
    """Maps a shard into memory, of which pages are read when they are used. Raises ValueError if it is cut."""
    record, header, start = _read_header(path)
    # Copy-on-write, because torch warns of arrays that cannot be written to.
    data = np.memmap(path, np.uint8, "c").view(np.ndarray)[start:]
    try:
        arrays = {name: _view(data, header[name]) for name in ARRAYS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is cut short or damaged; run ldm encode again") from error
    return Shard(**arrays, record=record)


def _view(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    kind, (begin, end) = TYPES[entry["dtype"]], entry["data_offsets"]
    if end - begin != kind.itemsize * math.prod(entry["shape"]):
        raise ValueError("the offsets do not fit the shape")
    return data[begin:end].view(kind).reshape(entry["shape"])


def read_manifest(cache: Path) -> dict[str, Any]:
    """{"format", "settings", "samples", "quarantined", "shards": [{"name", "samples", "sha256", …}]}."""
    path = cache / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{cache} holds no {MANIFEST}: give a folder that ldm encode has finished")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, of which this ldm knows only {FORMAT}")
        if not {"settings", "samples", "shards"} <= manifest.keys():
            raise ValueError("a part of it is missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of cached latents ({error}); run ldm encode again") from error
    return manifest


class CachedLatents(Dataset[LatentSample]):
    """The samples of a cache that `ldm encode` wrote, by index or (draw, index).

    Refused with ValueError where another first stage, scale or size made it than the run's. There is no `flip`, and
    no random crop: a mirrored latent is not the latent of the mirrored picture.
    """

    def __init__(self, cache: str | Path, first_stage: FirstStage, size: Sequence[int]) -> None:
        self.cache = Path(cache)
        manifest = read_manifest(self.cache)
        config = first_stage.network.config
        run = {"first_stage": first_stage.source["fingerprint"], "scale": config["scale"], "resolution": list(size)}
        check_settings(self.cache, manifest["settings"], run)
        self.names = [shard["name"] for shard in manifest["shards"]]
        self.starts = [0, *accumulate(shard["samples"] for shard in manifest["shards"])]
        self.mapped: dict[int, tuple[Tensor, Shard]] = {}
        if not len(self):
            raise ValueError(f"the cache {self.cache} holds no samples")

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int | tuple[int, int]) -> LatentSample:
        _, position = draw_and_index(index, len(self))
        shard = self._shard(position)
        row = position - self.starts[shard]
        moments, texts = self._map(shard)
        return {"moments": moments[row], "caption": texts.caption(row), "key": texts.key(row), "id": position}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mapped": {}}  # a spawned worker maps the files itself

    def key(self, index: int) -> str:
        shard = self._shard(index)
        return self._map(shard)[1].key(index - self.starts[shard])

    def _shard(self, position: int) -> int:
        return bisect_right(self.starts, position) - 1

    def _map(self, index: int) -> tuple[Tensor, Shard]:
        if index not in self.mapped:
            shard = map_shard(self.cache / f"{self.names[index]}.safetensors")
            expected = self.starts[index + 1] - self.starts[index]
            if len(shard.moments) != expected:
                raise ValueError(
                    f"{self.names[index]} in {self.cache} holds {len(shard.moments)} samples, its manifest says "
                    f"{expected}; run ldm encode again"
                )
            if len(self.mapped) >= OPEN:
                del self.mapped[next(iter(self.mapped))]
            self.mapped[index] = torch.from_numpy(shard.moments), shard
        return self.mapped[index]


def check_settings(cache: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError where one of the `wanted` settings is not what the cache was made with."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{cache} was encoded with {name} {_short(found.get(name))}, not {_short(value)}: "
                "give the same, or encode the shards again into another folder"
            )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


class Decoded(Dataset[dict[str, Any]]):
    """`dataset` of moments as pictures again: what the first stage makes of the posterior's means.

    FID against these does not see what the first stage itself loses.
    """

    def __init__(self, dataset: Dataset[LatentSample], first_stage: FirstStage) -> None:
        self.dataset, self.network = dataset, first_stage.network

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        latents = self.network.latents(sample["moments"].float()[None])
        return {**sample, "image": to_uint8(self.network.decode(latents))[0]}

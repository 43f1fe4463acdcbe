"""Samples a second from the page cache in one process: CachedLatents next to webdataset with .npy members.

    ldm bench loader --json FILE

Both give batches of 64 of float16 moments (8, 64, 64), which is 4 × 64 × 64 latents, with captions, in order; the
posterior is drawn on the device. The files are written to a temporary folder and read once before.
"""

import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor

from ldm.data.cache import CachedLatents, read_record, write_shard
from ldm.data.datamodule import collate
from ldm.files import write_json

SHAPE, COUNT, BATCH, ROUNDS = (8, 64, 64), 2048, 64, 5
SETTINGS = {"first_stage": "none", "scale": 1.0, "resolution": [512, 512]}


def write(folder: Path) -> None:
    """One cache and one tar of the same samples."""
    moments = np.random.default_rng(0).normal(size=(COUNT, *SHAPE)).astype(np.float16)
    keys = [f"{k:06d}" for k in range(COUNT)]
    captions = [f"caption number {k} of a picture of the usual length" for k in range(COUNT)]
    path = folder / "s.safetensors"
    write_shard(path, moments, keys, captions, {"settings": SETTINGS})
    shard = {"name": "s", "samples": COUNT, "sha256": read_record(path)["sha256"]}
    write_json(folder / "manifest.json", {"format": 1, "settings": SETTINGS, "samples": COUNT, "shards": [shard]})
    with tarfile.open(folder / "s.tar", "w") as tar:
        for key, moment, caption in zip(keys, moments, captions, strict=True):
            file = io.BytesIO()
            np.save(file, moment)
            for name, data in ((f"{key}.npy", file.getvalue()), (f"{key}.txt", caption.encode())):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def ours(folder: Path) -> Iterator[Tensor]:
    stage = SimpleNamespace(source={"fingerprint": "none"}, network=SimpleNamespace(config={"scale": 1.0}))
    latents = CachedLatents(folder, stage, (512, 512))
    for start in range(0, COUNT, BATCH):
        yield collate([{**latents[0, k]} for k in range(start, start + BATCH)])["moments"]


def theirs(folder: Path) -> Iterator[Tensor]:
    dataset = webdataset.WebDataset(str(folder / "s.tar"), shardshuffle=False).decode().to_tuple("npy", "txt")
    for moments, _ in dataset.batched(BATCH):
        yield torch.as_tensor(moments)


def rate(read: Callable[[Path], Iterator[Tensor]], folder: Path) -> float:
    began = time.perf_counter()
    count = sum(len(batch) for batch in read(folder))
    assert count == COUNT
    return count / (time.perf_counter() - began)


def measure() -> dict[str, Any]:
    """Median samples a second of each over interleaved rounds, the first of which is not counted."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        found = [(rate(ours, folder), rate(theirs, folder)) for _ in range(1 + ROUNDS)][1:]
    cached, peer = (median(column) for column in zip(*found, strict=True))
    return {
        "latents": {"ldm": cached, "webdataset": peer, "ratio": cached / peer, "unit": "samples/s, one process"},
        "settings": {"shape": list(SHAPE), "dtype": "float16", "samples": COUNT, "batch": BATCH, "rounds": ROUNDS},
        "versions": {"torch": torch.__version__, "webdataset": webdataset.__version__},
    }

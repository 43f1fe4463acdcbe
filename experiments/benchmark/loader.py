"""Compares ldm's data sets with webdataset, in samples per second of processor time from the page cache.

    ldm bench loader --json FILE

For latents, CachedLatents is compared with webdataset on .npy members: batches of 64 float16 moments (8, 64, 64), which
is 4 × 64 × 64 latents, with captions, in order; the posterior is sampled on the device. For images, Shards, in batches
of 32, is compared with webdataset's decode("pil") with the same scaling and cropping; with the decoder alone (Pillow,
and simplejpeg if installed), from bytes in memory to an array at the smallest sufficient size; and with the minimum
that gives the same batches, Pillow with scaling and stacking. The JPEGs are 512 × 512 without scaling, as img2dataset
stores them, and 2048 × 1536 scaled to 256 × 256. The files are in a temporary folder and read once before.
Everything runs in one process; processor time is measured, because other jobs may run.
"""

import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import torch
import webdataset
from PIL import Image
from torch import Tensor

from ldm.data.latents.cache import FORMAT, CachedLatents
from ldm.data.latents.shard import write_shard
from ldm.data.loading.datamodule import collate
from ldm.data.mapped import read_record
from ldm.data.sources.shards import Shards
from ldm.files import write_json
from ldm.image import REDUCING_GAP, pixels, resize_and_crop

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

SHAPE, COUNT, BATCH, ROUNDS = (8, 64, 64), 2048, 64, 5
SETTINGS = {"first_stage": "none", "scale": 1.0, "resolution": [512, 512]}
IMAGES = {"512x512 at 512": ((512, 512), 512, 256), "2048x1536 at 256": ((2048, 1536), 256, 64)}  # count
IMAGE_BATCH = 32


def write_latents(folder: Path) -> None:
    """Writes a cache and a tar of the same samples."""
    moments = np.random.default_rng(0).normal(size=(COUNT, *SHAPE)).astype(np.float16)
    keys = [f"{k:06d}" for k in range(COUNT)]
    captions = [f"caption number {k} of an image of the usual length" for k in range(COUNT)]
    path = folder / "s.safetensors"
    write_shard(path, moments, keys, [[caption] for caption in captions], {"settings": SETTINGS})
    shard = {"name": "s", "samples": COUNT, "sha256": read_record(path)["sha256"]}
    write_json(folder / "manifest.json", {"format": FORMAT, "settings": SETTINGS, "samples": COUNT, "shards": [shard]})
    files: dict[str, bytes] = {}
    for key, moment, caption in zip(keys, moments, captions, strict=True):
        file = io.BytesIO()
        np.save(file, moment)
        files |= {f"{key}.npy": file.getvalue(), f"{key}.txt": caption.encode()}
    write_tar(folder / "s.tar", files)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def photograph(size: tuple[int, int], seed: int) -> bytes:
    """Returns a JPEG of about the file size of a photograph: large shapes with a little grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
    grain = rng.normal(0, 4, (size[1], size[0], 1))
    shown = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + grain
    file = io.BytesIO()
    Image.fromarray(shown.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def latents(folder: Path) -> Iterator[Tensor]:
    stage = SimpleNamespace(source={"fingerprint": "none"}, network=SimpleNamespace(config={"scale": 1.0}))
    cached = CachedLatents(folder, stage, (512, 512))
    for start in range(0, COUNT, BATCH):
        yield collate([{**cached[0, k]} for k in range(start, start + BATCH)])["moments"]


def webdataset_latents(folder: Path) -> Iterator[Tensor]:
    dataset = webdataset.WebDataset(str(folder / "s.tar"), shardshuffle=False).decode().to_tuple("npy", "txt")
    for moments, _ in dataset.batched(BATCH):
        yield torch.as_tensor(moments)


def images(tar: Path, side: int) -> Iterator[Tensor]:
    shards = Shards(tar, side)
    for start in range(0, len(shards), IMAGE_BATCH):
        batch = [{**shards[0, k]} for k in range(start, min(start + IMAGE_BATCH, len(shards)))]
        yield collate(batch)["image"]


def webdataset_images(tar: Path, side: int) -> Iterator[Tensor]:
    def framed(image: Image.Image) -> Tensor:
        return pixels(resize_and_crop(image, side))

    dataset = webdataset.WebDataset(str(tar), shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
    for batch, _ in dataset.map_tuple(framed, str).batched(IMAGE_BATCH):
        yield torch.as_tensor(batch)


def pillow_alone(files: list[bytes], side: int) -> Iterator[np.ndarray]:
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            image.draft(None, (round(REDUCING_GAP * side),) * 2)
            yield np.asarray(image)[None]


def pillow_batched(files: list[bytes], side: int) -> Iterator[Tensor]:
    """Yields the same batches with minimal work: decoding, scaling, conversion to tensors, stacking."""

    def decoded(data: bytes) -> Tensor:
        with Image.open(io.BytesIO(data)) as image:
            image.draft(None, (round(REDUCING_GAP * side),) * 2)
            image.load()
            return pixels(resize_and_crop(image, side))

    for start in range(0, len(files), IMAGE_BATCH):
        yield torch.stack([decoded(data) for data in files[start : start + IMAGE_BATCH]])


def simplejpeg_alone(files: list[bytes], side: int) -> Iterator[np.ndarray]:
    least = round(REDUCING_GAP * side)
    for data in files:
        yield simplejpeg.decode_jpeg(data, min_height=least, min_width=least, min_factor=2)[None]


def rates(count: int, contenders: dict[str, Callable[[], Iterator[Any]]]) -> dict[str, float]:
    """Returns the median samples per second of processor time of interleaved rounds, after a warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + ROUNDS):
        for name, read in contenders.items():
            began = time.process_time()
            assert sum(len(batch) for batch in read()) == count
            found[name].append(count / (time.process_time() - began))
    return {name: median(values[1:]) for name, values in found.items()}


def measure_latents(folder: Path) -> dict[str, float]:
    write_latents(folder)
    found = rates(COUNT, {"ldm": partial(latents, folder), "webdataset": partial(webdataset_latents, folder)})
    return found | {"ratio": found["ldm"] / found["webdataset"]}


def measure_images(folder: Path, size: tuple[int, int], side: int, count: int) -> dict[str, float]:
    files = [photograph(size, k) for k in range(count)]
    tar = folder / f"{side}.tar"
    named = (({f"{k:04d}.jpg": data, f"{k:04d}.txt": b"a caption"}) for k, data in enumerate(files))
    write_tar(tar, {name: data for sample in named for name, data in sample.items()})
    contenders: dict[str, Callable[[], Iterator[Any]]] = {
        "ldm": partial(images, tar, side),
        "webdataset": partial(webdataset_images, tar, side),
        "pillow": partial(pillow_alone, files, side),
        "pillow_batched": partial(pillow_batched, files, side),
        **({"simplejpeg": partial(simplejpeg_alone, files, side)} if simplejpeg else {}),
    }
    found = rates(count, contenders)
    return {
        **found,
        "ratio": found["ldm"] / found["webdataset"],
        "share_of_decoder": found["ldm"] / found["pillow"],
        "share_of_least": found["ldm"] / found["pillow_batched"],
        "bytes_each": sum(map(len, files)) / count,
    }


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "latents": measure_latents(folder),
            "pictures": {case: measure_images(folder, *how) for case, how in IMAGES.items()},
            "unit": "samples a second of processor time, one process",
            "settings": {
                "latents": {"shape": list(SHAPE), "dtype": "float16", "samples": COUNT, "batch": BATCH},
                "pictures": {"batch": IMAGE_BATCH, "quality": 90},
                "rounds": ROUNDS,
            },
            "versions": {
                "torch": torch.__version__,
                "webdataset": webdataset.__version__,
                "pillow": PIL.__version__,
                **({"simplejpeg": simplejpeg.__version__} if simplejpeg else {}),
            },
        }

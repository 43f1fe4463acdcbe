"""Measures opening a set of shards and reading samples, for 10 to 100,000 shards of ten tiny images each.

The shards are links to one tar, so that more of them take no more disk space. Each set is opened in a process of its
own, so that the added memory can be measured.
"""

import io
import os
import tarfile
import tempfile
import time
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.loading.order import Order
from ldm.data.sources.shards import Shards

COUNTS = (10, 1_000, 100_000)
EACH, SIZE, BATCH, READS = 10, 8, 64, 4096


def measure() -> dict[str, Any]:
    """Returns, by number of shards, seconds of the first and second opening, MiB, and microseconds per random sample.

    Times are processor times with a warm page cache, so that they do not depend on other work on the machine.
    """
    with tempfile.TemporaryDirectory(prefix="ldm.bench.") as name:
        os.environ["HOME"] = name  # the index of the set is stored there
        write(Path(name) / "one.tar")
        found = {}
        for count in COUNTS:
            folder = Path(name) / str(count)
            folder.mkdir()
            for number in range(count):
                (folder / f"{number:06d}.tar").symlink_to(Path(name) / "one.tar")
            first, again = (_alone(folder) for _ in range(2))
            found[str(count)] = {"first_seconds": first["seconds"], **again}
    return found


def write(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(EACH):
            png = io.BytesIO()
            Image.new("RGB", (SIZE, SIZE), (number, 0, 0)).save(png, "PNG")
            for name, data in ((f"{number}.png", png.getvalue()), (f"{number}.txt", b"a caption")):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def _alone(folder: Path) -> dict[str, float]:
    with get_context("fork").Pool(1) as pool:
        return pool.apply(_opened_and_read, (folder,))


def _opened_and_read(folder: Path) -> dict[str, float]:
    before, began = _resident(), time.process_time()
    shards = Shards(folder, SIZE)
    seconds, added = time.process_time() - began, _resident() - before
    began, batches = time.process_time(), Order(len(shards), BATCH)
    for batch in islice(batches, READS // BATCH):
        for key in batch:
            shards[key]
    count = min(READS // BATCH, len(batches)) * BATCH
    return {"seconds": seconds, "mib": added, "microseconds_a_sample": (time.process_time() - began) / count * 1e6}


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

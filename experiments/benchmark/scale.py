"""What a set of shards costs to open, and a sample to read, from 10 to 100,000 shards of ten tiny pictures each.

The shards are links to one tar, so that a thousand times as many take no more disk; each opening is a process of its
own, whose memory is what the opening added.
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
    """Of each number of shards: seconds to open them, first and again, MiB, and microseconds a sample in random order.

    Seconds are the processor's, all of it from the page cache, so that other work on the machine counts for nothing.
    """
    with tempfile.TemporaryDirectory(prefix="ldm.bench.") as name:
        os.environ["HOME"] = name  # where the index of the set is kept
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
            picture = io.BytesIO()
            Image.new("RGB", (SIZE, SIZE), (number, 0, 0)).save(picture, "PNG")
            for name, data in ((f"{number}.png", picture.getvalue()), (f"{number}.txt", b"a caption")):
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

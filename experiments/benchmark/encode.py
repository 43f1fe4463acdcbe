"""Compares `ldm encode`, from tars on disk to a finished cache, with the encoder alone on images in memory.

    ldm bench encode --json FILE

Both alternate in this process on the same number of images with the included autoencoder: small images, the hardest
case, of 96 × 96 with transparency at 64 × 64, and photographs of 384 × 256 at 256 × 256. The encoder has all cores but
one, which is left to the decoding processes; with a GPU they would have all. `processor` is the time of this process
only, so it shows the share without other jobs on the machine.
"""

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from experiments.benchmark.loader import photograph, write_tar
from ldm.__main__ import main
from ldm.weights.parts import Encoder, first_stage

ROUNDS, BATCH, SHARDS = 3, 32, 2
CASES = {"64": (64, 4096), "256": (256, 256)}  # side and number of images
Times = tuple[float, float]  # seconds of wall time and of this process's processor time


def emoji_like(seed: int) -> bytes:
    """Returns a 96 × 96 PNG with transparency, like an emoji."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((96, 96), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, side: int, count: int) -> None:
    different = [("png", emoji_like(k)) if side == 64 else ("jpg", photograph((384, 256), k)) for k in range(64)]
    for shard in range(SHARDS):
        files: dict[str, bytes] = {}
        for k in range(shard, count, SHARDS):
            extension, data = different[k % len(different)]
            files |= {f"{k:06d}.{extension}": data, f"{k:06d}.txt": b"a caption"}
        write_tar(folder / f"{side}-{shard}.tar", files)


def timed(work: Callable[[], Any]) -> Times:
    began, spent = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - spent


def encode_command(folder: Path, side: int) -> None:
    with tempfile.TemporaryDirectory() as out, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        options = ["--size", str(side), "--batch", str(BATCH), "--out", out]
        assert main(["encode", f"{folder}/{side}-*.tar", *options]) == 0


def encode_in_memory(encode: Callable[[torch.Tensor], torch.Tensor], side: int, count: int) -> None:
    images = torch.randint(256, (BATCH, 3, side, side), dtype=torch.uint8)
    for _ in range(count // BATCH):
        encode(images)


def compare(folder: Path, side: int, count: int) -> dict[str, float]:
    """Returns images per second, as medians of interleaved rounds after a warm-up, and the command's share."""
    write_shards(folder, side, count)
    encode = Encoder(first_stage("assets:vae.safetensors"))
    encode_in_memory(encode, side, BATCH)
    contenders = {
        "command": partial(encode_command, folder, side),
        "encoder": partial(encode_in_memory, encode, side, count),
    }
    found = [{name: timed(work) for name, work in contenders.items()} for _ in range(ROUNDS)]
    speeds: dict[str, float] = {}
    for place, unit in enumerate(("clock", "processor")):
        rates = {name: median(count / times[name][place] for times in found) for name in contenders}
        share = median(times["encoder"][place] / times["command"][place] for times in found)
        speeds |= {f"{name}_{unit}": rate for name, rate in rates.items()} | {f"share_{unit}": share}
    return speeds


def print_table(cases: dict[str, dict[str, float]]) -> None:
    print("images/s         command   encoder   share   share of processor time", file=sys.stderr)
    for side, speeds in cases.items():
        rates = f"{speeds['command_clock']:10.4g}{speeds['encoder_clock']:10.4g}"
        shares = f"{speeds['share_clock']:8.1%}{speeds['share_processor']:10.1%}"
        print(f"{side + ' x ' + side:<14}{rates}{shares}", file=sys.stderr)


def measure() -> dict[str, Any]:
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores - 1))
    with tempfile.TemporaryDirectory() as name:
        cases = {case: compare(Path(name), side, count) for case, (side, count) in CASES.items()}
    print_table(cases)
    return {
        "cases": cases,
        "unit": "pictures/s",
        "settings": {"counts": {case: count for case, (_, count) in CASES.items()}, "batch": BATCH, "rounds": ROUNDS},
        "machine": {"cores": cores, "threads": torch.get_num_threads(), "gpu": torch.cuda.is_available()},
    }

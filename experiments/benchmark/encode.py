"""`ldm encode`, from tars on disk to a finished cache, beside the encoder alone on pictures that lie in memory.

    ldm bench encode --json FILE

Both in this process by turns, on as many pictures, with the autoencoder that ships: small pictures, which are the
hardest case, of 96 × 96 with transparency at 64 × 64, and photographs of 384 × 256 at 256 × 256. The encoder has all
cores but one, which is left to the processes that decode, as a GPU leaves them all. `processor` is of this process
alone, and so tells the share that would be had if other jobs took nothing.
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
from ldm.weights.parts import encoder, first_stage

ROUNDS, BATCH, SHARDS = 3, 32, 2
CASES = {"64": (64, 4096), "256": (256, 256)}  # side and how many
Times = tuple[float, float]  # seconds, of the clock and of this process's work


def drawing(seed: int) -> bytes:
    """A PNG of 96 × 96 with transparency, as an emoji has it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((96, 96), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, side: int, count: int) -> None:
    different = [("png", drawing(k)) if side == 64 else ("jpg", photograph((384, 256), k)) for k in range(64)]
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
    pictures = torch.randint(256, (BATCH, 3, side, side), dtype=torch.uint8)
    for _ in range(count // BATCH):
        encode(pictures)


def compare(folder: Path, side: int, count: int) -> dict[str, float]:
    """Pictures a second, medians over interleaved rounds after a short one to warm up, and the command's share."""
    write_shards(folder, side, count)
    encode = encoder(first_stage("assets:vae.safetensors"))
    encode_in_memory(encode, side, BATCH)
    contenders = {
        "command": partial(encode_command, folder, side),
        "encoder": partial(encode_in_memory, encode, side, count),
    }
    found = [{name: timed(work) for name, work in contenders.items()} for _ in range(ROUNDS)]
    told: dict[str, float] = {}
    for place, unit in enumerate(("clock", "processor")):
        rates = {name: median(count / times[name][place] for times in found) for name in contenders}
        share = median(times["encoder"][place] / times["command"][place] for times in found)
        told |= {f"{name}_{unit}": rate for name, rate in rates.items()} | {f"share_{unit}": share}
    return told


def tell(cases: dict[str, dict[str, float]]) -> None:
    print("pictures/s       command   encoder   share   share of processor time", file=sys.stderr)
    for side, told in cases.items():
        rates = f"{told['command_clock']:10.4g}{told['encoder_clock']:10.4g}"
        shares = f"{told['share_clock']:8.1%}{told['share_processor']:10.1%}"
        print(f"{side + ' x ' + side:<14}{rates}{shares}", file=sys.stderr)


def measure() -> dict[str, Any]:
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores - 1))
    with tempfile.TemporaryDirectory() as name:
        cases = {told: compare(Path(name), side, count) for told, (side, count) in CASES.items()}
    tell(cases)
    return {
        "cases": cases,
        "unit": "pictures/s",
        "settings": {"counts": {told: count for told, (_, count) in CASES.items()}, "batch": BATCH, "rounds": ROUNDS},
        "machine": {"cores": cores, "threads": torch.get_num_threads(), "gpu": torch.cuda.is_available()},
    }

"""Estimates storage, network, processor and GPU hours of LAION, from 2 B rows of metadata to training.

Writes plan.json beside this file and prints the table of README.md:  python -m experiments.laion.plan
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.files import write_json
from ldm.metadata.forecast import JPEG_BYTES_PER_PIXEL, MOMENTS_BYTES_PER_PIXEL
from ldm.nn.vae import VAE

HERE = Path(__file__).parent
ROWS, IMAGES, SIDE, SHARD = 2_000_000_000, 600_000_000, 512, 10_000
DAY, TB = 86400, 1e12

# Rates that were not measured here, with their sources.
DOWNLOAD = 100e6 / (20 * 3600)  # URLs per second on a machine with 16 cores: img2dataset's README, 100 M in 20 h
ALIVE = 0.7  # share of URLs that still respond: a guess, which decreases every year
PEAK, SHARE = 989e12, 0.4  # H100, dense bfloat16, data sheet; the VAE's share of the peak is a guess
TRAINED = 1095  # images per second on 8 x H100 from cached moments, MLPerf's Stable Diffusion
INDEX = 4 * 8 + 1 + 4 + 9 + 8  # bytes per sample: spans, kind, hash, key of nine letters and its end


def encoder_flops() -> int:
    """Returns the FLOPs of Stable Diffusion's encoder for one image, counted on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VAE().moments(torch.empty(1, 3, SIDE, SIDE))
    return counter.get_total_flops()


def plan(filtering: dict[str, Any], loading: dict[str, Any], flops: int) -> list[dict[str, Any]]:
    """Returns one row per step: its name, amount, unit and derivation."""
    ours = filtering["contenders"]["ldm"]
    requests = IMAGES / ALIVE
    encoded = PEAK * SHARE / flops
    jpeg, moments = (SIDE**2 * of for of in (JPEG_BYTES_PER_PIXEL, MOMENTS_BYTES_PER_PIXEL))
    rows = [
        ("metadata", ROWS * filtering["bytes"] / filtering["rows"] / 1e9, "GB", "bytes per row of `ldm bench filter`"),
        ("filter", ROWS / filtering["rows"] * ours["seconds"] / 3600, "h", f"{filtering['cores']} cores, measured"),
        ("URLs to request", requests / 1e6, "M", f"{ALIVE:.0%} respond (a guess)"),
        ("download", requests / DOWNLOAD / DAY, "days on one machine", "img2dataset's rate; 10 machines take a tenth"),
        ("images", IMAGES * jpeg / TB, "TB", f"{jpeg / 1e3:.0f} kB each at {SIDE} px, like LAION-5B's"),
        ("incoming traffic", DOWNLOAD * ALIVE * jpeg * 8 / 1e9, "Gbit/s per machine", "or more, for larger originals"),
        ("shards", IMAGES / SHARD, "tars", f"{SHARD:,} samples each, img2dataset's default"),
        ("index of all shards", IMAGES * INDEX / 1e9, "GB", f"{INDEX} bytes per sample, memory-mapped"),
        ("encode", IMAGES / encoded / 3600, "H100 hours", f"{flops / 1e12:.2f} TFLOP each, {SHARE:.0%} of peak"),
        ("input of one encoding GPU", encoded * jpeg / 1e6, "MB/s", f"{encoded:.0f} images/s"),
        ("cache", IMAGES * moments / TB, "TB", f"{moments / 1024:.0f} KiB of moments each"),
        ("split", IMAGES * (4 + 8) / 1e9, "GB of memory", "hash (memory-mapped) and position of every sample"),
        ("input of 8 x H100 in training", TRAINED * moments / 1e6, "MB/s", "random reads from the cache"),
        ("data loading", TRAINED / loading["latents"]["ldm"] * 100, "% of one core", "`ldm bench loader`, page cache"),
        ("one epoch", IMAGES / TRAINED / DAY, "days of 8 x H100", "MLPerf's rate"),
    ]  # fmt: skip
    return [dict(zip(("what", "amount", "unit", "from"), row, strict=True)) for row in rows]


def main() -> None:
    filtering, loading = (
        json.loads((HERE.parent / "benchmark" / f"{name}.json").read_text()) for name in ("filter", "loader")
    )
    rows = plan(filtering, loading, encoder_flops())
    write_json(HERE / "plan.json", rows)
    print("| step | amount | derived from |\n|---|---|---|")
    for row in rows:
        amount = f"{row['amount']:,.0f}" if row["amount"] >= 1000 else f"{row['amount']:.3g}"
        print(f"| {row['what']} | {amount} {row['unit']} | {row['from']} |")


if __name__ == "__main__":
    main()

"""Storage, network, processor and GPU hours of LAION from 2 B rows of metadata to a training, from measured rates.

Writes plan.json beside itself and prints the table of README.md:  python -m experiments.laion.plan
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
ROWS, PICTURES, SIDE, SHARD = 2_000_000_000, 600_000_000, 512, 10_000
DAY, TB = 86400, 1e12

# What nobody here has measured, with its source.
DOWNLOAD = 100e6 / (20 * 3600)  # addresses a second and machine of 16 cores: img2dataset's README, 100 M in 20 h
ALIVE = 0.7  # share of addresses that still answer: a guess, which every year makes smaller
PEAK, SHARE = 989e12, 0.4  # H100, dense bfloat16, from its data sheet; the share of it that the VAE reaches is a guess
TRAINED = 1095  # pictures a second of 8 x H100 from cached moments, MLPerf's Stable Diffusion
INDEX = 4 * 8 + 1 + 4 + 9 + 8  # bytes a sample: spans, kind, hash, key of nine letters and its end


def encoder_flops() -> int:
    """Of Stable Diffusion's encoder on one picture, counted without computing it."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VAE().moments(torch.empty(1, 3, SIDE, SIDE))
    return counter.get_total_flops()


def plan(filtering: dict[str, Any], loading: dict[str, Any], flops: int) -> list[dict[str, Any]]:
    """A row a step: what, how much, unit, and how it was worked out."""
    ours = filtering["contenders"]["ldm"]
    asked = PICTURES / ALIVE
    encoded = PEAK * SHARE / flops
    jpeg, moments = (SIDE**2 * of for of in (JPEG_BYTES_PER_PIXEL, MOMENTS_BYTES_PER_PIXEL))
    rows = [
        ("metadata", ROWS * filtering["bytes"] / filtering["rows"] / 1e9, "GB", "bytes a row of `ldm bench filter`"),
        ("filter", ROWS / filtering["rows"] * ours["seconds"] / 3600, "h", f"{filtering['cores']} cores, measured"),
        ("addresses to ask", asked / 1e6, "M", f"{ALIVE:.0%} answer (a guess)"),
        ("download", asked / DOWNLOAD / DAY, "days on one machine", "img2dataset's own figure; 10 machines, a tenth"),
        ("pictures", PICTURES * jpeg / TB, "TB", f"{jpeg / 1e3:.0f} kB each at {SIDE} px, as LAION-5B's"),
        ("network in", DOWNLOAD * ALIVE * jpeg * 8 / 1e9, "Gbit/s a machine", "at least: originals may be larger"),
        ("shards", PICTURES / SHARD, "tars", f"{SHARD:,} samples each, img2dataset's default"),
        ("index of all shards", PICTURES * INDEX / 1e9, "GB", f"{INDEX} bytes a sample, mapped"),
        ("encode", PICTURES / encoded / 3600, "H100 hours", f"{flops / 1e12:.2f} TFLOP each, {SHARE:.0%} of peak"),
        ("to feed a GPU that encodes", encoded * jpeg / 1e6, "MB/s", f"{encoded:.0f} pictures/s"),
        ("cache", PICTURES * moments / TB, "TB", f"{moments / 1024:.0f} KiB of moments each"),
        ("split", PICTURES * (4 + 8) / 1e9, "GB of memory", "hash, mapped, and place of every sample"),
        ("to feed 8 x H100 that train", TRAINED * moments / 1e6, "MB/s", "from the cache, at random"),
        ("their loaders", TRAINED / loading["latents"]["ldm"] * 100, "% of one core", "`ldm bench loader`, page cache"),
        ("one epoch", PICTURES / TRAINED / DAY, "days of 8 x H100", "MLPerf's rate"),
    ]  # fmt: skip
    return [dict(zip(("what", "amount", "unit", "from"), row, strict=True)) for row in rows]


def main() -> None:
    filtering, loading = (
        json.loads((HERE.parent / "benchmark" / f"{name}.json").read_text()) for name in ("filter", "loader")
    )
    rows = plan(filtering, loading, encoder_flops())
    write_json(HERE / "plan.json", rows)
    print("| | | |\n|---|---|---|")
    for row in rows:
        amount = f"{row['amount']:,.0f}" if row["amount"] >= 1000 else f"{row['amount']:.3g}"
        print(f"| {row['what']} | {amount} {row['unit']} | {row['from']} |")


if __name__ == "__main__":
    main()

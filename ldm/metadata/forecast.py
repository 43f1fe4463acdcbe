"""What a filter would keep, and what that would cost to download and to encode, from footers and a sample."""

import math
from typing import Any

import pyarrow.parquet as pq

from ldm.data.sources.storage import with_retries
from ldm.metadata.columns import NUMBERS
from ldm.metadata.filtering import FileGroup, is_text

# LAION-5B stored 5.85 G pictures of 384 x 384 in 240 TB (its announcement, laion.ai/blog/laion-5b).
JPEG_BYTES_PER_PIXEL = 240e12 / 5.85e9 / 384**2
MOMENTS_BYTES_PER_PIXEL = 2 * 4 * 2 / 8**2  # mean and log-variance, 4 channels, float16, one latent pixel for 8 x 8


def predicted(
    rows: int, sample: int, kept: int, written_bytes: int, size: int, alive: float, speed: float
) -> dict[str, Any]:
    """Of `rows`, as `kept` of the `sample`. `size` in pixels a side, `alive` the share of addresses that still answer.

    The interval is Wilson's, 95 %, and supposes that the sample's rows are like all others.
    """
    share = kept / sample if sample else 0.0
    low, high = _wilson(kept, sample)
    all_kept = round(rows * share)
    pictures = round(all_kept * alive)
    return {
        "rows": rows,
        "sampled_rows": sample,
        "kept_share": share,
        "kept_rows": all_kept,
        "kept_rows_95": [round(rows * low), round(rows * high)],
        "metadata_bytes": round(all_kept * written_bytes / kept) if kept else 0,
        "pictures": pictures,
        "picture_bytes": round(pictures * size**2 * JPEG_BYTES_PER_PIXEL),
        "download_hours": all_kept / speed / 3600,
        "cache_bytes": round(pictures * size**2 * MOMENTS_BYTES_PER_PIXEL),
        "assumed": {"size": size, "alive": alive, "pictures_per_second": speed},
    }


def _wilson(kept: int, sample: int, z: float = 1.96) -> tuple[float, float]:
    if not sample:
        return 0.0, 1.0
    share, scale = kept / sample, 1 + z**2 / sample
    half = z * math.sqrt(share * (1 - share) / sample + z**2 / (4 * sample**2))
    return max(0.0, (share + z**2 / (2 * sample) - half) / scale), min(
        1.0, (share + z**2 / (2 * sample) + half) / scale
    )


def statistics(files: FileGroup) -> dict[str, dict[str, Any]]:
    """Minimum, maximum and number of nulls of each column of numbers, where the footers tell them."""
    found: dict[str, dict[str, Any]] = {}
    for source in files.sources:

        def footer(source: Any = source) -> Any:
            with source.filesystem.open(source.path, "rb") as file, pq.ParquetFile(file) as parquet:
                return parquet.metadata

        metadata = with_retries(footer, source.path, source.filesystem)
        positions = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
        for name in (
            n for n in NUMBERS if n in files.columns and not is_text(files.kind(n))
        ):  # text sorts 1000 below 999
            for group in range(metadata.num_row_groups):
                told = metadata.row_group(group).column(positions[files.columns[name]]).statistics
                if told is not None:
                    _widen(found.setdefault(name, {"min": None, "max": None, "nulls": 0}), told)
    return found


def _widen(known: dict[str, Any], told: Any) -> None:
    known["nulls"] += told.null_count or 0
    # Absent where all values are null; some writers put NaN, which the format tells readers to ignore.
    if told.has_min_max and told.min == told.min and told.max == told.max:
        known["min"] = told.min if known["min"] is None else min(known["min"], told.min)
        known["max"] = told.max if known["max"] is None else max(known["max"], told.max)

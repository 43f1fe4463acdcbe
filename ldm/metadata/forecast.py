"""Predicts the rows that a filter keeps and the cost of downloading and encoding them, from footers and a sample."""

import math
import struct
from typing import Any

import pyarrow.parquet as pq

from ldm.data.sources.storage import with_retries
from ldm.metadata.columns import NUMBERS
from ldm.metadata.filtering import FileGroup
from ldm.metadata.kinds import is_text

# LAION-5B takes 240 TB for 5.85 G images of 384 x 384 (announcement, laion.ai/blog/laion-5b).
JPEG_BYTES_PER_PIXEL = 240e12 / 5.85e9 / 384**2
MOMENTS_BYTES_PER_PIXEL = 2 * 4 * 2 / 8**2  # mean and log-variance, 4 channels, float16, one latent pixel for 8 x 8


def predict(
    rows: int, sample: int, kept: int, written_bytes: int, size: int, alive: float, speed: float
) -> dict[str, Any]:
    """Extrapolates from `kept` of the `sample` rows to all `rows`.

    `size` is in pixels per side, `alive` the share of URLs that still answer, and `speed` in URLs per second. The
    interval is Wilson's with 95 % confidence and assumes that the sample is representative.
    """
    share = kept / sample if sample else 0.0
    low, high = _wilson(kept, sample)
    all_kept = round(rows * share)
    images = round(all_kept * alive)
    return {
        "rows": rows,
        "sampled_rows": sample,
        "kept_share": share,
        "kept_rows": all_kept,
        "kept_rows_95": [round(rows * low), round(rows * high)],
        "metadata_bytes": round(all_kept * written_bytes / kept) if kept else 0,
        "pictures": images,
        "picture_bytes": round(images * size**2 * JPEG_BYTES_PER_PIXEL),
        "download_hours": all_kept / speed / 3600,
        "cache_bytes": round(images * size**2 * MOMENTS_BYTES_PER_PIXEL),
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
    """Returns the minimum, maximum and number of nulls of each numeric column, as far as the footers have them."""
    found: dict[str, dict[str, Any]] = {}
    for source in files.sources:

        def footer(source: Any = source) -> Any:
            with source.filesystem.open(source.path, "rb") as file, pq.ParquetFile(file) as parquet:
                return parquet.metadata

        metadata = with_retries(footer, source.path, source.filesystem)
        positions = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
        # Numbers stored as text are left out, because their minimum and maximum are in text order (1000 below 999).
        for name in (n for n in NUMBERS if n in files.columns and not is_text(files.kind(n))):
            for group in range(metadata.num_row_groups):
                column = metadata.row_group(group).column(positions[files.columns[name]])
                if column.statistics is not None:
                    _widen(found.setdefault(name, {"min": None, "max": None, "nulls": 0}), column.statistics)
    return found


def _widen(known: dict[str, Any], added: Any) -> None:
    known["nulls"] += added.null_count or 0
    # Absent if all values are null; some writers store NaN, which readers must ignore according to the format.
    if added.has_min_max and (low := _value(added.min)) == low and (high := _value(added.max)) == high:
        known["min"] = low if known["min"] is None else min(known["min"], low)
        known["max"] = high if known["max"] is None else max(known["max"], high)


def _value(stored: Any) -> Any:
    """Returns a minimum or maximum as a number; pyarrow has those of a float16 column as bytes."""
    return struct.unpack("<e", stored)[0] if isinstance(stored, bytes) else stored

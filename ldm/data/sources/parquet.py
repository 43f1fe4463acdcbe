"""Reads Parquet files row by row: caption tables, and Hugging Face data sets with encoded images."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BATCH = 64  # rows in memory at a time, since each may hold an image


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields each row as a dict. Raises ValueError if the file cannot be read or pyarrow is not installed."""
    with _opened(path) as file:
        for batch in file.iter_batches(BATCH):
            yield from batch.to_pylist()


def row_count(path: Path) -> int:
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def image_column(path: Path) -> str | None:
    """Returns the column that has images as {"bytes": …} or as bytes, or None if there is none."""
    with _opened(path) as file:
        names = [field.name for field in file.schema_arrow if _holds_bytes(field.type)]
    return next((name for name in ("image", "jpg", "png", "img") if name in names), names[0] if names else None)


def image_bytes(value: Any) -> bytes | None:
    """Returns the encoded image in a cell of the `image_column`, or None for null or a path without bytes."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) and content else None


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(kind[k].name == "bytes" and _holds_bytes(kind[k].type) for k in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error

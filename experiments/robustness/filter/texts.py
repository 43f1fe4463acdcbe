"""Writes csv, tsv and jsonl files as bytes, so that they can contain invalid text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

NULLS = (b"", b"NULL", b"null", b"None", rb"\N")  # represent a missing value in a csv or tsv
Columns = Mapping[str, Sequence[bytes | None]]


def write(path: Path, columns: Columns) -> None:
    """Writes the columns in the format of the path's suffix: .csv, .tsv or .jsonl."""
    rows = zip(*columns.values(), strict=True)
    if path.suffix == ".jsonl":
        lines = [_object(dict(zip(columns, row, strict=True))) for row in rows]
    else:
        delimiter = b"," if path.suffix == ".csv" else b"\t"
        header = delimiter.join(name.encode() for name in columns)
        lines = [header, *(delimiter.join(_field(value, delimiter) for value in row) for row in rows)]
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def _field(value: bytes | None, delimiter: bytes) -> bytes:
    if value is None:
        return b""
    quoted = value.startswith(b'"') or any(mark in value for mark in (delimiter, b"\r", b"\n"))
    return b'"' + value.replace(b'"', b'""') + b'"' if quoted else value


def _object(row: Mapping[str, bytes | None]) -> bytes:
    texts = {name: None if value is None else value.decode("utf-8", "surrogateescape") for name, value in row.items()}
    return json.dumps(texts, ensure_ascii=False).encode("utf-8", "surrogateescape")

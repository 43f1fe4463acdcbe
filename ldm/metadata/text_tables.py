"""Converts csv, tsv and jsonl metadata to parquet with columns of text.

Bytes are copied as they are, so that the reader of the parquet file decides what is valid text. In a csv, fields may be
quoted and contain line breaks. In a tsv, a tab or a line break always ends a field, and a field that is quoted as in a
csv is unquoted.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from gzip import BadGzipFile
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from ldm.data.sources.storage import in_one_line

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".jsonl", ".ndjson")
BLOCK_BYTES = 16 << 20  # the longest row of a csv
JSON_ROWS = 50_000
UNREADABLE = (pa.ArrowException, ValueError, EOFError, BadGzipFile, zlib.error)  # what a corrupt file raises
NULLS = ["", "NULL", "null", "None", r"\N"]


class NoHeader(ValueError):
    """Raised if the first line of a csv or tsv has values instead of names."""


def suffix(path: str) -> str:
    """Returns the file name's suffix in lower case, ignoring .gz."""
    return Path(path.lower().removesuffix(".gz")).suffix


@dataclass(frozen=True)
class Converted:
    """The result of a conversion: `lost` rows were left out, or an unknown number if it is None, for `reason`."""

    schema: pa.Schema
    rows: int
    lost: int | None
    reason: str


def convert(filesystem: AbstractFileSystem, path: str, header: Sequence[str] | None, out: Path) -> Converted:
    """Writes the readable rows to the parquet file `out`; `header` names the columns of a table without a header row.

    Raises NoHeader if a header row is missing, and another exception if the file cannot be read at all.
    """
    table = _Delimited(filesystem, path, header) if suffix(path) in DELIMITERS else _Json(filesystem, path)
    if not table.names:
        raise ValueError("it has no readable row")
    schema = pa.schema([(name, pa.string()) for name in table.names])
    rows = 0
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        try:
            for arrays in table.arrays():
                writer.write_table(pa.table([array.view(pa.string()) for array in arrays], schema=schema))
                rows += len(arrays[0])
        except UNREADABLE as error:
            return Converted(schema, rows, None, in_one_line(error))
    return Converted(schema, rows, table.lost, table.reason)


class _Delimited:
    """Reads a csv or tsv. After `arrays`, `lost` counts the rows with another number of fields than the header."""

    def __init__(self, filesystem: AbstractFileSystem, path: str, header: Sequence[str] | None) -> None:
        self.lost, self.reason = 0, ""
        self._filesystem, self._path, self._tsv = filesystem, path, suffix(path) == ".tsv"
        first = self._open(None, None).schema.names
        if header is None and any(name.lower().startswith(("http://", "https://")) for name in first):
            raise NoHeader(f"{path} has no header row: its first line has {', '.join(first)[:200]}")
        self._has_header = header is None or list(header) == first
        self.names = first if header is None else list(header)
        if len(self.names) != len(first):
            raise ValueError(f"{path} has {len(first)} columns, but --header names {len(self.names)}")

    def arrays(self) -> Iterator[list[pa.Array]]:
        for batch in self._open(self.names, self._skipped):
            yield [_unquoted(column) if self._tsv else column for column in batch.columns]

    def _open(self, names: list[str] | None, skipped: object) -> pyarrow.csv.CSVStreamingReader:
        file = self._filesystem.open(self._path, "rb", compression="infer")
        kinds = dict.fromkeys(names or (), pa.binary())
        return pyarrow.csv.open_csv(
            file,
            pyarrow.csv.ReadOptions(
                column_names=names, skip_rows=1 if names and self._has_header else 0, block_size=BLOCK_BYTES
            ),
            pyarrow.csv.ParseOptions(
                delimiter=DELIMITERS[suffix(self._path)],
                quote_char=False if self._tsv else '"',
                newlines_in_values=not self._tsv,
                invalid_row_handler=skipped or (lambda _: "skip"),
            ),
            pyarrow.csv.ConvertOptions(
                check_utf8=False,
                column_types=kinds,
                null_values=NULLS,
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )

    def _skipped(self, row: pyarrow.csv.InvalidRow) -> str:
        self.lost += 1
        self.reason = self.reason or f"a row has {row.actual_columns} fields instead of {row.expected_columns}"
        return "skip"


def _unquoted(column: pa.Array) -> pa.Array:
    """Returns the fields of a tsv with those that are quoted as in a csv unquoted."""
    quoted = pc.match_substring_regex(column, r'(?s)\A"(?:[^"]|"")*"\z')
    if not pc.any(quoted).as_py():
        return column
    inner = pc.replace_substring(pc.binary_slice(column, 1, -1), '""', '"')
    return pc.if_else(quoted, inner, column)


class _Json:
    """Reads one JSON object per line. After `arrays`, `lost` counts the lines that are not an object."""

    def __init__(self, filesystem: AbstractFileSystem, path: str) -> None:
        self.lost, self.reason = 0, ""
        self._filesystem, self._path = filesystem, path
        names: dict[str, None] = {}
        with suppress(*UNREADABLE):  # which arrays meets again, after the rows before it
            for row in self._rows():
                names |= dict.fromkeys(row)
        self.names, self.lost = list(names), 0

    def arrays(self) -> Iterator[list[pa.Array]]:
        batch: list[dict[str, object]] = []
        try:
            for row in self._rows():
                batch.append(row)
                if len(batch) == JSON_ROWS:
                    yield self._columns(batch)
                    batch = []
        except UNREADABLE:
            yield self._columns(batch)
            raise
        yield self._columns(batch)

    def _columns(self, rows: list[dict[str, object]]) -> list[pa.Array]:
        return [pa.array([_bytes(row.get(name)) for row in rows], pa.binary()) for name in self.names]

    def _rows(self) -> Iterator[dict[str, object]]:
        with self._filesystem.open(self._path, "rb", compression="infer") as file:
            for number, line in enumerate(cast(Iterable[bytes], cast(BinaryIO, file)), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig", "surrogateescape"))
                except (ValueError, RecursionError) as error:
                    row, reason = None, in_one_line(error)
                else:
                    reason = "it is not an object"
                if isinstance(row, dict):
                    yield {_name(name): value for name, value in row.items()}
                else:
                    self.lost += 1
                    self.reason = self.reason or f"line {number}: {reason}"


def _name(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def _bytes(value: object) -> bytes | None:
    """Returns a value of JSON as text; lists and objects are no value of metadata and become null."""
    if value is None or isinstance(value, (list, dict)):
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # an escaped lone surrogate, which is no text
        return text.encode("utf-8", "surrogatepass")

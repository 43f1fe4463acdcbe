"""Converts csv, tsv and jsonl metadata to parquet with columns of text.

Bytes are copied unchanged; the reader of the parquet file decides whether they are valid text. In a csv, quoted fields
may contain line breaks. In a tsv, a tab or a line break always ends a field, and a field that is quoted as in a csv is
unquoted.
"""

import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from gzip import BadGzipFile
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from ldm.data.sources.storage import in_one_line

DELIMITED = (".csv", ".tsv")
SUFFIXES = (*DELIMITED, ".jsonl", ".ndjson")
FIELD_BYTES = 16 << 20  # a longer field of a csv indicates a missing closing quote
CHUNK_ROWS = 20_000
UNREADABLE = (csv.Error, ValueError, EOFError, BadGzipFile, zlib.error)  # errors that reading a corrupt file raises
NULLS = {"", "NULL", "null", "None", r"\N"}
QUOTED = re.compile(r'"(?:[^"]|"")*"')
Row = TypeVar("Row")


class NoHeader(ValueError):
    """The first line of a csv or tsv contains values instead of column names."""


def suffix(path: str) -> str:
    """Returns the file name's suffix in lower case, ignoring .gz."""
    return Path(path.lower().removesuffix(".gz")).suffix


@dataclass(frozen=True)
class Converted:
    """The result of a conversion: `lost` rows were skipped (None: an unknown number) because of `reason`."""

    schema: pa.Schema
    rows: int
    lost: int | None
    reason: str


def convert(filesystem: AbstractFileSystem, path: str, header: Sequence[str] | None, out: Path) -> Converted:
    """Writes the readable rows to the parquet file `out`; `header` names the columns of a table without a header row.

    Raises NoHeader if a header row is missing, and another exception if the file cannot be read at all.
    """
    table = _Delimited(filesystem, path, header) if suffix(path) in DELIMITED else _Json(filesystem, path)
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


def in_chunks(rows: Iterator[Row], columns: Callable[[list[Row]], list[pa.Array]]) -> Iterator[list[pa.Array]]:
    """Yields columns in chunks of bounded size; rows before an unreadable part are yielded before it raises."""
    chunk: list[Row] = []
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == CHUNK_ROWS:
                yield columns(chunk)
                chunk = []
    except UNREADABLE:
        yield columns(chunk)
        raise
    yield columns(chunk)


class _Delimited:
    """Reads a csv or tsv. After `arrays`, `lost` counts the rows whose number of fields differs from the header's.

    Bytes are decoded as Latin-1, which maps every byte to a character, and encoded again unchanged.
    """

    def __init__(self, filesystem: AbstractFileSystem, path: str, header: Sequence[str] | None) -> None:
        self.lost, self.reason = 0, ""
        self._filesystem, self._path, self._tsv = filesystem, path, suffix(path) == ".tsv"
        first = next(self._rows(), [])
        names = [cell.encode("latin-1").decode("utf-8-sig") for cell in first]
        if header is None and any(name.lower().startswith(("http://", "https://")) for name in names):
            raise NoHeader(f"{path} has no header row: its first line has {', '.join(names)[:200]}")
        if header is not None and len(header) != len(names):
            raise ValueError(f"it has {len(names)} columns, but --header names {len(header)}")
        self.names = names if header is None else list(header)
        self._has_header = self.names == names

    def arrays(self) -> Iterator[list[pa.Array]]:
        rows = self._rows()
        if self._has_header:
            next(rows)
        yield from in_chunks(rows, self._complete)

    def _complete(self, rows: list[list[str]]) -> list[pa.Array]:
        complete = [row for row in rows if len(row) == len(self.names)]
        if len(complete) < len(rows):
            self.lost += len(rows) - len(complete)
            fields = next(len(row) for row in rows if len(row) != len(self.names))
            self.reason = self.reason or f"a row has {fields} fields instead of {len(self.names)}"
        columns = list(zip(*complete, strict=True)) or [()] * len(self.names)
        return [pa.array(map(self._cell, column), pa.binary()) for column in columns]

    def _cell(self, cell: str) -> bytes | None:
        if cell in NULLS:
            return None
        if self._tsv and QUOTED.fullmatch(cell):
            cell = cell[1:-1].replace('""', '"')
        return cell.encode("latin-1")

    def _rows(self) -> Iterator[list[str]]:
        csv.field_size_limit(FIELD_BYTES)
        with self._filesystem.open(self._path, "rb", compression="infer") as file:
            text = io.TextIOWrapper(cast(BinaryIO, file), "latin-1", newline="")
            if self._tsv:
                yield from filter(None, csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
            else:
                yield from filter(None, csv.reader(text))


class _Json:
    """Reads one JSON object per line. After `arrays`, `lost` counts the lines that are not objects."""

    def __init__(self, filesystem: AbstractFileSystem, path: str) -> None:
        self.lost, self.reason = 0, ""
        self._filesystem, self._path = filesystem, path
        names: dict[str, None] = {}
        with suppress(*UNREADABLE):  # `arrays` raises it again, after the rows before it
            for row in self._rows():
                names |= dict.fromkeys(row)
        self.names, self.lost = list(names), 0

    def arrays(self) -> Iterator[list[pa.Array]]:
        return in_chunks(self._rows(), self._columns)

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
    """Returns a JSON value as text; lists and objects are not valid metadata and become null."""
    if value is None or isinstance(value, (list, dict)):
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # an escaped lone surrogate, which is not valid text
        return text.encode("utf-8", "surrogatepass")

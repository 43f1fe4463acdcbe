"""Finds and reads metadata in files, folders and globs, on local disks or any file system of fsspec."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from ldm.data.sources.storage import in_one_line, is_local, with_retries
from ldm.metadata import text_tables
from ldm.metadata.kinds import is_text, plain

BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Source:
    """A parquet file and the content of its footer; `group_rows` is the number of rows of each row group.

    `original` is the path of the file that this one is a copy of.
    """

    filesystem: AbstractFileSystem
    path: str
    schema: pa.Schema
    group_rows: tuple[int, ...]
    bytes: int
    original: str | None = None

    @property
    def name(self) -> str:
        """The path that the user gave."""
        return self.original or self.path

    @property
    def rows(self) -> int:
        return sum(self.group_rows)

    @property
    def address(self) -> str:
        """The path, or protocol://path of a registered file system, that DuckDB opens."""
        return self.path if is_local(self.filesystem) else self.filesystem.unstrip_protocol(self.path)


@dataclass(frozen=True)
class Damaged:
    """An unreadable file, or unreadable rows of a file, and the reason."""

    path: str
    rows: int
    reason: str


def find(inputs: Iterable[str]) -> list[tuple[AbstractFileSystem, str]]:
    """Returns all metadata files of the inputs, in order; those of a folder or a glob are sorted by name.

    In a folder or a glob, csv, tsv and jsonl files count only if there is no parquet file. Raises FileNotFoundError for
    an input without metadata files, and ValueError for an address that cannot be opened or a file that occurs twice.
    """
    files = [file for given in inputs for file in _files_of(given)]
    seen = set()
    for filesystem, path in files:
        if (key := filesystem.unstrip_protocol(path)) in seen:
            raise ValueError(f"{path} is given twice: give each file once")
        seen.add(key)
    return files


def _files_of(given: str) -> list[tuple[AbstractFileSystem, str]]:
    try:
        filesystem, path = fsspec.url_to_fs(given)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {given}: {in_one_line(error)}") from error

    def listed() -> list[str]:
        if filesystem.isfile(path):
            return [path]
        # A folder can have a name like a pattern, such as "a [v2]".
        pattern = any(c in path for c in "*?[") and not filesystem.isdir(path)
        names = filesystem.glob(path) if pattern else filesystem.find(path)
        visible = sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith((".", "_")))
        tables = [name for name in visible if text_tables.suffix(name) in text_tables.SUFFIXES]
        return [name for name in visible if name.endswith(".parquet")] or tables

    paths = with_retries(listed, given, filesystem)
    if not paths:
        kinds = ", ".join((".parquet", *text_tables.SUFFIXES))
        raise FileNotFoundError(f"no metadata file at {given}: expected a file, a folder or a glob ({kinds})")
    return [(filesystem, path) for path in paths]


def open_sources(
    files: list[tuple[AbstractFileSystem, str]], folder: Path | None = None, header: Sequence[str] | None = None
) -> tuple[list[Source], list[Damaged]]:
    """Reads the footers of all files in parallel; csv, tsv and jsonl files are first converted into `folder`.

    `header` names the columns of a csv or tsv without a header row. Files that are truncated or not what their name
    says are returned as `Damaged`, and so are the rows that cannot be read.
    """
    texts = [text_tables.suffix(path) in text_tables.SUFFIXES for _, path in files]
    if folder is None and any(texts):
        raise ValueError(f"{files[texts.index(True)][1]} is not a parquet file: run ldm filter on it first")
    with ThreadPoolExecutor(16) as pool:
        footers = pool.map(lambda file: _opened(*file), (f for f, text in zip(files, texts, strict=True) if not text))
        opened, damaged = [], []
        for i, (file, text) in enumerate(zip(files, texts, strict=True)):
            if text and folder is not None:
                found, lost = _converted(*file, header, folder / f"table-{i}.parquet")
            else:
                found, lost = next(footers), []
            opened.append(found)
            damaged += lost
    sources = [found for found in opened if isinstance(found, Source)]
    return sources, [found for found in opened if isinstance(found, Damaged)] + damaged


def _converted(
    filesystem: AbstractFileSystem, path: str, header: Sequence[str] | None, out: Path
) -> tuple[Source | Damaged, list[Damaged]]:
    try:
        table = with_retries(lambda: text_tables.convert(filesystem, path, header, out), path, filesystem)
    except text_tables.NoHeader as error:
        raise ValueError(
            f"{error}: name its columns, as in --header url,caption, or give --preset cc12m if it is Conceptual 12M"
        ) from error
    except text_tables.UNREADABLE as error:
        return Damaged(path, 0, in_one_line(error)), []
    copy = _opened(fsspec.filesystem("file"), str(out))
    lost = [] if table.lost == 0 else [Damaged(path, table.lost or 0, table.reason)]
    return (replace(copy, original=path) if isinstance(copy, Source) else copy), lost


def _opened(filesystem: AbstractFileSystem, path: str) -> Source | Damaged:
    def footer() -> tuple[Any, pa.Schema, int]:
        try:
            with filesystem.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
                return parquet.metadata, parquet.schema_arrow, filesystem.size(path)
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # pyarrow reports some invalid content like this
                raise pa.ArrowInvalid(in_one_line(error)) from error
            raise

    try:
        metadata, schema, size = with_retries(footer, path, filesystem)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        return Damaged(path, 0, in_one_line(error))
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return Source(filesystem, path, schema, groups, size)


def batches(source: Source, columns: list[str], group: int) -> Iterator[pa.RecordBatch]:
    """Yields a row group in batches of a few tens of MiB, with text as bytes, so that invalid encodings are kept."""
    with source.filesystem.open(source.path, "rb") as file:
        parquet = pq.ParquetFile(file, buffer_size=1 << 20)
        metadata = parquet.metadata.row_group(group)
        rows = max(256, min(131_072, BATCH_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)))
        for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns):
            yield pa.record_batch([_as_bytes(column) for column in batch.columns], names=batch.schema.names)


def _as_bytes(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.binary()) if is_text(column.type) else column


def valid_text(batch: pa.RecordBatch, text: Iterable[str]) -> tuple[pa.RecordBatch, dict[str, int]]:
    """Decodes the `text` columns as UTF-8. Invalid text becomes null and is counted by column."""
    counts, arrays = {}, []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in text and pa.types.is_binary(column.type):
            column, counts[name] = _decoded(column)
        arrays.append(column)
    return pa.record_batch(arrays, names=batch.schema.names), counts


def _decoded(column: pa.Array) -> tuple[pa.Array, int]:
    try:
        return column.cast(pa.string()), 0
    except pa.ArrowInvalid:
        texts = [_text(value) for value in column.to_pylist()]
        return pa.array(texts, pa.string()), texts.count(None) - column.null_count


def _text(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def salvage(source: Source, columns: list[str], out: Path) -> tuple[Source, list[Damaged], dict[str, int]]:
    """Copies the readable rows of a corrupt file in order; returns the copy, the lost rows and the invalid texts.

    Each row group is read up to its first unreadable page.
    """
    lost, invalid, kept = [], dict.fromkeys(columns, 0), 0
    schema = pa.schema([_as_text(source.schema.field(name)) for name in columns])
    with pq.ParquetWriter(out, schema) as writer:
        for group, rows in enumerate(source.group_rows):
            done = 0
            try:
                for batch in batches(source, columns, group):
                    clean, counts = valid_text(batch, columns)
                    writer.write_batch(clean.cast(schema))
                    done += len(clean)
                    invalid = {name: n + counts.get(name, 0) for name, n in invalid.items()}
            except (OSError, pa.ArrowException) as error:
                lost.append(Damaged(source.name, rows - done, in_one_line(error)))
            kept += done
    local = fsspec.filesystem("file")
    return Source(local, str(out), schema, (kept,), out.stat().st_size), lost, invalid


def sample_rows(sources: list[Source], columns: list[str], rows: int, out: Path) -> Source:
    """Writes about `rows` rows of files with equal columns: the first rows of row groups spread evenly over them."""
    groups = [(source, group) for source in sources for group in range(len(source.group_rows))]
    picks = min(len(groups), 32)
    chosen = [groups[(2 * i + 1) * len(groups) // (2 * picks)] for i in range(picks)]
    schema = pa.schema([_as_text(sources[0].schema.field(name)) for name in columns])
    written = 0
    with pq.ParquetWriter(out, schema) as writer:
        for source, group in chosen:
            left = -(-rows // picks)
            for batch in batches(source, columns, group):
                clean, _ = valid_text(batch.slice(0, left), columns)
                writer.write_batch(clean.cast(schema))
                written, left = written + len(clean), left - len(clean)
                if left <= 0:
                    break
    return Source(fsspec.filesystem("file"), str(out), schema, (written,), out.stat().st_size)


def _as_text(field: pa.Field) -> pa.Field:
    return pa.field(field.name, pa.string() if is_text(field.type) else plain(field.type))

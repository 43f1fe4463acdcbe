"""Metadata in, the rows that pass every rule out, in bounded memory: the SQL that DuckDB streams."""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import duckdb
import pyarrow as pa

from ldm.data.sources.storage import is_local, protocol, with_retries
from ldm.metadata.columns import ALIASES, NUMBERS, SIDES, TYPES, resolve
from ldm.metadata.funnel import BINS, Axis, Tally
from ldm.metadata.rules import DUPLICATES, NORMALISED_URL, Rule, all_hold, failed, identifier, quoted
from ldm.metadata.tables import Damaged, Source, salvaged, sampled

MEMORY = "1000MB"  # of DuckDB, which spills to disk beyond it; the process around it takes some 300 MB
BATCH_ROWS = 4_000_000
BATCH_FILES = 64
# The minimum and maximum in a parquet footer leave NaN out. Without can_have_nan, DuckDB 2 infers from them that a
# column holds no NaN, and replaces isnan and comparisons by constants. With hive_partitioning, a folder named width=512
# would replace the column width.
READING = "binary_as_string = true, can_have_nan = true, hive_partitioning = false"
SAMPLE_ROWS = 100_000  # a histogram of more costs as much as all rules together, and looks the same


@dataclass(frozen=True)
class FileGroup:
    """Files that spell and type their columns alike. `columns`: our name → theirs."""

    sources: list[Source]
    columns: dict[str, str]

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    def kind(self, name: str) -> pa.DataType:
        kind = self.sources[0].schema.field(self.columns[name]).type
        return kind.value_type if pa.types.is_dictionary(kind) else kind


def file_groups(sources: list[Source], needed: Iterable[str], chosen: dict[str, str]) -> list[FileGroup]:
    """The files in their order, neighbours that are alike together; ValueError where a needed column is missing."""
    needed = list(needed)
    found = [(source, resolve(source.schema.names, needed, chosen, source.path)) for source in sources]

    def alike(pair: tuple[Source, dict[str, str]]) -> list[tuple[str, str, str]]:
        source, columns = pair
        return [(name, column, str(source.schema.field(column).type)) for name, column in columns.items()]

    grouped = [list(group) for _, group in groupby(found, alike)]
    return [FileGroup([source for source, _ in group], group[0][1]) for group in grouped]


def in_batches(group: FileGroup) -> Iterator[FileGroup]:
    """Enough files at a time to keep every core busy, few enough to tell how far the work is."""
    held: list[Source] = []
    for source in group.sources:
        if held and (sum(s.rows for s in held) + source.rows > BATCH_ROWS or len(held) == BATCH_FILES):
            yield FileGroup(held, group.columns)
            held = []
        held.append(source)
    yield FileGroup(held, group.columns)


def sample_of(groups: list[FileGroup], rows: int, folder: Path) -> list[FileGroup]:
    """Some of each group's rows, as files in `folder`, in proportion to its size."""
    total = sum(group.rows for group in groups)
    samples = []
    for i, group in enumerate(groups):
        share = -(-rows * group.rows // max(total, 1))
        source = sampled(group.sources, [*group.columns.values()], share, folder / f"sample-{i}.parquet")
        samples.append(FileGroup([source], group.columns))
    return samples


@contextmanager
def database(folder: Path, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database, which spills to `folder`. It loads no extension, and so reaches no network itself."""
    connection = duckdb.connect()
    try:
        connection.execute(f"SET memory_limit = '{MEMORY}'; SET threads = {threads}")
        connection.execute(f"SET temp_directory = {quoted(str(folder / 'spill'))}")
        connection.execute("SET autoinstall_known_extensions = false; SET autoload_known_extensions = false")
        yield connection
    finally:
        connection.close()


@dataclass
class Filter:
    """Streams metadata through the rules: `begin`, `add` for every batch, `finish`, `write` for every shard."""

    connection: duckdb.DuckDBPyConnection
    rules: list[Rule]
    axes: list[Axis]
    deduplicate: bool
    folder: Path
    tally: Tally = field(default_factory=Tally)
    damaged: list[Damaged] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    every: int = 1  # rows of the histograms

    def begin(self, groups: list[FileGroup]) -> None:
        """Make the table of what passes, with every known column that any file has."""
        for name in ALIASES:
            owners = [group for group in groups if name in group.columns]
            if owners:
                self.kinds[name] = _stored(name, [group.kind(name) for group in owners])
        listed = ", ".join(f"{name} {kind}" for name, kind in self.kinds.items())
        self.connection.execute(f"CREATE TABLE stage (failed USMALLINT, {listed})")
        self.connection.execute(f"CREATE TEMP TABLE sample ({listed})")
        self.every = max(1, sum(group.rows for group in groups) // SAMPLE_ROWS)
        for source in (source for group in groups for source in group.sources if not is_local(source.filesystem)):
            if not self.connection.filesystem_is_registered(protocol(source.filesystem)):
                self.connection.register_filesystem(source.filesystem)

    def add(self, group: FileGroup) -> None:
        """One batch. Where it cannot be read, each of its files; where a file cannot, what can be read of it."""
        try:
            self._scan(group)
        except OSError:
            if len(group.sources) == 1:
                self._scan_damaged(group)
            for source in group.sources if len(group.sources) > 1 else ():
                self.add(FileGroup([source], group.columns))

    def _scan_damaged(self, group: FileGroup) -> None:
        source, out = group.sources[0], self.folder / "salvaged.parquet"
        try:
            with_retries(lambda: self._scan(group), source.path, source.filesystem)
        except OSError:
            copy, lost, spoilt = salvaged(source, [*group.columns.values()], out)
            self._scan(FileGroup([copy], group.columns))
            self.damaged += lost
            self.tally.uncoercible.update({name: spoilt[column] for name, column in group.columns.items()})
            out.unlink()

    def _scan(self, group: FileGroup) -> None:
        """All of the batch or, on OSError, nothing of it."""
        self.connection.execute("BEGIN")
        try:
            counts = self._counted(group)
            self._stage(group)
        except (duckdb.Error, OSError) as error:
            self.connection.execute("ROLLBACK")
            raise OSError(" ".join(str(error).split())) from error
        self.connection.execute("COMMIT")
        self.tally.add(counts)

    def _counted(self, group: FileGroup) -> Tally:
        """What the rules over numbers say of every row, without reading any text; one in so many goes into `sample`."""
        counts = Tally(rows=group.rows)
        asked, names = [rule for rule in self.rules if not rule.text], self._asked()
        counted = [f"count(raw_{n}), count({n})" for n in names]
        values = ", ".join([f"{failed(asked)} AS mask", f"{self._picked(names)} AS picked", "count(*)", *counted])
        scan = f"SELECT {values} FROM {self._relation(group, names)} GROUP BY mask"
        self.connection.execute(f"CREATE OR REPLACE TEMP TABLE scanned AS {scan}")
        if names:
            self.connection.execute("INSERT INTO sample BY NAME SELECT unnest(picked, recursive := true) FROM scanned")
        for mask, rows, *found in self._rows("SELECT * EXCLUDE picked FROM scanned"):
            counts.number_masks[mask] += rows
            for name, there, ours in zip(names, found[::2], found[1::2], strict=True):
                counts.nulls[name] += rows - there
                counts.uncoercible[name] += there - ours
        return counts

    def _picked(self, names: list[str]) -> str:
        """SQL: the values of one row in so many, gathered on the way."""
        row = ", ".join(f"{name}: {name}" for name in names)
        return f"list({{{row}}}) FILTER (file_row_number % {self.every} = 0)" if names else "NULL"

    def _stage(self, group: FileGroup) -> None:
        """Into `stage`: the rows that pass every rule over numbers, with the set of rules over text that they fail.

        DuckDB keeps the order of the files and of their rows, so a rowid tells which of two came first.
        """
        asked = self._asked()
        fits = [condition for name in asked if (condition := _fits(name, name, group))]
        numeric, textual = ([rule for rule in self.rules if rule.text == text] for text in (False, True))
        kept = ", ".join(f"TRY_CAST({n if n in group.columns else 'NULL'} AS {kind})" for n, kind in self.kinds.items())
        self.connection.execute(
            f"INSERT INTO stage SELECT {failed(textual)}, {kept} "
            f"FROM {self._relation(group, group.columns, bare=asked)} WHERE {' AND '.join([all_hold(numeric), *fits])}"
        )

    def _asked(self) -> list[str]:
        """The columns of the rules over numbers."""
        return [n for n in self.kinds if any(n in rule.columns for rule in self.rules if not rule.text)]

    def _relation(self, group: FileGroup, names: Iterable[str], bare: Collection[str] = ()) -> str:
        """The files as a table of our columns, each also raw_, and of each row's number in its file.

        A number that does not fit our type becomes null, except in a `bare` column, whose comparisons are pushed down
        into the reader: there the caller must reject it.
        """
        columns = []
        for name in names:
            value, raw = _coerced(name, group), identifier(group.columns[name])
            if name not in bare and (fits := _fits(value, name, group)):
                value = f"CASE WHEN {fits} THEN {value} END"
            columns.append(f"{value} AS {name}, {raw} AS raw_{name}")
        listed = ", ".join(quoted(_literal(source)) for source in group.sources)
        columns.append("file_row_number")
        return f"(SELECT {', '.join(columns)} FROM read_parquet([{listed}], {READING}))"

    def finish(self) -> int:
        """Drop duplicates, the first of each URL staying; returns how many rows are kept.

        Groups are compared as whole strings, not as hashes, so none is dropped by a collision.
        """
        for mask, rows in self._rows("SELECT failed, count(*) FROM stage GROUP BY failed"):
            self.tally.text_masks[mask] += rows
        for axis in self.axes:
            self.tally.histograms[axis.title] = self._histogram(axis, "stage" if axis.text else "sample")
        for name in (n for n in ("url", "caption") if n in self.kinds):
            self.tally.nulls[name] += self._one(f"SELECT count(*) FROM stage WHERE {name} IS NULL")
        passed = "FROM stage WHERE failed = 0"
        kept = f"SELECT rowid AS row {passed}"
        if self.deduplicate:
            kept = f"SELECT min(rowid) AS row {passed} GROUP BY {NORMALISED_URL} ORDER BY row"
        self.connection.execute(f"CREATE TABLE kept AS {kept}")
        if self.deduplicate:
            rows, urls = self.tally.text_masks[0], self._one(f"SELECT count(DISTINCT url) {passed}")
            self.tally.duplicates = dict(
                zip(DUPLICATES, (rows - urls, urls - self._one("SELECT count(*) FROM kept")), strict=True)
            )
        return self.tally.kept

    def write(self, path: Path, first: int, last: int) -> None:
        """Rows first to last − 1 of what is kept, as parquet."""
        kept = f"SELECT row FROM kept WHERE rowid >= {first} AND rowid < {last}"
        rows = f"SELECT {', '.join(self.kinds)} FROM stage WHERE rowid IN ({kept}) ORDER BY rowid"
        self.connection.execute(f"COPY ({rows}) TO {quoted(str(path))} (FORMAT parquet, COMPRESSION zstd)")

    def _histogram(self, axis: Axis, relation: str) -> list[int]:
        counts = [0] * BINS
        for position, rows in self._rows(f"SELECT {axis.bin} AS bin, count(*) FROM {relation} GROUP BY bin"):
            if position is not None:
                counts[position] = rows
        return counts

    def _rows(self, query: str) -> list[tuple]:
        return self.connection.execute(query).fetchall()

    def _one(self, query: str) -> int:
        return int(self._rows(query)[0][0])


def _coerced(name: str, group: FileGroup) -> str:
    """SQL: the column as our type; bare where it has it already."""
    kind, column = group.kind(name), identifier(group.columns[name])
    bare = {
        "FLOAT": kind == pa.float32(),
        "DOUBLE": pa.types.is_integer(kind) or pa.types.is_floating(kind),
        "VARCHAR": is_text(kind),
        None: True,
    }[TYPES.get(name)]
    return column if bare else f"TRY_CAST({column} AS {TYPES[name]})"


def _fits(value: str, name: str, group: FileGroup) -> str | None:
    """SQL: whether the number can be stored as our type; None where every number of the column's own type can.

    TRY_CAST cannot tell: DuckDB below 2.0 casts 2147483647.5 to −2147483648.
    """
    kind = group.kind(name)
    if name in SIDES:
        narrow = pa.types.is_integer(kind) and kind.bit_width <= (32 if pa.types.is_signed_integer(kind) else 16)
        return None if narrow else f"{value} > -2147483648.5::DOUBLE AND {value} < 2147483647.5::DOUBLE"
    return f"isfinite({value})" if name in NUMBERS and not pa.types.is_integer(kind) else None


def _stored(name: str, kinds: list[pa.DataType]) -> str:
    """The type of the column that is written: pixels are whole; what names a row keeps the kind of its own."""
    if name in SIDES:
        return "INTEGER"
    if name in TYPES:
        return TYPES[name]
    if all(pa.types.is_integer(kind) and kind != pa.uint64() for kind in kinds):
        return "BIGINT"
    return "UBIGINT" if all(map(pa.types.is_unsigned_integer, kinds)) else "VARCHAR"


def is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))


def _literal(source: Source) -> str:
    """The address, so that DuckDB sees no pattern in it."""
    return re.sub(r"([*?\[])", r"[\1]", source.address) if is_local(source.filesystem) else source.address

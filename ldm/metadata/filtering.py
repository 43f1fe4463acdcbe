"""Filters the rows of metadata files by rules with DuckDB, in bounded memory."""

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
from ldm.metadata.kinds import is_readable, is_text, plain
from ldm.metadata.rules import DUPLICATES, NORMALISED_URL, Rule, all_hold, failure_mask, quoted
from ldm.metadata.tables import Damaged, Source, salvage, sample_rows

MEMORY = "1000MB"  # limit of DuckDB, which spills to disk beyond it; the rest of the process takes about 300 MB
BATCH_ROWS = 4_000_000
BATCH_FILES = 64
# The minimum and maximum in a parquet footer exclude NaN. Without can_have_nan, DuckDB 2 infers from them that a
# column has no NaN and replaces isnan and comparisons by constants. With hive_partitioning, a folder named width=512
# would replace the column width.
READING = "binary_as_string = true, can_have_nan = true, hive_partitioning = false"
SAMPLE_ROWS = 100_000  # a histogram of more rows takes as long as all rules together and looks the same


@dataclass(frozen=True)
class FileGroup:
    """Files with the same names and types of columns; `columns` maps standard names to those of the files."""

    sources: list[Source]
    columns: dict[str, str]

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    def kind(self, name: str) -> pa.DataType:
        return plain(self.sources[0].schema.field(self.columns[name]).type)

    def alias(self, name: str) -> str:
        """Returns the name that the SQL of `scan` gives the column; `name` is the standard name."""
        return f"c{self.sources[0].schema.names.index(self.columns[name])}"

    @property
    def scan(self) -> str:
        """SQL that reads the files, with columns named by position.

        DuckDB ignores the case of names, so that it would take WIDTH for width in a file that has both.
        """
        listed = ", ".join(quoted(_escaped_address(source)) for source in self.sources)
        aliases = ", ".join(f"c{i}" for i in range(len(self.sources[0].schema.names)))
        return f"read_parquet([{listed}], {READING}) AS files({aliases})"


def file_groups(sources: list[Source], needed: Iterable[str], chosen: dict[str, str]) -> list[FileGroup]:
    """Groups consecutive files with the same columns, in order. Raises ValueError if a needed column is missing."""
    needed = list(needed)
    found = [(source, _columns_of(source, needed, chosen)) for source in sources]

    def signature(pair: tuple[Source, dict[str, str]]) -> tuple[list[tuple[str, str, str]], list[str]]:
        source, columns = pair
        names = source.schema.names
        ambiguous = len({name.lower() for name in names}) < len(names)
        kinds = [(name, column, str(source.schema.field(column).type)) for name, column in columns.items()]
        return kinds, names if ambiguous else []

    grouped = [list(group) for _, group in groupby(found, signature)]
    return [FileGroup([source for source, _ in group], group[0][1]) for group in grouped]


def _columns_of(source: Source, needed: list[str], chosen: dict[str, str]) -> dict[str, str]:
    """Returns the columns of `resolve`, without those of an unusable type, which raise ValueError if needed."""
    columns = resolve(source.schema.names, needed, chosen, source.name)
    kinds = {name: source.schema.field(column).type for name, column in columns.items()}
    for name in (name for name, kind in kinds.items() if not is_readable(name, kind)):
        if name in needed or name in chosen:
            raise ValueError(
                f"{source.name} has values of type {kinds[name]} in {columns[name]}, its column for {name}: expected "
                f"{'text' if TYPES.get(name) == 'VARCHAR' else 'numbers or text'}; choose another with "
                f"--column {name}=COLUMN"
            )
        del columns[name]
    return columns


def in_batches(group: FileGroup) -> Iterator[FileGroup]:
    """Splits a group into batches that are large enough to use all cores and small enough to show progress."""
    batch: list[Source] = []
    for source in group.sources:
        if batch and (sum(s.rows for s in batch) + source.rows > BATCH_ROWS or len(batch) == BATCH_FILES):
            yield FileGroup(batch, group.columns)
            batch = []
        batch.append(source)
    yield FileGroup(batch, group.columns)


def sample_of(groups: list[FileGroup], rows: int, folder: Path) -> list[FileGroup]:
    """Writes about `rows` rows, from each group in proportion to its size, to files in `folder`."""
    total = sum(group.rows for group in groups)
    samples = []
    for i, group in enumerate(groups):
        share = -(-rows * group.rows // max(total, 1))
        source = sample_rows(group.sources, [*group.columns.values()], share, folder / f"sample-{i}.parquet")
        samples.append(FileGroup([source], group.columns))
    return samples


@contextmanager
def database(folder: Path, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """Opens an empty database that spills to `folder`. It loads no extensions, so it cannot access the network."""
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
    """Applies the rules to batches of metadata and writes the rows that pass.

    Call `create_tables`, then `add` for every batch, `finish`, and `write` for every shard.
    """

    connection: duckdb.DuckDBPyConnection
    rules: list[Rule]
    axes: list[Axis]
    deduplicate: bool
    folder: Path
    tally: Tally = field(default_factory=Tally)
    damaged: list[Damaged] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    every: int = 1  # histograms of numbers use one row in this many
    salvaged: int = 0  # number of corrupt files whose readable rows were copied

    def create_tables(self, groups: list[FileGroup]) -> None:
        """Creates the table of the rows that pass, with every known column that any file has."""
        for name in ALIASES:
            owners = [group for group in groups if name in group.columns]
            if owners:
                self.kinds[name] = _stored_type(name, [group.kind(name) for group in owners])
        listed = ", ".join(f"{name} {kind}" for name, kind in self.kinds.items())
        self.connection.execute(f"CREATE TABLE stage (failed USMALLINT, {listed})")
        self.connection.execute(f"CREATE TEMP TABLE sample ({listed})")
        self.every = max(1, sum(group.rows for group in groups) // SAMPLE_ROWS)
        for source in (source for group in groups for source in group.sources if not is_local(source.filesystem)):
            if not self.connection.filesystem_is_registered(protocol(source.filesystem)):
                self.connection.register_filesystem(source.filesystem)

    def add(self, group: FileGroup) -> None:
        """Filters a batch. If it is unreadable, filters each file, and of an unreadable file the readable rows."""
        try:
            self._scan(group)
        except OSError:
            if len(group.sources) == 1:
                self._scan_corrupt(group)
            for source in group.sources if len(group.sources) > 1 else ():
                self.add(FileGroup([source], group.columns))

    def _scan_corrupt(self, group: FileGroup) -> None:
        # Each copy has a unique name, because DuckDB caches pages of the files that it has read.
        source, out = group.sources[0], self.folder / f"salvaged-{self.salvaged}.parquet"
        self.salvaged += 1
        try:
            with_retries(lambda: self._scan(group), source.name, source.filesystem)
        except OSError:
            copy, lost, invalid = salvage(source, [*group.columns.values()], out)
            self._scan(FileGroup([copy], group.columns))
            self.damaged += lost
            counts = {name: invalid[column] for name, column in group.columns.items()}
            self.tally.uncoercible.update(counts)
            # Invalid text in a column of numbers is null in the copy, so that _count has counted it as null.
            self.tally.nulls.subtract({name: counts.get(name, 0) for name in self._numeric_columns()})
            out.unlink()

    def _scan(self, group: FileGroup) -> None:
        """Filters a batch in one transaction, which is rolled back if it raises OSError."""
        self.connection.execute("BEGIN")
        try:
            counts = self._count(group)
            self._stage(group)
        except (duckdb.Error, OSError) as error:
            self.connection.execute("ROLLBACK")
            raise OSError(" ".join(str(error).split())) from error
        self.connection.execute("COMMIT")
        self.tally.add(counts)

    def _count(self, group: FileGroup) -> Tally:
        """Counts rows by the failed rules over numbers and inserts one row in `every` into `sample`; reads no text."""
        counts = Tally(rows=group.rows)
        numeric, names = [rule for rule in self.rules if not rule.text], self._numeric_columns()
        present = [f"count(raw_{n}), count({n})" for n in names]
        values = ", ".join(
            [f"{failure_mask(numeric)} AS mask", f"{self._sampled_values(names)} AS sampled", "count(*)", *present]
        )
        scan = f"SELECT {values} FROM {self._relation(group, names)} GROUP BY mask"
        self.connection.execute(f"CREATE OR REPLACE TEMP TABLE scanned AS {scan}")
        if names:
            self.connection.execute("INSERT INTO sample BY NAME SELECT unnest(sampled, recursive := true) FROM scanned")
        for mask, rows, *found in self._rows("SELECT * EXCLUDE sampled FROM scanned"):
            counts.number_masks[mask] += rows
            for name, not_null, coerced in zip(names, found[::2], found[1::2], strict=True):
                counts.nulls[name] += rows - not_null
                counts.uncoercible[name] += not_null - coerced
        return counts

    def _sampled_values(self, names: list[str]) -> str:
        """Returns SQL for a list of the values of one row in `every`."""
        row = ", ".join(f"{name}: {name}" for name in names)
        return f"list({{{row}}}) FILTER (file_row_number % {self.every} = 0)" if names else "NULL"

    def _stage(self, group: FileGroup) -> None:
        """Inserts the rows that pass all rules over numbers into `stage`, with the set of text rules that they fail.

        DuckDB keeps the order of files and rows, so row ids are in the order of the input.
        """
        names = self._numeric_columns()
        in_range = [condition for name in names if (condition := _in_range(name, name, group))]
        numeric, textual = ([rule for rule in self.rules if rule.text == text] for text in (False, True))
        kept = ", ".join(f"TRY_CAST({n if n in group.columns else 'NULL'} AS {kind})" for n, kind in self.kinds.items())
        self.connection.execute(
            f"INSERT INTO stage SELECT {failure_mask(textual)}, {kept} "
            f"FROM {self._relation(group, group.columns, bare=names)} "
            f"WHERE {' AND '.join([all_hold(numeric), *in_range])}"
        )

    def _numeric_columns(self) -> list[str]:
        """Returns the columns of the rules over numbers."""
        return [n for n in self.kinds if any(n in rule.columns for rule in self.rules if not rule.text)]

    def _relation(self, group: FileGroup, names: Iterable[str], bare: Collection[str] = ()) -> str:
        """Returns SQL for the files as a table of standard columns, raw_ columns and the row numbers in the files.

        A number out of the range of its type becomes null, except in `bare` columns, whose comparisons are pushed down
        into the reader, so that the caller must reject such numbers.
        """
        columns = []
        for name in names:
            value, raw = _coerced_column(name, group), group.alias(name)
            if name not in bare and (in_range := _in_range(value, name, group)):
                value = f"CASE WHEN {in_range} THEN {value} END"
            columns.append(f"{value} AS {name}, {raw} AS raw_{name}")
        columns.append("file_row_number")
        return f"(SELECT {', '.join(columns)} FROM {group.scan})"

    def finish(self) -> int:
        """Drops duplicates, of which the first is kept, and returns the number of rows that are kept.

        URLs are compared as strings rather than as hashes, so that no row is dropped by a collision.
        """
        for mask, rows in self._rows("SELECT failed, count(*) FROM stage GROUP BY failed"):
            self.tally.text_masks[mask] += rows
        for axis in self.axes:
            self.tally.histograms[axis.title] = self._histogram(axis, "stage" if axis.text else "sample")
        for name in (n for n in ("url", "caption") if n in self.kinds):
            self.tally.nulls[name] += self._scalar(f"SELECT count(*) FROM stage WHERE {name} IS NULL")
        passed = "FROM stage WHERE failed = 0"
        kept = f"SELECT rowid AS row {passed}"
        if self.deduplicate:
            kept = f"SELECT min(rowid) AS row {passed} GROUP BY {NORMALISED_URL} ORDER BY row"
        self.connection.execute(f"CREATE TABLE kept AS {kept}")
        if self.deduplicate:
            rows, urls = self.tally.text_masks[0], self._scalar(f"SELECT count(DISTINCT url) {passed}")
            self.tally.duplicates = dict(
                zip(DUPLICATES, (rows - urls, urls - self._scalar("SELECT count(*) FROM kept")), strict=True)
            )
        return self.tally.kept

    def write(self, path: Path, first: int, last: int) -> None:
        """Writes the kept rows `first` to `last` − 1 to a parquet file."""
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

    def _scalar(self, query: str) -> int:
        return int(self._rows(query)[0][0])


def _coerced_column(name: str, group: FileGroup) -> str:
    """Returns SQL for the column, cast to its standard type if it has another."""
    kind, column = group.kind(name), group.alias(name)
    bare = {
        "FLOAT": kind == pa.float32(),
        "DOUBLE": pa.types.is_integer(kind) or pa.types.is_floating(kind),
        "VARCHAR": is_text(kind),
        None: True,
    }[TYPES.get(name)]
    if pa.types.is_decimal(kind):  # because DuckDB divides in float32 to cast a decimal to FLOAT
        column = f"{column}::DOUBLE"
    return column if bare else f"TRY_CAST({column} AS {TYPES[name]})"


def _in_range(value: str, name: str, group: FileGroup) -> str | None:
    """Returns SQL for whether a number is in the range of its standard type, None if all of the column's type are.

    TRY_CAST is not enough, because DuckDB below 2.0 casts 2147483647.5 to −2147483648.
    """
    kind = group.kind(name)
    if name in SIDES:
        narrow = pa.types.is_integer(kind) and kind.bit_width <= (32 if pa.types.is_signed_integer(kind) else 16)
        return None if narrow else f"{value} > -2147483648.5::DOUBLE AND {value} < 2147483647.5::DOUBLE"
    return f"isfinite({value})" if name in NUMBERS and not pa.types.is_integer(kind) else None


def _stored_type(name: str, kinds: list[pa.DataType]) -> str:
    """Returns the SQL type to write: integers for pixels; identifiers keep their kind."""
    if name in SIDES:
        return "INTEGER"
    if name in TYPES:
        return TYPES[name]
    if all(pa.types.is_floating(kind) for kind in kinds):
        return "DOUBLE"
    if all(pa.types.is_integer(kind) and kind != pa.uint64() for kind in kinds):
        return "BIGINT"
    return "UBIGINT" if all(map(pa.types.is_unsigned_integer, kinds)) else "VARCHAR"


def _escaped_address(source: Source) -> str:
    """Returns the address with the pattern characters of DuckDB escaped."""
    return re.sub(r"([*?\[])", r"[\1]", source.address) if is_local(source.filesystem) else source.address

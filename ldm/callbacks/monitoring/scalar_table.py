"""Logs scalars to one CSV file for a run and all of its resumptions."""

import csv
import errno
import io
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from ldm.files import write_text

FILE = "metrics.csv"
STEP, TIME = "step", "time"

Row = dict[str, str]


class ScalarTable(Logger):
    """Writes `folder`/metrics.csv: a row for each logged step, with its "step", its UTC "time" and its scalars.

    A row is appended or replaced by a single write, so that a killed process leaves complete rows, and the file is
    written again only where a scalar is new. Rows that cannot be written, because the disk is full for example, are
    kept in memory until they can be.
    """

    name, version = "table", ""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / FILE
        self._columns: list[str] = []  # of the file; empty before it is read
        self._pending: dict[int, Row] = {}  # rows that are not in the file as they are here, by step
        self._last: tuple[int, int] = -1, 0  # step of the file's last row, and its position in bytes
        self._row: Row = {}  # the file's last row
        self._warned = False

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Does nothing, because config.yaml in the same folder has the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds values to the row of a step."""
        if step is None:
            raise ValueError("a row of the table of scalars needs its step")
        row = self._pending.setdefault(step, {STEP: str(step), TIME: datetime.now(UTC).isoformat(timespec="seconds")})
        row |= {name: repr(float(value)) for name, value in metrics.items()}

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows that are not in the file yet."""
        try:
            self._open()
            for step in sorted(self._pending):
                self._write(step, self._pending[step])
                del self._pending[step]
            self._warned = False
        except OSError as error:
            if not self._warned:
                warnings.warn(
                    f"{self.path} cannot be written ({error.strerror or error}): training continues, and the rows are "
                    "written as soon as they can be",
                    stacklevel=2,
                )
            self._warned = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Removes the rows of steps, counted from 0, that a run which has completed `step` steps repeats."""
        try:
            rows = read_rows(self.path)
            kept = [row for row in rows if int(row[STEP]) < step]
            if len(kept) < len(rows):
                self._rewrite({int(row[STEP]): row for row in kept}, [*rows[0]])
        except OSError as error:
            warnings.warn(f"{self.path} keeps rows of steps that are repeated: {error}", stacklevel=2)

    def _open(self) -> None:
        """Continues an existing file; a last row that was not written completely is removed."""
        if not self.path.exists():
            self._columns = []
        if self._columns or not self.path.exists():
            return
        content = self.path.read_bytes()
        rows = read_rows(self.path)
        if not rows or not content.endswith(b"\n"):
            self._rewrite({int(row[STEP]): row for row in rows}, [*rows[0]] if rows else [])
        else:
            self._follow(rows[-1], [*rows[0]], content[:-1].rfind(b"\n") + 1)

    def _write(self, step: int, row: Row) -> None:
        last, position = self._last
        if step == last:
            row = _merged(self._row, row)
        if step < last or not row.keys() <= {*self._columns}:
            rows = {int(old[STEP]): old for old in read_rows(self.path)}
            rows[step] = _merged(rows.get(step, {}), row)
            self._rewrite(rows, self._columns)
            return
        line = _lines([row], self._columns)
        if step != last:
            position = self.path.stat().st_size
        with self.path.open("r+b", buffering=0) as file:
            try:
                if os.pwrite(file.fileno(), line, position) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                if step != last:
                    os.ftruncate(file.fileno(), position)
                raise
            os.ftruncate(file.fileno(), position + len(line))
        self._last, self._row = (step, position), row

    def _rewrite(self, rows: Mapping[int, Row], columns: list[str]) -> None:
        ordered = [rows[step] for step in sorted(rows)]
        names = list(dict.fromkeys([STEP, TIME, *columns, *(name for row in ordered for name in row)]))
        text = _lines([{name: name for name in names}, *ordered], names).decode()
        write_text(self.path, text)
        self._follow(ordered[-1] if ordered else {}, names, text.encode()[:-1].rfind(b"\n") + 1)

    def _follow(self, last: Row, columns: list[str], position: int) -> None:
        self._columns, self._row = columns, last
        self._last = (int(last[STEP]) if last else -1), position


def read_rows(path: Path) -> list[Row]:
    """Returns the complete rows of a table, in its order; none if there is no file."""
    return [*_complete(path.read_text(errors="replace"))] if path.is_file() else []


def _complete(text: str) -> Iterator[Row]:
    """Yields each row that has a value for every column: the end of a row may be missing or remain from another."""
    columns: list[str] = []
    for line in text.split("\n")[:-1]:
        try:
            cells = next(csv.reader([line]))  # line by line, because a damaged one may contain a quote
        except csv.Error:
            continue
        if not columns:
            columns = cells if cells[:1] == [STEP] else []
        elif len(cells) == len(columns) and cells[0].isdecimal():
            yield dict(zip(columns, cells, strict=True))


def _merged(old: Row, new: Row) -> Row:
    """Returns a row with the values of both, and the time of the old one."""
    return old | new | {TIME: old.get(TIME, new[TIME])}


def _lines(rows: list[Row], columns: list[str]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writerows(rows)
    return text.getvalue().encode()

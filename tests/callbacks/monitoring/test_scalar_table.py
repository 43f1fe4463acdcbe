import csv
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ldm.callbacks.monitoring.scalar_table import ScalarTable, read_rows
from ldm.report.runs import Curve, read_scalars


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def log(folder: Path, *steps: int, table: ScalarTable | None = None, **values: float) -> ScalarTable:
    table = table or ScalarTable(folder)
    for step in steps:
        table.log_metrics({"train/loss": step / 3} | values, step)
        table.save()
    return table


def test_values_that_are_logged_apart_are_in_one_row_of_their_step_with_its_time(tmp_path: Path) -> None:
    table = log(tmp_path, 0, 9)
    table.log_metrics({"val/loss": 0.25}, 9)
    table.save()
    log(tmp_path, 19, table=table)
    assert [(row["step"], row["val/loss"]) for row in rows(tmp_path)] == [("0", ""), ("9", "0.25"), ("19", "")]
    assert all(datetime.fromisoformat(row["time"]).tzinfo is not None for row in rows(tmp_path))
    assert [float(row["train/loss"]) for row in rows(tmp_path)] == [0, 3, 19 / 3]


def test_a_resumed_run_continues_the_table_with_each_step_once(tmp_path: Path) -> None:
    log(tmp_path, 0, 1, 2, 3, 4)
    table = ScalarTable(tmp_path)
    table.resume(3)  # from the checkpoint of three steps: steps 3 and 4 are repeated
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2"]
    table.log_metrics({"val/loss": 0.5}, 2)  # the validation that was due right after the checkpoint
    log(tmp_path, 3, 4, 5, table=table)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3", "4", "5"]
    assert (rows(tmp_path)[2]["val/loss"], float(rows(tmp_path)[2]["train/loss"])) == ("0.5", 2 / 3)


@pytest.mark.parametrize("cut", [1, 4, 15])
def test_a_row_that_a_kill_cut_off_is_neither_read_nor_continued(tmp_path: Path, cut: int) -> None:
    log(tmp_path, 0, 1, 2)
    file = tmp_path / "metrics.csv"
    os.truncate(file, file.stat().st_size - cut)
    kept = [0, 1]
    assert read_scalars(tmp_path)["train/loss"].steps == kept
    log(tmp_path, 5)
    assert [row["step"] for row in rows(tmp_path)] == [*map(str, kept), "5"]


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b"\0" * 200_000, b'19,"2026,0.5', b"19,20\r26,0.5"])
def test_a_table_with_a_row_that_a_loss_of_power_damaged_is_continued(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,time,a\n9,2026-01-01,0.5\n" + damaged + b"\n")
    table = ScalarTable(tmp_path)
    table.log_metrics({"a": 0.25}, 19)
    table.save()
    assert [(row["step"], row["a"]) for row in read_rows(path)] == [("9", "0.5"), ("19", "0.25")]


def test_the_end_of_a_replaced_row_is_not_read_as_a_row(tmp_path: Path) -> None:
    log(tmp_path, 0, 1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("33333\n")
    assert read_scalars(tmp_path)["train/loss"] == Curve([0, 1], [0, 1 / 3])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["0", "1"]


def test_a_row_of_an_earlier_step_is_inserted_in_its_place(tmp_path: Path) -> None:
    log(tmp_path, 7, table=log(tmp_path, 5, 9), fid=2.0)
    assert [(row["step"], row["fid"]) for row in rows(tmp_path)] == [("5", ""), ("7", "2.0"), ("9", "")]


def test_rows_that_do_not_fit_on_the_disk_are_written_once_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = log(tmp_path, *range(3))
    size = (tmp_path / "metrics.csv").stat().st_size
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[: max(0, size + 10 - at)], at))
    with pytest.warns(UserWarning, match=r"metrics\.csv cannot be written \(No space left on device\)"):
        log(tmp_path, 3, 4, table=table)
    assert read_scalars(tmp_path)["train/loss"].steps == [0, 1, 2]
    monkeypatch.undo()
    log(tmp_path, 5, table=table)
    assert read_scalars(tmp_path)["train/loss"].steps == [*range(6)]


def test_the_table_continues_curves_of_older_logs(tmp_path: Path) -> None:
    older: Any = tmp_path / "csv" / "version_0" / "metrics.csv"
    older.parent.mkdir(parents=True)
    older.write_text("step,train/loss\n0,9.0\n1,9.0\n")
    log(tmp_path, 1, 2)
    assert read_scalars(tmp_path)["train/loss"] == Curve([0, 1, 2], [9.0, 1 / 3, 2 / 3])

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from ldm.metadata.tables import Damaged, Source, batches, find, open_sources
from ldm.metadata.text_tables import SUFFIXES

CELLS = ["plain", "", None, "a, b", 'say "hi"', '"quoted"', "été 日本 😀", " spaces ", "1.5", "nan", "\\N?"]


def opened(path: Path, header: list[str] | None = None) -> tuple[list[Source], list[Damaged]]:
    folder = path.with_name("work")
    folder.mkdir()
    return open_sources(find([str(path)]), folder, header)


def content(path: Path, header: list[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a file, all of which must be readable."""
    (source,), damaged = opened(path, header)
    assert not damaged
    return rows_of(source)


def rows_of(source: Source) -> list[dict[str, Any]]:
    groups = range(len(source.group_rows))
    return [row for g in groups for batch in batches(source, source.schema.names, g) for row in batch.to_pylist()]


def encoded(value: str | None) -> bytes | None:
    return value.encode() if value else None


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_value_is_read_as_it_was_written(suffix: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}{'.gz' if packed else ''}"
    with (gzip.open if packed else open)(path, "wt", encoding="utf-8", newline="") as file:  # type: ignore[operator]
        if suffix in (".csv", ".tsv"):
            writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
            writer.writerows([["url", "caption"], *(["x", cell] for cell in CELLS)])
        else:
            file.writelines(json.dumps({"url": "x", "caption": cell}) + "\n" for cell in CELLS)
    expected = [{"url": b"x", "caption": encoded(cell) if suffix in (".csv", ".tsv") else cell} for cell in CELLS]
    found = content(path)
    if suffix not in (".csv", ".tsv"):
        expected = [{"url": b"x", "caption": None if cell is None else cell.encode()} for cell in CELLS]
    assert found == expected


def test_a_csv_field_can_have_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'url,caption\r\nx,"two\r\nlines"\r\ny,z\r\n')
    assert content(tmp_path / "a.csv") == [{"url": b"x", "caption": b"two\r\nlines"}, {"url": b"y", "caption": b"z"}]


def test_an_open_quote_in_a_tsv_ends_with_its_field(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'url\tcaption\nx\t"open\ny\t5" disk\nz\t"a ""b"""\n')
    assert [row["caption"] for row in content(tmp_path / "a.tsv")] == [b'"open', b'5" disk', b'a "b"']


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_bytes_that_are_not_utf_8_are_kept(suffix: str, tmp_path: Path) -> None:
    delimiter = b"," if suffix == ".csv" else b"\t"
    (tmp_path / f"a{suffix}").write_bytes(b"url" + delimiter + b"caption\nx" + delimiter + b"caf\xe9\n")
    assert content(tmp_path / f"a{suffix}") == [{"url": b"x", "caption": b"caf\xe9"}]


def test_json_values_keep_their_digits_and_invalid_text_stays_invalid(tmp_path: Path) -> None:
    lines = [b'{"n": 18446744073709551615, "t": "\\ud800"}', b'{"n": 0.1, "t": "caf\xe9"}', b'{"n": NaN, "t": [1]}']
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(lines))
    assert content(tmp_path / "a.jsonl") == [
        {"n": b"18446744073709551615", "t": b"\xed\xa0\x80"},
        {"n": b"0.1", "t": b"caf\xe9"},
        {"n": b"NaN", "t": None},
    ]


def test_keys_that_begin_in_a_later_row_are_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": true}\n{"a": null, "b": "x"}\n')
    assert [(row["a"], row["b"]) for row in content(tmp_path / "a.jsonl")] == [
        (b"1", None),
        (None, b"true"),
        (None, b"x"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "url,caption\nx,y\nx\nx,\udcff,z\nx,z\n", "a row has 1 fields instead of 2"),
        ("a.tsv", "url\tcaption\nx\ty\nx\nx\ty\tz\nx\tz\n", "a row has 1 fields instead of 2"),
        ("a.jsonl", '{"u": 1}\n{"u": \n[1]\n{"u": 2}\n', "line 2: Expecting value"),
        ("a.jsonl", '{"u": 1}\n' + '{"u":' * 100_000 + "\n5\n" + '{"u": 2}\n', "line 2: "),
        ("a.jsonl", '{"u": 1}\n{"u": ' + "9" * 5000 + '}\nnull\n{"u": 2}\n', "line 2: "),
    ],
)
def test_malformed_rows_are_counted_and_the_others_kept(name: str, text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, errors="surrogateescape")
    (source,), damaged = opened(tmp_path / name)
    assert source.rows == 2 and source.name == str(tmp_path / name)
    assert [(d.path, d.rows) for d in damaged] == [(str(tmp_path / name), 2)] and damaged[0].reason.startswith(reason)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_rows_before_an_unreadable_part_are_kept(suffix: str, tmp_path: Path) -> None:
    rng, row = random.Random(0), '{"url": "%s"}\n' if suffix == ".jsonl" else "%s,x\n"
    text = "".join(row % rng.randbytes(1000).hex() for _ in range(1000))
    packed = gzip.compress((text if suffix == ".jsonl" else "url,caption\n" + text).encode(), 1)
    (tmp_path / f"a{suffix}.gz").write_bytes(packed[:-20])
    (source,), (damaged,) = opened(tmp_path / f"a{suffix}.gz")
    assert 100 < source.rows <= 1000 and damaged.rows == 0 and "end" in damaged.reason.lower()


@pytest.mark.parametrize(
    ("name", "data"), [("a.csv", b""), ("a.jsonl", b""), ("a.csv.gz", b"no gzip"), ("a.tsv", b"\xff\tb\nc\td\n")]
)
def test_a_file_that_cannot_be_read_at_all_is_reported(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    sources, damaged = opened(tmp_path / name)
    assert not sources and damaged[0].path == str(tmp_path / name) and damaged[0].reason


def test_a_header_must_have_a_name_for_each_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,z\n")
    assert "has 3 columns, but --header names 2" in opened(tmp_path / "a.csv", ["url", "caption"])[1][0].reason


def test_a_text_table_is_refused_where_only_parquet_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,caption\n")
    with pytest.raises(ValueError, match=r"a\.csv is not a parquet file: run ldm filter on it first"):
        open_sources(find([str(tmp_path)]))


def test_a_quote_that_never_closes_ends_a_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.metadata.text_tables.FIELD_BYTES", 1000)
    (tmp_path / "a.csv").write_text('url,caption\nx,y\nz,"open' + "\nurl,caption" * 100)
    (source,), (damaged,) = opened(tmp_path / "a.csv")
    assert source.rows == 1 and damaged.rows == 0 and "field limit" in damaged.reason

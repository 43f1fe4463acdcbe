"""NaN, infinite and out-of-range numbers are filtered like in a Python loop that applies the rules to each row."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.dumps import GOOD, replace_in_footer, rows
from tests.metadata.test_filtering import filtered

SIDES = ("WIDTH", "HEIGHT")
NUMBERS = {
    "AESTHETIC_SCORE": "aesthetic",
    "similarity": "similarity",
    "WIDTH": "width",
    "HEIGHT": "height",
    "pwatermark": "pwatermark",
    "punsafe": "punsafe",
}
OTHER = {  # DuckDB folds conditions only if minimum and maximum differ
    "AESTHETIC_SCORE": 7.0,
    "similarity": 0.375,
    "WIDTH": 700,
    "HEIGHT": 600,
    "pwatermark": 0.25,
    "punsafe": 0.125,
}
SPECIAL = [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31, 2.0**31 - 0.5, -(2.0**31) - 1, None]
INTEGERS = [(pa.int64(), 2**31), (pa.int64(), -(2**40)), (pa.uint32(), 2**32 - 1), (pa.uint64(), 2**63 - 1)]


def write(path: Path, kinds: dict[str, pa.DataType], changes: list[dict[str, Any]], **options: Any) -> Path:
    """Writes rows numbered by their hash, with columns of the types `kinds` and the statistics of pyarrow."""
    table = rows(*[{"hash": i} | change for i, change in enumerate(changes)])
    for name, kind in kinds.items():
        values = table[name].to_pylist()
        if pa.types.is_string(kind):
            values = [None if value is None else str(value) for value in values]
        table = table.set_column(table.column_names.index(name), name, pa.array(values, kind))
    pq.write_table(table, path, **options)
    return path


def number(name: str, value: Any) -> float | None:
    """Returns the value as the filter must read it: pixels within 32 bits, finite float32 scores, else None."""
    if value is None or not math.isfinite(value := float(value)):
        return None
    if name in SIDES:
        return value if -(2**31) <= round(value) < 2**31 else None
    with np.errstate(over="ignore"):
        score = float(np.float32(value))
    return score if math.isfinite(score) else None


def reason(row: dict[str, Any]) -> str | None:
    """Returns the first rule of the recipe that rejects the row."""
    aesthetic, similarity, width, height, watermark, unsafe = (number(name, row[name]) for name in NUMBERS)
    if aesthetic is None or aesthetic < 6.5:
        return "aesthetic"
    if similarity is None or similarity < np.float32(0.28):
        return "similarity"
    if width is None or height is None or min(width, height) < 512:
        return "side"
    if not 0.5 <= width / height <= 2:
        return "aspect"
    if watermark is None or watermark >= 0.5:
        return "watermark"
    return "unsafe" if unsafe is None or unsafe >= 0.5 else None


def check(path: Path) -> None:
    """Checks that the filter keeps, rejects and counts the same rows as a loop over them."""
    given = pq.read_table(path).to_pylist()
    reasons = [reason(row) for row in given]
    result = filtered(path)
    assert result.rejected == Counter(filter(None, reasons))
    kept = [(row["hash"], round(number("WIDTH", row["WIDTH"]) or 0)) for row in given if reason(row) is None]
    assert [(row["hash"], row["width"]) for row in result.kept] == kept
    for column, name in NUMBERS.items():
        nulls = sum(row[column] is None for row in given)
        assert result.work.tally.nulls[name] == nulls
        assert result.work.tally.uncoercible[name] == sum(number(column, row[column]) is None for row in given) - nulls
    scores = sum(number("AESTHETIC_SCORE", row["AESTHETIC_SCORE"]) is not None for row in given)
    assert sum(result.work.tally.histograms["aesthetic score"]) == scores


def footer(path: Path, name: str) -> pq.Statistics:
    group = pq.read_metadata(path).row_group(0)
    return next(group.column(i).statistics for i in range(group.num_columns) if group.column(i).path_in_schema == name)


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.string()], ids=str)
@pytest.mark.parametrize("special", SPECIAL, ids=str)
def test_a_special_number_among_others_counts_as_missing_in_every_column(
    special: float | None, kind: pa.DataType, tmp_path: Path
) -> None:
    changes = [{}, *({name: special} for name in NUMBERS), OTHER]
    check(write(tmp_path / "a.parquet", dict.fromkeys(NUMBERS, kind), changes))


@pytest.mark.parametrize(("kind", "special"), INTEGERS, ids=str)
def test_an_integer_beyond_32_bits_is_not_a_valid_width(kind: pa.DataType, special: int, tmp_path: Path) -> None:
    changes = [{}, *({name: special} for name in SIDES), dict.fromkeys(SIDES, special), OTHER]
    check(write(tmp_path / "a.parquet", dict.fromkeys(SIDES, kind), changes))


def test_nan_is_rejected_even_if_the_footer_implies_that_all_values_pass(tmp_path: Path) -> None:
    changes = [{}, *({name: math.nan} for name in NUMBERS), OTHER]
    path = write(tmp_path / "a.parquet", {"WIDTH": pa.float64(), "HEIGHT": pa.float32()}, changes)
    for name in NUMBERS:
        ends = footer(path, name).min, footer(path, name).max
        assert ends == pytest.approx(sorted((GOOD[name], OTHER[name])))  # statistics exclude NaN
    result = filtered(path)
    assert result.rejected == {"aesthetic": 1, "similarity": 1, "side": 2, "watermark": 1, "unsafe": 1}
    assert [row["hash"] for row in result.kept] == [0, len(changes) - 1]


def test_valid_rows_are_kept_even_if_the_footer_has_nan(tmp_path: Path) -> None:
    """The format requires writers to exclude NaN from footers, but not all do, so readers must ignore it there."""
    path = write(tmp_path / "a.parquet", {}, [{}, {"pwatermark": math.nan}, {"pwatermark": 0.625}, OTHER])
    for value in (GOOD["pwatermark"], 0.625):
        replace_in_footer(path, value, math.nan)
    statistics = footer(path, "pwatermark")
    assert math.isnan(statistics.min) and math.isnan(statistics.max)
    check(path)


@pytest.mark.parametrize("seed", range(4))
def test_random_rows_are_filtered_like_in_a_loop_over_them(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    ranges = {"AESTHETIC_SCORE": (6.4, 7), "similarity": (0.27, 0.4), "pwatermark": (0, 0.6), "punsafe": (0, 0.6)}
    ranges |= dict.fromkeys(SIDES, (500, 1000))

    def value(name: str) -> float | None:
        return rng.choice(SPECIAL) if rng.random() < 0.05 else rng.uniform(*ranges[name])

    changes = [{name: value(name) for name in NUMBERS} for _ in range(2000)]
    kinds = {name: rng.choice([pa.float32(), pa.float64()]) for name in NUMBERS}
    check(write(tmp_path / "a.parquet", kinds, changes, row_group_size=rng.choice([5, 100, 2000])))


@pytest.mark.parametrize("special", [math.nan, math.inf], ids=str)
def test_nan_and_infinity_are_written_as_null_without_a_rule(special: float, tmp_path: Path) -> None:
    kinds = dict.fromkeys(("similarity", *SIDES), pa.float64())
    path = write(tmp_path / "a.parquet", kinds, [{}, dict.fromkeys(kinds, special)])
    result = filtered(path, min_similarity=None, min_side=None, min_aspect=None, max_aspect=None)
    assert [(row["similarity"], row["width"], row["height"]) for row in result.kept][1] == (None, None, None)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([pa.uint64(), pa.uint64()], [2**64 - 1, 7]),
        ([pa.int64(), pa.int64()], [-(2**63), 7]),
        ([pa.uint64(), pa.int64()], [str(2**64 - 1), "7"]),
        ([pa.int64(), pa.string()], [str(-(2**63)), "7"]),
    ],
)
def test_hashes_keep_all_digits(kinds: list[pa.DataType], expected: list[Any], tmp_path: Path) -> None:
    for name, kind, value in zip("ab", kinds, (int(expected[0]), 7), strict=True):
        change = {"hash": value, "URL": f"https://a.org/{name}.jpg"}
        table = rows(change | {"hash": 0})
        column = pa.array([str(value) if pa.types.is_string(kind) else value], kind)
        pq.write_table(table.set_column(table.column_names.index("hash"), "hash", column), tmp_path / f"{name}.parquet")
    assert [row["hash"] for row in filtered(tmp_path).kept] == expected


def test_a_folder_named_like_a_column_does_not_change_its_values(tmp_path: Path) -> None:
    (tmp_path / "WIDTH=5").mkdir()
    path = write(tmp_path / "WIDTH=5" / "a.parquet", {}, [{}])
    assert [row["width"] for row in filtered(path).kept] == [640]

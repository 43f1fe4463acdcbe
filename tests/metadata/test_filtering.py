import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.metadata.filtering import Filter, database, file_groups, in_batches
from ldm.metadata.funnel import axes
from ldm.metadata.rules import Thresholds, rules
from ldm.metadata.tables import find, open_sources
from tests.data.dumps import dump, rows
from tests.metadata.test_tables import corrupt_group, server, with_bytes  # noqa: F401 - server is a fixture

RECIPE = Thresholds(
    min_aesthetic=6.5,
    min_similarity=0.28,
    min_side=512,
    min_aspect=0.5,
    max_aspect=2.0,
    max_watermark=0.5,
    nsfw="UNLIKELY",
    max_unsafe=0.5,
    language=None,
    min_caption=20,
    max_caption=300,
    caption_match=None,
    caption_exclude=None,
    deduplicate=True,
)


@dataclass
class Result:
    work: Filter
    kept: list[dict[str, Any]]

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        return {step["reason"]: step for step in self.work.tally.steps(self.work.rules)}

    @property
    def rejected(self) -> dict[str, int]:
        return {reason: step["rejected"] for reason, step in self.steps.items() if step["rejected"]}


def filtered(given: Path | str, chosen: dict[str, str] | None = None, **cuts: Any) -> Result:
    """Runs all steps of the command except the report; `chosen` are the columns of --column."""
    thresholds = replace(RECIPE, **cuts)
    sources, damaged = open_sources(find([str(given)]))
    has_nsfw = all("NSFW" in source.schema.names for source in sources)
    active_rules = rules(thresholds, has_nsfw)
    groups = file_groups(sources, [name for rule in active_rules for name in rule.columns], chosen or {})
    with tempfile.TemporaryDirectory() as folder, database(Path(folder), 2) as connection:
        work = Filter(
            connection,
            active_rules,
            axes(thresholds, active_rules),
            thresholds.deduplicate,
            Path(folder),
            damaged=damaged,
        )
        work.create_tables(groups)
        for batch in (batch for group in groups for batch in in_batches(group)):
            work.add(batch)
        count = work.finish()
        work.write(Path(folder) / "kept.parquet", 0, count)
        result = Result(work, pq.read_table(Path(folder) / "kept.parquet").to_pylist())
    assert len(result.kept) == count == work.tally.kept
    return result


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"AESTHETIC_SCORE": 6.5}, None),
        ({"AESTHETIC_SCORE": 6.4999}, "aesthetic"),
        ({"AESTHETIC_SCORE": None}, "aesthetic"),
        ({"AESTHETIC_SCORE": float("nan")}, "aesthetic"),
        ({"similarity": 0.28}, None),  # 0.2800000012 as float32
        ({"similarity": 0.2799}, "similarity"),
        ({"WIDTH": 512, "HEIGHT": 512}, None),
        ({"WIDTH": 511}, "side"),
        ({"HEIGHT": 511}, "side"),
        ({"WIDTH": None}, "side"),
        ({"WIDTH": float("nan")}, "side"),
        ({"WIDTH": 1024, "HEIGHT": 512}, None),
        ({"WIDTH": 1025, "HEIGHT": 512}, "aspect"),
        ({"WIDTH": 512, "HEIGHT": 1025}, "aspect"),
        ({"pwatermark": 0.5}, "watermark"),
        ({"punsafe": 0.5}, "unsafe"),
        ({"punsafe": float("nan")}, "unsafe"),
        ({"URL": "file:///etc/passwd"}, "url"),
        ({"URL": None}, "url"),
        ({"URL": ""}, "url"),
        ({"URL": "https://"}, "url"),
        ({"TEXT": "x" * 20}, None),
        ({"TEXT": "x" * 19}, "caption_length"),
        ({"TEXT": "é" * 300}, None),
        ({"TEXT": "x" * 301}, "caption_length"),
        ({"TEXT": "\U0001f469‍\U0001f4bb" * 6 + "ab"}, None),  # 8 visible characters, 20 code points
        ({"TEXT": None}, "caption_length"),
    ],
)
def test_the_recipe_rejects_rows_at_its_thresholds(change: dict[str, Any], reason: str | None, tmp_path: Path) -> None:
    types = {"WIDTH": pa.int32(), "AESTHETIC_SCORE": pa.float32(), "URL": pa.string(), "TEXT": pa.string()}
    table = rows({}, change)
    if isinstance(change.get("WIDTH"), float):
        types["WIDTH"] = pa.float64()
    for name, kind in types.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    pq.write_table(table, tmp_path / "a.parquet")
    result = filtered(tmp_path / "a.parquet")
    assert result.rejected == ({reason: 1} if reason else {})
    assert len(result.kept) == (1 if reason else 2)


def test_a_row_is_rejected_by_its_first_failed_rule_and_counted_for_all(tmp_path: Path) -> None:
    low = {"AESTHETIC_SCORE": 5.0}
    file = dump(tmp_path / "a.parquet", {}, low, {"similarity": 0.1}, low | {"similarity": 0.1}, {"TEXT": "short"})
    result = filtered(file)
    steps = result.steps
    assert [steps["aesthetic"][k] for k in ("rejected", "left", "alone")] == [2, 3, 2]
    assert [steps["similarity"][k] for k in ("rejected", "left", "alone")] == [1, 2, 2]
    assert steps["caption_length"]["left"] == 1 == len(result.kept)


def test_kept_rows_have_standard_column_names_and_the_input_order(tmp_path: Path) -> None:
    for name, first in (("b", 100), ("a", 0)):
        changes = [{"URL": f"https://a.org/{first + i}", "hash": first + i} for i in range(40)]
        dump(tmp_path / f"{name}.parquet", *changes, row_group_size=7)
    result = filtered(tmp_path / "*.parquet")
    found = result.kept
    assert [row["hash"] for row in found] == [*range(40), *range(100, 140)]
    assert set(found[0]) == {
        "url", "caption", "width", "height", "similarity", "punsafe", "pwatermark", "aesthetic", "hash"
    }  # fmt: skip


def test_the_first_duplicate_that_passes_the_rules_is_kept(tmp_path: Path) -> None:
    url = {"URL": "https://a.org/x.jpg"}
    dump(tmp_path / "a.parquet", url | {"similarity": 0.1, "hash": 0}, {"hash": 1}, url | {"hash": 2})
    other = {"URL": "http://www.A.org/x.jpg#1"}
    dump(tmp_path / "b.parquet", url | {"hash": 3}, other | {"hash": 4}, other | {"hash": 5}, url | {"hash": 6})
    result = filtered(tmp_path)
    assert [row["hash"] for row in result.kept] == [1, 2]
    assert result.rejected == {"similarity": 1, "duplicate_url": 3, "duplicate_normalised_url": 1}
    assert [row["hash"] for row in filtered(tmp_path, deduplicate=False).kept] == [1, 2, 3, 4, 5, 6]


def test_the_kept_rows_are_those_that_pandas_keeps(tmp_path: Path) -> None:
    rng = random.Random(0)
    changes = [
        {
            "URL": f"https://a.org/{rng.randrange(400)}",
            "TEXT": "w" * rng.randrange(10, 400),
            "WIDTH": rng.randrange(300, 2000),
            "HEIGHT": rng.randrange(300, 2000),
            "similarity": rng.uniform(0.25, 0.4),
            "pwatermark": rng.random(),
            "punsafe": rng.random(),
            "AESTHETIC_SCORE": rng.uniform(6, 7),
        }
        for _ in range(4000)
    ]
    dump(tmp_path / "in" / "a.parquet", *changes[:1500], row_group_size=400)
    dump(tmp_path / "in" / "b.parquet", *changes[1500:])
    result = filtered(tmp_path / "in")
    frame = pd.concat([pd.read_parquet(path) for path in sorted((tmp_path / "in").iterdir())])
    aspect = frame.WIDTH / frame.HEIGHT
    good = frame[
        (frame.AESTHETIC_SCORE >= 6.5)
        & (frame.similarity >= 0.28)
        & (frame[["WIDTH", "HEIGHT"]].min(axis=1) >= 512)
        & aspect.between(0.5, 2)
        & (frame.pwatermark < 0.5)
        & (frame.punsafe < 0.5)
        & frame.TEXT.str.len().between(20, 300)
    ].drop_duplicates("URL")
    assert 20 < len(good) < 400
    assert [(row["url"], row["width"]) for row in result.kept] == [*zip(good.URL, good.WIDTH, strict=True)]


def test_types_are_coerced_and_failures_are_counted(tmp_path: Path) -> None:
    sizes = [{"WIDTH": "640"}, {"WIDTH": " 640.0 "}, {"WIDTH": "wide"}, {"WIDTH": None}, {"WIDTH": "nan"}]
    file = dump(tmp_path / "a.parquet", *sizes)
    result = filtered(file)
    assert [row["width"] for row in result.kept] == [640, 640]
    assert result.work.tally.uncoercible["width"] == 2
    assert result.work.tally.nulls["width"] == 1


def test_files_with_different_column_names_and_types_are_combined(tmp_path: Path) -> None:
    dump(tmp_path / "in" / "a.parquet", {})
    table = rows({"URL": "https://a.org/b.jpg", "WIDTH": 640.0})
    names = {"URL": "url", "TEXT": "caption", "WIDTH": "original_width", "AESTHETIC_SCORE": "aesthetic"}
    pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), tmp_path / "in" / "b.parquet")
    result = filtered(tmp_path / "in")
    assert [row["url"] for row in result.kept] == ["https://a.org/0.jpg", "https://a.org/b.jpg"]


def test_an_nsfw_column_is_used_if_it_exists(tmp_path: Path) -> None:
    labels = ["UNLIKELY", "unlikely ", "NSFW", "UNSURE", None]
    file = dump(tmp_path / "a.parquet", *[{"NSFW": label, "punsafe": 0.9} for label in labels])
    result = filtered(file)
    assert result.rejected == {"nsfw": 3}


def test_rows_are_rejected_by_language_and_caption_patterns(tmp_path: Path) -> None:
    texts = ["a photo of a quiet harbour", "a painting of a quiet harbour", "a photo of a harbour, stock photo"]
    changes = [{"TEXT": text, "LANGUAGE": "en"} for text in texts] + [{"TEXT": texts[0], "LANGUAGE": "fr"}]
    cuts = {"language": "EN", "caption_match": r"\bphoto\b", "caption_exclude": "(?i)STOCK"}
    result = filtered(dump(tmp_path / "a.parquet", *changes), **cuts)
    assert result.rejected == {"language": 1, "caption_match": 1, "caption_exclude": 1}


@pytest.mark.parametrize(("chosen", "kept"), [("width", [0, 2]), ("WIDTH", [1, 3])])
def test_a_column_is_chosen_among_names_that_differ_in_case(chosen: str, kept: list[int], tmp_path: Path) -> None:
    """DuckDB ignores the case of names, both in the first file of a group and in the other files."""
    widths = [{"WIDTH": 5, "width": 640}, {"WIDTH": 640, "width": 5}]
    table = rows(*[width | {"hash": i} for i, width in enumerate(widths)])
    pq.write_table(table, tmp_path / "a.parquet")
    table = rows(*[width | {"hash": i + 2, "URL": f"https://b.org/{i}"} for i, width in enumerate(widths)])
    pq.write_table(table.select(table.column_names[::-1]), tmp_path / "b.parquet")
    assert [row["hash"] for row in filtered(tmp_path, {"width": chosen}).kept] == kept


def test_a_column_named_like_a_virtual_column_of_the_database_is_ignored(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", *[{"file_row_number": "x", "filename": "y", "raw_width": "z"}] * 3)
    result = filtered(file)
    assert len(result.kept) == 3 and sum(result.work.tally.histograms["aesthetic score"]) == 3


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("WIDTH", [[640]], "list"),
        ("WIDTH", [True], "bool"),
        ("WIDTH", pa.array([640], pa.duration("s")), "duration"),
        ("WIDTH", pa.array([640], pa.decimal256(60, 2)), "decimal256"),
        ("TEXT", [["a caption of some length"]], "list"),
        ("TEXT", [{"en": "a caption of some length"}], "struct"),
        ("URL", [1.5], "double"),
    ],
)
def test_a_column_of_an_unusable_type_is_refused(name: str, values: Any, kind: str, tmp_path: Path) -> None:
    table = rows({})
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet has values of type {kind}.* in {name}, its column for"):
        filtered(tmp_path)


def test_an_unneeded_column_of_an_unusable_type_is_skipped(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", {"hash": [1, 2], "LICENSE": 1.5})
    assert filtered(file).kept[0].keys() & {"hash", "license"} == set()


def test_identifiers_stored_as_floats_stay_numbers(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", {"SAMPLE_ID": 3060005000229.0})
    assert filtered(file).kept[0]["sample_id"] == 3060005000229


def test_a_disabled_rule_needs_no_column(tmp_path: Path) -> None:
    table = rows({}).drop_columns(["AESTHETIC_SCORE", "punsafe"])
    pq.write_table(table, tmp_path / "a.parquet")
    result = filtered(tmp_path / "a.parquet", min_aesthetic=None, max_unsafe=None)
    assert len(result.kept) == 1


def test_histograms_count_every_value_once_and_ignore_nulls(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", *[{"AESTHETIC_SCORE": score} for score in (1.0, 6.75, 6.75, 99.0, None)])
    result = filtered(file)
    counts, bin_of = result.work.tally.histograms["aesthetic score"], int((6.75 - 1) / 9 * 60)
    assert sum(counts) == 4 and counts[0] == 1 and counts[-1] == 1 and counts[bin_of] == 2


def test_histograms_of_many_rows_use_a_regular_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.metadata.filtering.SAMPLE_ROWS", 10)
    result = filtered(dump(tmp_path / "a.parquet", *[{}] * 40))
    assert result.work.every == 4 and sum(result.work.tally.histograms["aesthetic score"]) == 10
    assert sum(result.work.tally.histograms["caption length of the rows that reach it"]) == 40


def test_object_storage_gives_the_same_rows_as_files(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", *[{}] * 5)
    fsspec.filesystem("memory").pipe("/dump2/a.parquet", file.read_bytes())
    remote = filtered("memory://dump2/*.parquet")
    assert remote.kept == filtered(file).kept and len(remote.kept) == 5


@pytest.mark.slow
def test_http_gives_the_same_rows_as_files(tmp_path: Path, server: str) -> None:  # noqa: F811
    dump(tmp_path / "a.parquet", *[{}] * 5)
    result = filtered(f"{server}/a.parquet")
    assert len(result.kept) == 5


def test_unreadable_rows_are_counted_and_the_others_kept(tmp_path: Path) -> None:
    dump(tmp_path / "in" / "a.parquet", *[{"hash": i} for i in range(6)], row_group_size=2)
    corrupt_group(tmp_path / "in" / "a.parquet", 1)
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 without a footer")
    dump(tmp_path / "in" / "c.parquet", *[{"hash": i, "URL": f"https://c.org/{i}"} for i in (6, 7)])
    result = filtered(tmp_path / "in")
    assert [row["hash"] for row in result.kept] == [0, 1, 4, 5, 6, 7]
    assert result.work.tally.rows == 6 and sorted(d.rows for d in result.work.damaged) == [0, 2]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()], ids=str)
def test_a_caption_with_an_invalid_encoding_counts_as_missing(kind: pa.DataType, tmp_path: Path) -> None:
    table = rows({}, {}, {})
    texts = [b"a caption of some length", b"caf\xe9 au lait, in a small cup", b"\x00control\x07 in a caption"]
    pq.write_table(table.set_column(1, "TEXT", with_bytes(texts, kind)), tmp_path / "a.parquet")
    result = filtered(tmp_path / "a.parquet")
    assert len(result.kept) == 2 and result.rejected == {"caption_length": 1}
    assert result.work.tally.uncoercible["caption"] == 1


def test_invalid_text_in_a_column_of_numbers_is_counted_once(tmp_path: Path) -> None:
    table = rows({}, {}, {})
    widths = with_bytes([b"640", b"\xff640", None], pa.string())
    pq.write_table(table.set_column(2, "WIDTH", widths), tmp_path / "a.parquet")
    tally = filtered(tmp_path / "a.parquet").work.tally
    assert (tally.uncoercible["width"], tally.nulls["width"]) == (1, 1)


def test_several_corrupt_files_keep_their_own_rows(tmp_path: Path) -> None:
    for i in range(3):
        table = rows({"hash": i, "URL": f"https://a.org/{i}"}, {"hash": -1})
        texts = with_bytes([b"a caption of some length", b"caf\xe9 au lait, in a small cup"], pa.string())
        pq.write_table(table.set_column(1, "TEXT", texts), tmp_path / f"{i}.parquet")
    assert [row["hash"] for row in filtered(tmp_path).kept] == [0, 1, 2]

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
from tests.metadata.test_tables import server, spoilt_group  # noqa: F401 - server is a fixture

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
class Done:
    work: Filter
    kept: list[dict[str, Any]]

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        return {step["reason"]: step for step in self.work.tally.steps(self.work.rules)}

    @property
    def rejected(self) -> dict[str, int]:
        return {reason: step["rejected"] for reason, step in self.steps.items() if step["rejected"]}


def filtered(given: Path | str, **cuts: Any) -> Done:
    """Everything that the command does but for its report."""
    thresholds = replace(RECIPE, **cuts)
    sources, damaged = open_sources(find([str(given)]))
    has_nsfw = all("NSFW" in source.schema.names for source in sources)
    asked = rules(thresholds, has_nsfw)
    groups = file_groups(sources, [name for rule in asked for name in rule.columns], {})
    with tempfile.TemporaryDirectory() as folder, database(Path(folder), 2) as connection:
        work = Filter(connection, asked, axes(thresholds, asked), thresholds.deduplicate, Path(folder), damaged=damaged)
        work.begin(groups)
        for batch in (batch for group in groups for batch in in_batches(group)):
            work.add(batch)
        count = work.finish()
        work.write(Path(folder) / "kept.parquet", 0, count)
        done = Done(work, pq.read_table(Path(folder) / "kept.parquet").to_pylist())
    assert len(done.kept) == count == work.tally.kept
    return done


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"AESTHETIC_SCORE": 6.5}, None),
        ({"AESTHETIC_SCORE": 6.4999}, "aesthetic"),
        ({"AESTHETIC_SCORE": None}, "aesthetic"),
        ({"AESTHETIC_SCORE": float("nan")}, "aesthetic"),
        ({"similarity": 0.28}, None),  # which float32 holds as 0.2800000012
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
        ({"TEXT": "\U0001f469‍\U0001f4bb" * 6 + "ab"}, None),  # 8 characters to the eye, 20 code points
        ({"TEXT": None}, "caption_length"),
    ],
)
def test_the_recipe_cuts_where_the_design_says(change: dict[str, Any], reason: str | None, tmp_path: Path) -> None:
    types = {"WIDTH": pa.int32(), "AESTHETIC_SCORE": pa.float32(), "URL": pa.string(), "TEXT": pa.string()}
    table = rows({}, change)
    if isinstance(change.get("WIDTH"), float):
        types["WIDTH"] = pa.float64()
    for name, kind in types.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    pq.write_table(table, tmp_path / "a.parquet")
    done = filtered(tmp_path / "a.parquet")
    assert done.rejected == ({reason: 1} if reason else {})
    assert len(done.kept) == (1 if reason else 2)


def test_a_row_is_rejected_for_the_first_rule_and_counted_for_each_alone(tmp_path: Path) -> None:
    low = {"AESTHETIC_SCORE": 5.0}
    file = dump(tmp_path / "a.parquet", {}, low, {"similarity": 0.1}, low | {"similarity": 0.1}, {"TEXT": "short"})
    done = filtered(file)
    steps = done.steps
    assert [steps["aesthetic"][k] for k in ("rejected", "left", "alone")] == [2, 3, 2]
    assert [steps["similarity"][k] for k in ("rejected", "left", "alone")] == [1, 2, 2]
    assert steps["caption_length"]["left"] == 1 == len(done.kept)


def test_what_comes_out_has_our_names_and_the_order_of_what_went_in(tmp_path: Path) -> None:
    for name, first in (("b", 100), ("a", 0)):
        changes = [{"URL": f"https://a.org/{first + i}", "hash": first + i} for i in range(40)]
        dump(tmp_path / f"{name}.parquet", *changes, row_group_size=7)
    done = filtered(tmp_path / "*.parquet")
    found = done.kept
    assert [row["hash"] for row in found] == [*range(40), *range(100, 140)]
    assert set(found[0]) == {
        "url", "caption", "width", "height", "similarity", "punsafe", "pwatermark", "aesthetic", "hash"
    }  # fmt: skip


def test_of_duplicates_the_first_that_passes_the_rules_stays(tmp_path: Path) -> None:
    url = {"URL": "https://a.org/x.jpg"}
    dump(tmp_path / "a.parquet", url | {"similarity": 0.1, "hash": 0}, {"hash": 1}, url | {"hash": 2})
    other = {"URL": "http://www.A.org/x.jpg#1"}
    dump(tmp_path / "b.parquet", url | {"hash": 3}, other | {"hash": 4}, other | {"hash": 5}, url | {"hash": 6})
    done = filtered(tmp_path)
    assert [row["hash"] for row in done.kept] == [1, 2]
    assert done.rejected == {"similarity": 1, "duplicate_url": 3, "duplicate_normalised_url": 1}
    assert [row["hash"] for row in filtered(tmp_path, deduplicate=False).kept] == [1, 2, 3, 4, 5, 6]


def test_it_keeps_what_pandas_keeps(tmp_path: Path) -> None:
    draw = random.Random(0)
    changes = [
        {
            "URL": f"https://a.org/{draw.randrange(400)}",
            "TEXT": "w" * draw.randrange(10, 400),
            "WIDTH": draw.randrange(300, 2000),
            "HEIGHT": draw.randrange(300, 2000),
            "similarity": draw.uniform(0.25, 0.4),
            "pwatermark": draw.random(),
            "punsafe": draw.random(),
            "AESTHETIC_SCORE": draw.uniform(6, 7),
        }
        for _ in range(4000)
    ]
    dump(tmp_path / "in" / "a.parquet", *changes[:1500], row_group_size=400)
    dump(tmp_path / "in" / "b.parquet", *changes[1500:])
    done = filtered(tmp_path / "in")
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
    assert [(row["url"], row["width"]) for row in done.kept] == [*zip(good.URL, good.WIDTH, strict=True)]


def test_types_are_coerced_and_what_could_not_be_is_counted(tmp_path: Path) -> None:
    sizes = [{"WIDTH": "640"}, {"WIDTH": " 640.0 "}, {"WIDTH": "wide"}, {"WIDTH": None}, {"WIDTH": "nan"}]
    file = dump(tmp_path / "a.parquet", *sizes)
    done = filtered(file)
    assert [row["width"] for row in done.kept] == [640, 640]
    assert done.work.tally.uncoercible["width"] == 2
    assert done.work.tally.nulls["width"] == 1


def test_files_that_spell_and_type_columns_differently_go_together(tmp_path: Path) -> None:
    dump(tmp_path / "in" / "a.parquet", {})
    table = rows({"URL": "https://a.org/b.jpg", "WIDTH": 640.0})
    names = {"URL": "url", "TEXT": "caption", "WIDTH": "original_width", "AESTHETIC_SCORE": "aesthetic"}
    pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), tmp_path / "in" / "b.parquet")
    done = filtered(tmp_path / "in")
    assert [row["url"] for row in done.kept] == ["https://a.org/0.jpg", "https://a.org/b.jpg"]


def test_an_nsfw_column_decides_where_there_is_one(tmp_path: Path) -> None:
    labels = ["UNLIKELY", "unlikely ", "NSFW", "UNSURE", None]
    file = dump(tmp_path / "a.parquet", *[{"NSFW": label, "punsafe": 0.9} for label in labels])
    done = filtered(file)
    assert done.rejected == {"nsfw": 3}


def test_rules_of_language_and_patterns(tmp_path: Path) -> None:
    texts = ["a photo of a quiet harbour", "a painting of a quiet harbour", "a photo of a harbour, stock photo"]
    changes = [{"TEXT": text, "LANGUAGE": "en"} for text in texts] + [{"TEXT": texts[0], "LANGUAGE": "fr"}]
    cuts = {"language": "EN", "caption_match": r"\bphoto\b", "caption_exclude": "(?i)STOCK"}
    done = filtered(dump(tmp_path / "a.parquet", *changes), **cuts)
    assert done.rejected == {"language": 1, "caption_match": 1, "caption_exclude": 1}


def test_a_rule_that_is_off_needs_no_column(tmp_path: Path) -> None:
    table = rows({}).drop_columns(["AESTHETIC_SCORE", "punsafe"])
    pq.write_table(table, tmp_path / "a.parquet")
    done = filtered(tmp_path / "a.parquet", min_aesthetic=None, max_unsafe=None)
    assert len(done.kept) == 1


def test_histograms_count_every_value_once_and_no_missing_one(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", *[{"AESTHETIC_SCORE": score} for score in (1.0, 6.75, 6.75, 99.0, None)])
    done = filtered(file)
    counts, bin_of = done.work.tally.histograms["aesthetic score"], int((6.75 - 1) / 9 * 60)
    assert sum(counts) == 4 and counts[0] == 1 and counts[-1] == 1 and counts[bin_of] == 2


def test_histograms_of_many_rows_are_of_one_in_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.metadata.filtering.SAMPLE_ROWS", 10)
    done = filtered(dump(tmp_path / "a.parquet", *[{}] * 40))
    assert done.work.every == 4 and sum(done.work.tally.histograms["aesthetic score"]) == 10
    assert sum(done.work.tally.histograms["caption length of the rows that reach it"]) == 40


def test_object_storage_gives_what_files_give(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", *[{}] * 5)
    fsspec.filesystem("memory").pipe("/dump2/a.parquet", file.read_bytes())
    there = filtered("memory://dump2/*.parquet")
    assert there.kept == filtered(file).kept and len(there.kept) == 5


@pytest.mark.slow
def test_http_gives_what_files_give(tmp_path: Path, server: str) -> None:  # noqa: F811
    dump(tmp_path / "a.parquet", *[{}] * 5)
    done = filtered(f"{server}/a.parquet")
    assert len(done.kept) == 5


def test_damage_is_counted_survived_and_named(tmp_path: Path) -> None:
    dump(tmp_path / "in" / "a.parquet", *[{"hash": i} for i in range(6)], row_group_size=2)
    spoilt_group(tmp_path / "in" / "a.parquet", 1)
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 nothing")
    dump(tmp_path / "in" / "c.parquet", *[{"hash": i, "URL": f"https://c.org/{i}"} for i in (6, 7)])
    done = filtered(tmp_path / "in")
    assert [row["hash"] for row in done.kept] == [0, 1, 4, 5, 6, 7]
    assert done.work.tally.rows == 6 and sorted(d.rows for d in done.work.damaged) == [0, 2]


def test_a_caption_of_a_wrong_encoding_is_missing_and_the_rest_goes_on(tmp_path: Path) -> None:
    table = rows({}, {}, {})
    texts = pa.array([b"a caption of some length", b"caf\xe9 au lait, in a small cup", b"\x00control\x07 in a caption"])
    pq.write_table(table.set_column(1, "TEXT", texts.view(pa.string())), tmp_path / "a.parquet")
    done = filtered(tmp_path / "a.parquet")
    assert len(done.kept) == 2 and done.rejected == {"caption_length": 1}
    assert done.work.tally.uncoercible["caption"] == 1

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.__main__ import main
from ldm.commands.filter import recipe
from tests.data.dumps import dump, rows
from tests.metadata.test_filtering import RECIPE
from tests.metadata.test_tables import corrupt_group, server  # noqa: F401 - server is a fixture


def kept(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.iterdir()) for row in pq.read_table(path).to_pylist()]


def report(out: Path) -> dict[str, Any]:
    return dict(json.loads(out.with_name(f"{out.name}.report.json").read_text()))


def rejected(out: Path) -> dict[str, int]:
    return {step["reason"]: step["rejected"] for step in report(out)["funnel"] if step["rejected"]}


def run(source: Path | str, out: Path, *options: str) -> None:
    assert main(["filter", str(source), "--out", str(out), "--threads", "1", *options]) == 0


@pytest.mark.parametrize(("rows_per_shard", "sizes"), [(100, [10]), (5, [5, 5]), (4, [3, 3, 4]), (1, [1] * 10)])
def test_shards_have_equal_sizes_and_their_own_folder(rows_per_shard: int, sizes: list[int], tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", *[{}] * 10)
    run(file, tmp_path / "out", "--rows-per-shard", str(rows_per_shard))
    found = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in found] == [f"{i:05d}.parquet" for i in range(len(sizes))]
    assert [pq.read_metadata(path).num_rows for path in found] == sizes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "out", "out.report.json", "out.report.png"]


def test_the_report_has_thresholds_histograms_and_a_figure(tmp_path: Path) -> None:
    run(dump(tmp_path / "a.parquet", {}, {"AESTHETIC_SCORE": 3.0}), tmp_path / "out")
    content = report(tmp_path / "out")
    assert content["histograms"]["aesthetic score"]["cuts"] == [6.5]
    assert sum(content["histograms"]["aesthetic score"]["counts"]) == content["rows"] == 2
    with Image.open(tmp_path / "out.report.png") as figure:
        assert figure.width > 1000


def test_nan_scores_and_sizes_are_rejected_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [{"WIDTH": 640.0}, {"AESTHETIC_SCORE": math.nan}, {"WIDTH": math.nan}, {"WIDTH": math.inf}]
    run(dump(tmp_path / "a.parquet", *changes, {"AESTHETIC_SCORE": 7.0, "WIDTH": 700.0}), tmp_path / "out")
    assert rejected(tmp_path / "out") == {"aesthetic": 1, "side": 2} and len(kept(tmp_path / "out")) == 2
    assert report(tmp_path / "out")["uncoercible"] == {"aesthetic": 1, "width": 2}
    assert "2 values of width could not be converted and count as missing" in capsys.readouterr().out


def test_using_punsafe_in_place_of_nsfw_is_printed_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(dump(tmp_path / "a.parquet", {}), tmp_path / "out")
    message = "punsafe < 0.5 stands in for NSFW UNLIKELY"
    assert message in capsys.readouterr().out and message in report(tmp_path / "out")["stand_in"]


def test_the_config_file_sets_the_rules_and_options_override_it(tmp_path: Path) -> None:
    recipe = (Path(__file__).parents[3] / "ldm" / "assets" / "laion_sd15_filter.yaml").read_text()
    config = tmp_path / "rules.yaml"
    config.write_text(recipe.replace("min_aesthetic: 6.5", "min_aesthetic: 5"))
    file = dump(tmp_path / "a.parquet", {"AESTHETIC_SCORE": 5.5}, {"AESTHETIC_SCORE": 4.5})
    run(file, tmp_path / "out", "--config", str(config))
    assert rejected(tmp_path / "out") == {"aesthetic": 1}
    run(file, tmp_path / "out2", "--config", str(config), "--min-aesthetic", "4")
    assert rejected(tmp_path / "out2") == {}


def test_too_many_unreadable_rows_are_an_error_without_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dump(tmp_path / "a.parquet", *[{}] * 6, row_group_size=2)
    corrupt_group(file, 1)
    assert main(["filter", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "2 of 6 rows are unreadable, more than --max-bad-share 0.01" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(("share", "code"), [("0.4", 1), ("0.6", 0)])
def test_a_file_without_a_footer_counts_as_one_of_average_size(share: str, code: int, tmp_path: Path) -> None:
    dump(tmp_path / "in" / "a.parquet", {}, {})
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 without a footer")
    assert main(["filter", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--max-bad-share", share]) == code


def test_a_table_without_rows_is_filtered(tmp_path: Path) -> None:
    pq.write_table(rows({}).slice(0, 0), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "out")
    assert report(tmp_path / "out")["rows"] == 0


def test_a_missing_safety_rule_is_an_error_unless_disabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = dump(tmp_path / "a.parquet", {}), ["--out", str(tmp_path / "out"), "--max-unsafe", "none"]
    assert main(["filter", str(file), *out]) == 1
    assert "a file has no NSFW column: give --max-unsafe, or --nsfw none" in capsys.readouterr().err
    assert main(["filter", str(file), *out, "--nsfw", "none"]) == 0


def test_the_default_rules_are_those_of_the_recipe() -> None:
    args = argparse.Namespace(config=None, preset=recipe.DEFAULT, header=None)
    assert recipe.read(args) == recipe.Recipe(RECIPE, {}, None)


def test_keeping_no_row_gives_an_empty_folder_and_a_report(tmp_path: Path) -> None:
    run(dump(tmp_path / "a.parquet", {"similarity": 0.0}), tmp_path / "out")
    assert kept(tmp_path / "out") == [] and report(tmp_path / "out")["kept"] == 0


@pytest.mark.parametrize("name", ["out.report.json", "out.report.png"])
def test_the_report_never_replaces_another_kind_of_file(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text('{"theirs": 1}')
    file = dump(tmp_path / "a.parquet", {"similarity": 0.0})
    assert main(["filter", str(file), "--out", str(tmp_path / "out")]) == 1
    assert f"{name} was not written by ldm filter" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == '{"theirs": 1}' and not (tmp_path / "out").exists()
    (tmp_path / name).unlink()
    for _ in range(2):  # the folder stays empty, so it can be used again
        run(file, tmp_path / "out")


def test_an_output_folder_in_the_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump(tmp_path / "in" / "a.parquet", {})
    assert main(["filter", str(tmp_path / "in"), "--out", str(tmp_path / "in" / "kept")]) == 1
    assert f"--out {tmp_path}/in/kept is in the input {tmp_path}/in, so that" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.parquet"]


def test_a_dry_run_prints_a_prediction_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [{"AESTHETIC_SCORE": 7.0 if i % 4 == 0 else 5.0} for i in range(1000)]
    file = dump(tmp_path / "a.parquet", *changes, row_group_size=100)
    options = ["--dry-run", "--sample-rows", "200", "--alive", "0.5", "--pictures-per-second", "1"]
    assert main(["filter", str(file), *options]) == 0
    output = capsys.readouterr().out
    assert "sample: 200 of 1,000 rows, 25.000% kept" in output and "kept rows: 250" in output
    assert "images: 125," in output and "latent cache: 8.19 MB" in output  # 125 × 2·4·64·64 float16
    assert "download: 0.07 h" in output and "aesthetic: 5.0 to 7.0, 0 nulls" in output
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--out is missing: give --out F"),
        (["--out", "{tmp}"], "exists and is not an empty folder"),
        (["--out", "{tmp}/o", "--min-side", "big"], "min_side=big: expected a number"),
        (["--out", "{tmp}/o", "--min-side", "inf"], "expected a finite number"),
        (["--out", "{tmp}/o", "--deduplicate", "none"], "expected true or false"),
        (["--out", "{tmp}/o", "--caption-match", "("], "caption_match=( is not a regular expression"),
        (["--out", "{tmp}/o", "--config", "{tmp}/none.yaml"], "cannot be read"),
        (["--out", "{tmp}/o", "--column", "colour=RED"], "colour is not one of"),
        (["--out", "{tmp}/o", "--rows-per-shard", "0"], "expected more than 0"),
        (["--out", "{tmp}/o", "--max-bad-share", "2"], "expected a share from 0 to 1"),
        (["--out", "{tmp}/o", "--min-side", "1e300"], "expected a finite number below 1e+09"),
        (["--out", "{tmp}/o", "--threads", "100000000"], "expected more than 0, up to 1024"),
        (["--dry-run", "--sample-rows", "99999999999999999999"], "expected more than 0, up to 1e+09"),
        (["--dry-run", "--pictures-per-second", "inf"], "expected more than 0, up to 1e+09"),
        (["--out", "{tmp}/o", "--min-caption", "300", "--max-caption", "20"], "min_caption=300 is more than max_"),
        (["--out", "{tmp}/o", "--min-aspect", "3"], "min_aspect=3 is more than max_aspect=2, so no row"),
    ],
)
def test_an_invalid_command_line_exits_with_code_2(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dump(tmp_path / "a.parquet", {})
    assert main(["filter", str(file), *[option.replace("{tmp}", str(tmp_path)) for option in options]]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_an_output_folder_that_is_not_writable_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = dump(tmp_path / "a.parquet", {})
    assert main(["filter", str(file), "--out", f"{file}/out"]) == 1
    assert f"cannot write into {file}: {file} is not a folder; give another folder" in capsys.readouterr().err


def test_missing_and_unknown_rules_of_a_config_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, config = dump(tmp_path / "a.parquet", {}), tmp_path / "rules.yaml"
    for text, problem in (
        (recipe.path_of(recipe.DEFAULT).read_text() + "\nmin_sid: 3\n", "has min_sid:"),
        ("min_side: 3", "lacks min_aesthetic,"),
    ):
        config.write_text(text)
        assert main(["filter", str(file), "--out", str(tmp_path / "out"), "--config", str(config)]) == 2
        assert f"{config} {problem}" in capsys.readouterr().err


def test_a_missing_column_is_reported_with_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(rows({}).drop_columns(["pwatermark"]), tmp_path / "a.parquet")
    assert main(["filter", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]) == 1
    assert "--column pwatermark=COLUMN" in capsys.readouterr().err

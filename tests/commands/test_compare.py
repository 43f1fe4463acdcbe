import json
import shutil
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.ownership import Record
from tests.report.made import made_run


def test_runs_become_a_page_a_text_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(made_run(tmp_path / f"{s}{n}", n, s, {"fid": 3.0 + n})) for s in ("Flow", "Cosine") for n in (0, 1)]
    assert main(["compare", *runs, "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        ".ldm_compare.json",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["groups"][1]["seeds"] == [0, 1]
    assert (tmp_path / "figures" / "error_by_noise.pdf").is_file()
    told = capsys.readouterr().out
    assert "no difference shown" in told and str(tmp_path / "out" / "report.html") in told


def test_a_comparison_is_repeated_in_the_same_folders(tmp_path: Path) -> None:
    command = ["compare", str(tmp_path / "a"), "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "out")]
    for fid in (1.0, 2.0):
        made_run(tmp_path / str(fid), metrics={"fid": fid}).rename(tmp_path / "a")
        assert main(command) == 0
        groups = json.loads((tmp_path / "out" / "report.json").read_text())["groups"]
        assert groups[0]["metrics"]["fid"]["mean"] == fid
        shutil.rmtree(tmp_path / "a")
    assert (tmp_path / "out" / "error_by_noise.svg").is_file()


@pytest.mark.parametrize("name", ["out/report.html", "out/report.md", "out/report.json", "figures/error_by_noise.svg"])
@pytest.mark.parametrize("theirs", [True, False])
def test_a_file_that_no_comparison_wrote_or_that_was_changed_since_is_kept(
    tmp_path: Path, name: str, theirs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(made_run(tmp_path / "a", metrics={"fid": 1.0}))
    command = ["compare", run, "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]
    if not theirs:
        assert main(command) == 0
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("theirs")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(command) == 1
    assert f"{tmp_path / name} was not written by ldm compare, or was changed since" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_evaluation_that_is_compared_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = made_run(tmp_path / "a", metrics={"fid": 1.0}) / "metrics.json"
    (tmp_path / "out").mkdir()
    evaluation.rename(tmp_path / "out" / "report.json")
    assert main(["compare", str(tmp_path / "out" / "report.json"), "--out", str(tmp_path / "out")]) == 1
    assert "report.json was not written by ldm compare" in capsys.readouterr().err


STUDIES = [folder for folder in (Path(__file__).parents[2] / "experiments").iterdir() if any(folder.glob("error_by_*"))]


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_the_figures_in_the_repository_may_be_made_again(folder: Path) -> None:
    assert not Record(folder, "compare").foreign(folder.glob("error_by_*"))


def test_what_is_not_finished_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    going = made_run(tmp_path / "going")
    assert main(["compare", str(going), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"{going}: in progress, step 20 of 20" in told and f"{tmp_path}: empty" in told


@pytest.mark.parametrize(
    ("names", "code", "told"),
    [(["nowhere"], 1, "there is no run"), (["."], 1, "none of these folders"), ([".", "."], 2, "given twice")],
)
def test_what_cannot_be_compared_is_refused(
    names: list[str], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in names]
    assert main(["compare", *paths, "--out", str(tmp_path / "out")]) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

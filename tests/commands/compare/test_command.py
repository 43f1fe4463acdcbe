import json
import shutil
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.ownership import Record
from tests.report.run_folders import write_run


def test_compare_writes_html_markdown_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / f"{s}{n}", n, s, {"fid": 3.0 + n})) for s in ("Flow", "Cosine") for n in range(3)]
    assert main(["compare", *runs, "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        ".ldm_compare.json",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["groups"][1]["seeds"] == [0, 1, 2]
    assert (tmp_path / "figures" / "error_by_noise.pdf").is_file()
    printed = capsys.readouterr().out
    assert "A: schedule=Flow; seeds 0, 1, 2\n" in printed and "No difference shown in FID" in printed
    assert "interval over the seeds of training" in printed
    assert str(tmp_path / "out" / "report.html") in printed


@pytest.mark.slow
def test_a_comparison_can_be_repeated_in_the_same_folders(tmp_path: Path) -> None:
    command = ["compare", str(tmp_path / "a"), "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "out")]
    for fid in (1.0, 2.0):
        write_run(tmp_path / str(fid), metrics={"fid": fid}).rename(tmp_path / "a")
        assert main(command) == 0
        groups = json.loads((tmp_path / "out" / "report.json").read_text())["groups"]
        assert groups[0]["metrics"]["fid"]["mean"] == fid
        shutil.rmtree(tmp_path / "a")
    assert (tmp_path / "out" / "error_by_noise.svg").is_file()


def compare(folder: Path) -> int:
    outputs = "--out", str(folder / "out"), "--figures", str(folder / "figures")
    return main(["compare", str(folder / "a"), *outputs])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run and its comparison, to copy."""
    folder = tmp_path_factory.mktemp("compared")
    write_run(folder / "a", metrics={"fid": 1.0})
    assert compare(folder) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("out/report.html", False),
        ("figures/error_by_noise.svg", True),
        *(
            pytest.param(name, False, marks=pytest.mark.slow)
            for name in ("out/report.md", "out/report.json", "figures/error_by_noise.svg")
        ),
    ],
)
def test_files_that_are_foreign_or_changed_are_not_overwritten(
    compared: Path, tmp_path: Path, name: str, theirs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared / "a" if theirs else compared, tmp_path / "a" if theirs else tmp_path, dirs_exist_ok=True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("theirs")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert compare(tmp_path) == 1
    assert f"{tmp_path / name} was not written by ldm compare, or was changed since" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_compare_does_not_overwrite_an_evaluation_that_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = write_run(tmp_path / "a", metrics={"fid": 1.0}) / "metrics.json"
    (tmp_path / "out").mkdir()
    evaluation.rename(tmp_path / "out" / "report.json")
    assert main(["compare", str(tmp_path / "out" / "report.json"), "--out", str(tmp_path / "out")]) == 1
    assert "report.json was not written by ldm compare" in capsys.readouterr().err


STUDIES = [folder for folder in (Path(__file__).parents[3] / "experiments").iterdir() if any(folder.glob("error_by_*"))]


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_the_figures_in_the_repository_are_unchanged_since_compare_wrote_them(folder: Path) -> None:
    assert not Record(folder, "compare").foreign(folder.glob("error_by_*"))


def test_unfinished_runs_are_printed_with_their_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    going = write_run(tmp_path / "going")
    assert main(["compare", str(going), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"{going}: in progress, step 20 of 20" in printed and f"{tmp_path}: empty" in printed


@pytest.mark.parametrize(
    ("names", "code", "message"),
    [(["nowhere"], 1, "not found"), (["."], 1, "none of these folders"), ([".", "."], 2, "given twice")],
)
def test_paths_that_cannot_be_compared_are_refused(
    names: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in names]
    assert main(["compare", *paths, "--out", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

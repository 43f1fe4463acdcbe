import json
from pathlib import Path

import pytest

from ldm.__main__ import main
from tests.report.made import made_run


def test_runs_become_a_page_a_text_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(made_run(tmp_path / f"{s}{n}", n, s, {"fid": 3.0 + n})) for s in ("Flow", "Cosine") for n in (0, 1)]
    assert main(["compare", *runs, "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["groups"][1]["seeds"] == [0, 1]
    assert (tmp_path / "figures" / "error_by_noise.pdf").is_file()
    told = capsys.readouterr().out
    assert "no difference shown" in told and str(tmp_path / "out" / "report.html") in told


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

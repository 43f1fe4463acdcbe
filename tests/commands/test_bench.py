import json
from pathlib import Path

import pytest

import experiments.solvers.measure
from ldm.__main__ import main


def test_the_numbers_are_written_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments.solvers.measure, "measure", lambda: {"solvers": {"ddim": {"order": 1.0}}})
    assert main(["bench", "solvers", "--json", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text()) == {"solvers": {"ddim": {"order": 1.0}}}


def test_without_the_studies_it_says_where_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ldm.commands.bench.CHECKOUT", tmp_path)
    assert main(["bench", "solvers", "--json", str(tmp_path / "f.json")]) == 1
    assert "run it from a checkout" in capsys.readouterr().err

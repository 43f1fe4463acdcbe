import json
from pathlib import Path
from typing import Any

import pytest

import experiments.solvers.measure
from ldm.__main__ import main
from ldm.commands.bench.command import CHECKOUT, check_replaceable

STUDIES = [CHECKOUT / "experiments" / name for name in ("benchmark", "layouts", "solvers")]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    numbers = {"solvers": {"ddim": {"order": 1.0}}}
    monkeypatch.setattr(experiments.solvers.measure, "measure", lambda: numbers)
    return numbers


def test_the_json_file_of_the_same_benchmark_is_replaced(tmp_path: Path, measured: dict[str, Any]) -> None:
    for _ in range(2):
        assert main(["bench", "solvers", "--json", str(tmp_path / "f.json")]) == 0
        assert json.loads((tmp_path / "f.json").read_text()) == {"bench": "solvers"} | measured


@pytest.mark.parametrize("held", ["theirs", "[1]", '{"solvers": {}}', '{"bench": "train"}'])
def test_any_other_file_is_kept_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments.solvers.measure, "measure", lambda: pytest.fail("measured"))
    (tmp_path / "f.json").write_text(held)
    assert main(["bench", "solvers", "--json", str(tmp_path / "f.json")]) == 1
    assert "f.json was not written by ldm bench solvers, or was changed" in capsys.readouterr().err
    assert main(["bench", "solvers", "--json", str(tmp_path)]) == 1
    assert (tmp_path / "f.json").read_text() == held


@pytest.mark.parametrize("file", sorted(p for s in STUDIES for p in s.glob("*.json")), ids=lambda path: path.name)
def test_the_numbers_in_the_repository_name_their_benchmark(file: Path) -> None:
    check_replaceable(file, file.stem)


def test_outside_a_checkout_the_error_says_where_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ldm.commands.bench.command.CHECKOUT", tmp_path)
    assert main(["bench", "solvers", "--json", str(tmp_path / "f.json")]) == 1
    assert "run it from a checkout" in capsys.readouterr().err

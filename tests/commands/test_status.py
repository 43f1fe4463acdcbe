import fcntl
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.config import waiting
from ldm.files import LOCK
from tests.report.made import made_run


def cells(out: str) -> dict[str, list[str]]:
    """Rows of the table by the folder's name."""
    lines = [line.split() for line in out.splitlines()[1:]]
    return {Path(line[0]).name: line[1:] for line in lines}


def test_runs_are_shown_with_what_they_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "a" / "done", metrics={"fid": 2.5, "accuracy": 0.5, "sampling_seconds": 3.0})
    for name in ("going", "killed", "young"):
        made_run(tmp_path / "a" / name, curves=name != "young")
        (tmp_path / "a" / name / LOCK).touch()
    locks = [open(tmp_path / "a" / name / LOCK, "rb") for name in ("going", "young")]  # noqa: SIM115 - closed below
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert main(["status", str(tmp_path)]) == 0
    for lock in locks:
        lock.close()
    told = cells(capsys.readouterr().out)
    assert list(told) == ["going", "young", "killed", "done"]
    assert told["done"][0] == "finished" and " ".join(told["done"][2:]).endswith("accuracy 50.0 %, FID 2.5")
    assert told["going"][:4] == ["in", "progress", "20/20", "120"] and "train/loss" in told["going"]
    assert told["young"][:2] == ["starting", "0/20"] and told["killed"][0] == "stopped"


def test_the_time_left_follows_from_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("max_steps: 20", "max_steps: 3620"))
    assert main(["status", str(run)]) == 0
    assert cells(capsys.readouterr().out)["run"][4] == "2:00"  # 3,600 steps of 4 pictures at 120 a second


@pytest.mark.parametrize(("path", "told"), [("nowhere", "there is no folder"), (".", "there is no run in")])
def test_nothing_to_show_is_said(path: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / path)]) == 1
    assert told in capsys.readouterr().err


def test_runs_of_a_sweep_that_have_not_begun_are_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "sweep" / "seed=1")
    for name in ("seed=1", "seed=2"):
        mark = waiting(tmp_path / "sweep" / name)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
    assert main(["status", str(tmp_path)]) == 0
    told = cells(capsys.readouterr().out)
    assert set(told) == {"seed=1", "seed=2"}
    assert told["seed=2"][0] == "waiting" and told["seed=1"][0] != "waiting"

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.commands.train.sweep import waiting_mark
from ldm.files import LOCK, lock
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
    locks = [lock(tmp_path / "a" / name) for name in ("going", "young")]
    assert main(["status", str(tmp_path)]) == 0
    for held in locks:
        os.close(held)
    told = cells(capsys.readouterr().out)
    assert list(told) == ["going", "young", "killed", "done"]
    assert told["done"][0] == "finished" and " ".join(told["done"][2:]).endswith("accuracy 50.0 %, FID 2.5")
    assert told["going"][:4] == ["in", "progress", "20/20", "120"] and "train/loss" in told["going"]
    assert told["young"][:2] == ["starting", "0/20"] and told["killed"][0] == "stopped"


def test_a_run_without_drawn_pictures_shows_its_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"val/shapes/loss": 0.25, "images_per_second": 9.0}
    made_run(tmp_path / "run", metrics=numbers, provenance={"prompts": None, "sampling": None, "size": None})
    assert main(["status", str(tmp_path)]) == 0
    told = " ".join(cells(capsys.readouterr().out)["run"])
    assert told.startswith("finished 20/20") and told.endswith("validation loss on shapes 0.25")


def test_the_time_left_follows_from_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("max_steps: 20", "max_steps: 3620"))
    assert main(["status", str(run)]) == 0
    assert cells(capsys.readouterr().out)["run"][4] == "2:00"  # 3,600 steps of 4 pictures at 120 a second


def test_a_run_without_a_last_step_has_no_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("max_steps: 20", "max_steps: -1"))
    assert main(["status", str(run)]) == 0
    assert cells(capsys.readouterr().out)["run"][:5] == ["in", "progress", "20", "120", "train/loss"]


@pytest.mark.parametrize(("path", "told"), [("nowhere", "there is no folder"), (".", "there is no run in")])
def test_nothing_to_show_is_said(path: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / path)]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf"])
def test_looks_are_some_time_apart(seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(made_run(tmp_path / "run")), "--every", seconds]) == 2
    assert f"--every {seconds}: expected more than 0 seconds" in capsys.readouterr().err


def mark(run: Path) -> None:
    waiting_mark(run).parent.mkdir(exist_ok=True)
    waiting_mark(run).touch()


def test_runs_of_a_sweep_that_have_not_begun_are_waiting_while_it_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(tmp_path / "sweep" / "seed=1")
    for name in ("seed=1", "seed=2"):
        mark(tmp_path / "sweep" / name)
    sweep = lock(tmp_path / "sweep", shared=True)
    assert main(["status", str(tmp_path)]) == 0
    os.close(sweep)
    told = cells(capsys.readouterr().out)
    assert set(told) == {"seed=1", "seed=2"}
    assert told["seed=2"][0] == "waiting" and told["seed=1"][0] != "waiting"


def test_they_are_stopped_once_its_process_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark(tmp_path / "seed=2")
    holding = "import os, signal; from ldm.files import lock; lock('.', shared=True); os.kill(os.getpid(), 9)"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", holding], cwd=tmp_path, env=path, check=False)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / LOCK).exists()
    assert main(["status", str(tmp_path)]) == 0
    told = cells(capsys.readouterr().out)["seed=2"]
    assert " ".join(told) == "stopped 0 before it began; the same sweep again begins it"

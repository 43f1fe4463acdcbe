import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.commands.train.sweep import waiting_mark
from ldm.files import LOCK, lock
from tests.report.run_folders import write_run


def cells(out: str) -> dict[str, list[str]]:
    """Returns the rows of the table by the name of the run's folder."""
    lines = [line.split() for line in out.splitlines()[1:]]
    return {Path(line[0]).name: line[1:] for line in lines}


def test_runs_are_shown_with_state_progress_and_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a" / "done", metrics={"fid": 2.5, "accuracy": 0.5, "sampling_seconds": 3.0})
    for name in ("going", "killed", "young"):
        write_run(tmp_path / "a" / name, curves=name != "young")
        (tmp_path / "a" / name / LOCK).touch()
    locks = [lock(tmp_path / "a" / name) for name in ("going", "young")]
    assert main(["status", str(tmp_path)]) == 0
    for held in locks:
        os.close(held)
    shown = cells(capsys.readouterr().out)
    assert list(shown) == ["going", "young", "killed", "done"]
    assert shown["done"][0] == "finished" and " ".join(shown["done"][2:]).endswith("accuracy 50.0 %, FID 2.5")
    assert shown["going"][:4] == ["in", "progress", "20/20", "120"] and "train/loss" in shown["going"]
    assert shown["young"][:2] == ["starting", "0/20"] and shown["killed"][0] == "stopped"


def test_a_run_without_generated_images_shows_its_validation_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = {"val/shapes/loss": 0.25, "images_per_second": 9.0}
    write_run(tmp_path / "run", metrics=numbers, provenance={"prompts": None, "sampling": None, "size": None})
    assert main(["status", str(tmp_path)]) == 0
    shown = " ".join(cells(capsys.readouterr().out)["run"])
    assert shown.startswith("finished 20/20") and shown.endswith("validation loss on shapes 0.25")


def test_the_time_left_follows_from_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("max_steps: 20", "max_steps: 3620"))
    assert main(["status", str(run)]) == 0
    assert cells(capsys.readouterr().out)["run"][4] == "2:00"  # 3,600 steps of 4 images at 120 images/s


def test_a_run_without_a_last_step_has_no_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("max_steps: 20", "max_steps: -1"))
    assert main(["status", str(run)]) == 0
    assert cells(capsys.readouterr().out)["run"][:5] == ["in", "progress", "20", "120", "train/loss"]


@pytest.mark.parametrize(("path", "message"), [("nowhere", "not found"), (".", "no run found in")])
def test_a_folder_without_runs_is_refused(
    path: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(tmp_path / path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf"])
def test_a_refresh_interval_that_is_not_positive_and_finite_is_refused(
    seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(write_run(tmp_path / "run")), "--every", seconds]) == 2
    assert f"--every {seconds}: expected more than 0 and less than 86,400 seconds" in capsys.readouterr().err


def mark(run: Path) -> None:
    waiting_mark(run).parent.mkdir(exist_ok=True)
    waiting_mark(run).touch()


def test_runs_that_have_not_started_are_waiting_while_their_sweep_is_alive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "sweep" / "seed=1")
    for name in ("seed=1", "seed=2"):
        mark(tmp_path / "sweep" / name)
    sweep = lock(tmp_path / "sweep", shared=True)
    assert main(["status", str(tmp_path)]) == 0
    os.close(sweep)
    shown = cells(capsys.readouterr().out)
    assert set(shown) == {"seed=1", "seed=2"}
    assert shown["seed=2"][0] == "waiting" and shown["seed=1"][0] != "waiting"


def test_runs_that_have_not_started_are_stopped_once_their_sweep_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark(tmp_path / "seed=2")
    holding = "import os, signal; from ldm.files import lock; lock('.', shared=True); os.kill(os.getpid(), 9)"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", holding], cwd=tmp_path, env=path, check=False)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / LOCK).exists()
    assert main(["status", str(tmp_path)]) == 0
    shown = cells(capsys.readouterr().out)["seed=2"]
    assert " ".join(shown) == "stopped 0 not started; run the same sweep again to start it"

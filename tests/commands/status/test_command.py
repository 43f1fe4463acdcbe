import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


def record(run: Path, **changes: Any) -> None:
    """Writes the state of a run that trains, with changes."""
    about = {"state": "running", "step": 3, "reason": None, "host": platform.node(), "process": 7}
    (run / "state.json").write_text(json.dumps(about | changes))


@pytest.mark.parametrize("state", ["starting", "running", "finishing"])
@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (20, "in progress 20/20 120 0:00 train/loss .* step 20 of 20, running on node7 as of 20 seconds ago$"),
        (7200, "unknown 20/20 120 step 20 of 20, running on node7 as of 2 hours ago; whether process 7 still runs "
               "cannot be seen from here: run ldm status on node7, and see log.txt$"),
    ],
)  # fmt: skip
def test_a_run_on_another_host_whose_lock_is_not_seen_is_shown_by_its_last_write(
    state: str, seconds: int, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    (run / LOCK).touch()
    record(run, state=state, host="node7")
    for file in run.rglob("*"):
        os.utime(file, (time.time() - seconds,) * 2)
    assert main(["status", str(tmp_path)]) == 0
    assert re.match(shown, " ".join(cells(capsys.readouterr().out)["run"]))


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_run_that_ended_on_another_host_is_shown_with_its_reason(
    state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(write_run(tmp_path / "run"), state=state, host="node7", reason="of old age")
    assert main(["status", str(tmp_path)]) == 0
    shown = " ".join(cells(capsys.readouterr().out)["run"])
    assert shown.startswith(state) and "of old age" in shown


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"state": "run', "cannot be read (Unterminated string"),
        ("", "cannot be read (Expecting value"),
        ("\0\0", "cannot be read (Expecting value"),
        ("null", "contains no record"),
        ("{}", "is corrupt (state is None)"),
        ({"step": None}, "is corrupt (step is None)"),
        ({"step": "3"}, "is corrupt (step is '3')"),
        ({"state": "asleep"}, "is corrupt (state is 'asleep')"),
        ({"state": ["running"]}, "is corrupt (state is ['running'])"),
        ({"host": 7}, "is corrupt (host is 7)"),
        ({"reason": {}}, "is corrupt (reason is {})"),
    ],
)
def test_a_run_with_a_corrupt_record_is_shown_with_the_problem_and_the_others_are_listed(
    text: Any, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(write_run(tmp_path / "good"), state="stopped", reason="by SIGTERM")
    write_run(tmp_path / "bad")
    record(tmp_path / "bad", **text) if isinstance(text, dict) else (tmp_path / "bad" / "state.json").write_text(text)
    assert main(["status", str(tmp_path)]) == 0
    output = capsys.readouterr()
    shown = cells(output.out)
    assert shown["good"][0] == "stopped" and not output.err
    assert " ".join(shown["bad"]).startswith("damaged 20/20 120 state.json " + problem)
    assert " ".join(shown["bad"]).endswith("; resume=auto writes it again")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.json", '{"metrics": {}, "provenance": {}, "curves": [1]}'),
        ("metrics.json", '{"metrics": {}, "provenance": {}, "curves": {"noise_loss": {"mean": [1]}}}'),
        ("metrics.json", '{"metrics": 3, "provenance": {}}'),
        ("config.yaml", "seed: [1"),
        ("config.yaml", "\0"),
    ],
)
def test_a_run_with_another_corrupt_file_is_shown_as_damaged(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "good", metrics={})
    (write_run(tmp_path / "bad", metrics={}) / name).write_text(text)
    assert main(["status", str(tmp_path)]) == 0
    shown = cells(capsys.readouterr().out)
    assert (shown["good"][0], shown["bad"][0]) == ("finished", "damaged") and len(shown["bad"]) > 3


def test_a_waiting_run_of_a_sweep_on_another_host_is_not_called_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark(tmp_path / "seed=1")
    waiting_mark(tmp_path / "seed=1").write_text("node7")
    assert main(["status", str(tmp_path)]) == 0
    shown = " ".join(cells(capsys.readouterr().out)["seed=1"])
    assert shown == "unknown 0 not started; whether its sweep on node7 still runs cannot be seen from here"

import fcntl
import json
import os
import time
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from ldm.files import LOCK
from ldm.report.runs import Curve, read_run, read_scalars
from tests.report.made import PROVENANCE, made_run


def age(folder: Path, seconds: float) -> None:
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - seconds,) * 2)


def test_a_finished_run_has_numbers_settings_and_curves(tmp_path: Path) -> None:
    run = read_run(made_run(tmp_path / "run", seed=3, metrics={"fid": 2.5}))
    assert (run.state, run.note, run.seed, run.batch) == ("finished", "", 3, 4)
    assert run.metrics == {"fid": 2.5} and run.config["trainer.max_steps"] == 20
    assert run.scalars["val/shapes/loss"] == Curve([9, 19], [0.5, 0.5])
    assert run.by_noise["log_snr"] == [2.0, 0.0, -2.0]


def test_a_run_without_numbers_is_in_progress_while_it_writes_and_stopped_after(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    assert read_run(folder).state == "in progress" and "step 20 of 20" in read_run(folder).note
    age(folder, 7200)
    run = read_run(folder)
    assert run.state == "stopped" and "last wrote 2 hours ago; go on with resume=auto" in run.note


def test_numbers_that_are_none_are_left_out_and_told(tmp_path: Path) -> None:
    run = read_run(made_run(tmp_path / "run", metrics={"fid": float("nan"), "kid": 1.0}))
    assert run.metrics == {"kid": 1.0} and run.note == "not numbers: fid"


def test_a_run_that_was_stopped_after_training_beyond_its_metrics_is_not_finished(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", metrics={"fid": 1.0}, provenance={"steps": 7})
    (folder / LOCK).touch()
    run = read_run(folder)
    assert run.state == "stopped" and run.note.startswith("step 20 of 20 (metrics of step 7), last wrote")


def test_metrics_that_were_logged_after_the_last_step_are_no_further_step(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", metrics={"fid": 1.0})
    log = folder / "csv" / "metrics.csv"
    rows = log.read_text().splitlines()
    log.write_text("\n".join([f"{rows[0]},fid", *(f"{row}," for row in rows[1:]), "20,,,,1.0"]) + "\n")
    run = read_run(folder)
    assert run.scalars["fid"].steps == [20] and run.note == ""


def test_empty_and_damaged_folders_are_what_they_are(tmp_path: Path) -> None:
    assert read_run(tmp_path).state == "empty"
    folder = made_run(tmp_path / "run", metrics={})
    (folder / "metrics.json").write_text('{"metrics": {')
    assert read_run(folder).state == "damaged" and "metrics.json cannot be read" in read_run(folder).note
    (folder / "metrics.json").write_text("[1]")
    assert "holds no metrics" in read_run(folder).note
    with pytest.raises(FileNotFoundError, match="there is no run"):
        read_run(tmp_path / "nowhere")


def test_a_file_of_an_evaluation_stands_for_a_run(tmp_path: Path) -> None:
    file = tmp_path / "steps_20.json"
    file.write_text(json.dumps({"metrics": {"fid": 1.0}, "provenance": {**PROVENANCE, "seed": 4}}))
    run = read_run(file)
    assert (run.state, run.seed, run.metrics) == ("finished", 4, {"fid": 1.0})
    assert run.config["sampling.steps"] == 20


def test_a_step_is_of_as_many_images_as_the_log_says_however_many_ranks_there_were(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    assert read_run(folder).batch == 4  # of one rank, as devices=auto does not say
    log = folder / "csv" / "metrics.csv"
    rows = [line.split(",") for line in log.read_text().splitlines()[1:]]
    lines = [",".join([*row, str(32 * (int(row[0]) + 1))]) for row in rows]
    log.write_text("\n".join(["step,train/images_per_second,train/loss,val/shapes/loss,train/images_seen", *lines]))
    run = read_run(folder)
    assert run.batch == 32 and run.minutes([19]) == pytest.approx([20 * 32 / 120 / 60])


def test_a_validation_before_the_last_step_is_told(tmp_path: Path) -> None:
    run = read_run(made_run(tmp_path / "run", metrics={"val/shapes/loss": 0.5}, provenance={"validated": 10}))
    assert run.note == "last validated at step 10 of 20"


def test_minutes_come_from_the_logged_speeds(tmp_path: Path) -> None:
    run = read_run(made_run(tmp_path / "run"))
    assert run.minutes([9, 19]) == pytest.approx([10 * 4 / 120 / 60, 20 * 4 / 120 / 60])


def test_tensorboards_files_are_read_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    for first, value in ((0, 1.0), (2, 5.0)):  # a run, and its resumption from step 2
        with SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=str(first)) as log:
            for step in range(first, first + 3):
                log.add_scalar("train/loss", value + step, step)
    curve = read_scalars(tmp_path)["train/loss"]
    assert curve.steps == [0, 1, 2, 3, 4]
    assert curve.values == [1, 2, 7, 8, 9]


def test_the_csv_logs_of_a_run_and_its_resumptions_are_one_curve(tmp_path: Path) -> None:
    for version, first, value in ((0, 0, 1.0), (2, 2, 5.0), (10, 4, 9.0)):
        log = tmp_path / "csv" / f"version_{version}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text("step,train/loss\n" + "".join(f"{step},{value}\n" for step in range(first, first + 3)))
    assert read_scalars(tmp_path)["train/loss"] == Curve([0, 1, 2, 3, 4, 5, 6], [1, 1, 5, 5, 9, 9, 9])


def test_a_lock_tells_a_run_that_lives_from_one_that_died_however_long_it_is_silent(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    (folder / LOCK).touch()
    assert read_run(folder).state == "stopped"
    age(folder, 7200)
    with open(folder / LOCK, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(folder).state == "in progress"


def test_a_run_that_measured_nothing_is_finished_once_its_weights_are_written_out(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    (folder / "unet.safetensors").touch()
    run = read_run(folder)
    assert (run.state, run.note) == ("finished", "it measured nothing")

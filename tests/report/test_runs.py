import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from ldm.files import LOCK
from ldm.report.runs import Curve, read_run, read_runs, read_scalars
from tests.report.run_folders import PROVENANCE, write_run


def age(folder: Path, seconds: float) -> None:
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - seconds,) * 2)


def test_a_finished_run_has_metrics_settings_and_curves(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", seed=3, metrics={"fid": 2.5}))
    assert (run.state, run.note, run.seed, run.batch) == ("finished", "", 3, 4)
    assert run.metrics == {"fid": 2.5} and run.config["trainer.max_steps"] == 20
    assert run.scalars["val/shapes/loss"] == Curve([9, 19], [0.5, 0.5])
    assert run.by_noise["log_snr"] == [2.0, 0.0, -2.0]


def test_a_run_without_metrics_is_in_progress_until_it_stops_writing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert read_run(folder).state == "in progress" and "step 20 of 20" in read_run(folder).note
    age(folder, 7200)
    run = read_run(folder)
    assert run.state == "stopped" and "last wrote 2 hours ago; continue with resume=auto" in run.note


def test_metrics_that_are_nan_are_left_out_with_a_note(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", metrics={"fid": float("nan"), "kid": 1.0}))
    assert run.metrics == {"kid": 1.0} and run.note == "not numbers: fid"


def test_a_run_that_stopped_after_training_beyond_its_metrics_is_not_finished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", metrics={"fid": 1.0}, provenance={"steps": 7})
    (folder / LOCK).touch()
    run = read_run(folder)
    assert run.state == "stopped" and run.note.startswith("step 20 of 20 (metrics of step 7), last wrote")


def test_metrics_logged_after_the_last_step_do_not_count_as_a_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", metrics={"fid": 1.0})
    log = folder / "csv" / "metrics.csv"
    rows = log.read_text().splitlines()
    log.write_text("\n".join([f"{rows[0]},fid", *(f"{row}," for row in rows[1:]), "20,,,,1.0"]) + "\n")
    run = read_run(folder)
    assert run.scalars["fid"].steps == [20] and run.note == ""


def test_folders_without_a_run_or_with_corrupt_files_are_recognised(tmp_path: Path) -> None:
    assert read_run(tmp_path).state == "empty"
    folder = write_run(tmp_path / "run", metrics={})
    (folder / "metrics.json").write_text('{"metrics": {')
    assert read_run(folder).state == "damaged" and "metrics.json cannot be read" in read_run(folder).note
    (folder / "metrics.json").write_text("[1]")
    assert "contains no metrics" in read_run(folder).note
    with pytest.raises(FileNotFoundError, match=r"run \S+ not found"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("report", "note"),
    [
        ({"provenance": {"prompts": "a"}}, "an invalid provenance"),
        ({"provenance": {"seed": "a"}}, "an invalid provenance"),
        ({"provenance": {"prompts": {"count": 1, "seeds": [None]}}}, "an invalid provenance"),
        ({"provenance": {"prompts": {"count": 1, "seeds": "a"}}}, "an invalid provenance"),
        ({"provenance": {"prompts": {"count": "a", "seeds": [1, 2]}}}, "an invalid provenance"),
        ({"curves": {"noise_loss": [1]}}, "has no list log_snr"),
        ({"curves": {"noise_loss": {"log_snr": [1], "mean": [1, 2]}}}, "different numbers of levels and values"),
        (3, "no metrics with their provenance"),
    ],
)
def test_an_evaluation_with_contents_of_the_wrong_type_is_damaged(tmp_path: Path, report: Any, note: str) -> None:
    report = {"metrics": {"fid": 1.0}, "provenance": {}} | report if isinstance(report, dict) else report
    (tmp_path / "one.json").write_text(json.dumps(report))
    (tmp_path / "sweep.json").write_text(json.dumps({"evaluations": [report]}))
    for run in (*read_runs(tmp_path / "one.json"), *read_runs(tmp_path / "sweep.json")):
        assert run.state == "damaged" and note in run.note


def test_the_json_file_of_an_evaluation_is_read_as_a_run(tmp_path: Path) -> None:
    file = tmp_path / "steps_20.json"
    file.write_text(json.dumps({"metrics": {"fid": 1.0}, "provenance": {**PROVENANCE, "seed": 4}}))
    run = read_run(file)
    assert (run.state, run.seed, run.metrics) == ("finished", 4, {"fid": 1.0})
    assert run.config["sampling.steps"] == 20


def test_the_batch_size_comes_from_the_log_if_the_config_does_not_give_the_ranks(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert read_run(folder).batch == 4  # one rank is assumed, because devices=auto does not give the number
    log = folder / "csv" / "metrics.csv"
    rows = [line.split(",") for line in log.read_text().splitlines()[1:]]
    lines = [",".join([*row, str(32 * (int(row[0]) + 1))]) for row in rows]
    log.write_text("\n".join(["step,train/images_per_second,train/loss,val/shapes/loss,train/images_seen", *lines]))
    run = read_run(folder)
    assert run.batch == 32 and run.minutes([19]) == pytest.approx([20 * 32 / 120 / 60])


def test_a_note_reports_that_the_last_validation_was_before_the_last_step(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", metrics={"val/shapes/loss": 0.5}, provenance={"validated": 10}))
    assert run.note == "last validated at step 10 of 20"


def test_training_time_follows_from_the_logged_speeds(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert run.minutes([9, 19]) == pytest.approx([10 * 4 / 120 / 60, 20 * 4 / 120 / 60])


def test_in_tensorboard_logs_the_last_value_of_a_repeated_step_counts(tmp_path: Path) -> None:
    for first, value in ((0, 1.0), (2, 5.0)):  # a run, and its resumption from step 2
        with SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=str(first)) as log:
            for step in range(first, first + 3):
                log.add_scalar("train/loss", value + step, step)
    curve = read_scalars(tmp_path)["train/loss"]
    assert curve.steps == [0, 1, 2, 3, 4]
    assert curve.values == [1, 2, 7, 8, 9]


def test_csv_logs_of_a_run_and_its_resumptions_are_joined(tmp_path: Path) -> None:
    for version, first, value in ((0, 0, 1.0), (2, 2, 5.0), (10, 4, 9.0)):
        log = tmp_path / "csv" / f"version_{version}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text("step,train/loss\n" + "".join(f"{step},{value}\n" for step in range(first, first + 3)))
    assert read_scalars(tmp_path)["train/loss"] == Curve([0, 1, 2, 3, 4, 5, 6], [1, 1, 5, 5, 9, 9, 9])


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"\0\0,\0,\0\n", b"\0" * 200_000 + b"\n", b'19,"2026,0.5\n', b"19,20\r26,0.5\n", b"inf,2026,0.5\n"),
        *(b"\xff\xfe,2026,0.5\n", b"19,2026,0.5.3\n", b"19,2026,\xff\n"),
    ],
)
def test_rows_of_a_log_that_a_loss_of_power_damaged_are_skipped(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"step,time,train/loss\n9,2026,0.5\n" + damaged + b"29,2026,0.25\n")
    assert read_scalars(tmp_path) == {"train/loss": Curve([9, 29], [0.5, 0.25])}


@pytest.mark.parametrize("content", ["train/loss\n0.5\n", "\0\n9,2026,0.5\n", "\n9,2026,0.5\n", ""])
def test_a_log_without_a_header_has_no_curves(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    assert read_scalars(tmp_path) == {}


@pytest.mark.parametrize("value", ["[]", "-1", "many", "null"])
def test_a_batch_size_and_a_seed_that_are_no_numbers_count_as_unknown(tmp_path: Path, value: str) -> None:
    folder = write_run(tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    for name in ("seed: 0", "batch_size: 4", "devices: auto", "global_batch: null"):
        config = config.replace(name, f"{name.partition(':')[0]}: {value}")
    (folder / "config.yaml").write_text(config)
    assert read_run(folder).batch == 1 and read_run(folder).seed in (None, -1)


def test_a_lock_shows_whether_a_run_is_alive_even_if_it_writes_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / LOCK).touch()
    assert read_run(folder).state == "stopped"
    age(folder, 7200)
    with open(folder / LOCK, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(folder).state == "in progress"


def test_a_run_without_metrics_is_finished_once_its_weights_are_exported(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "unet.safetensors").touch()
    run = read_run(folder)
    assert (run.state, run.note) == ("finished", "no metrics were measured")

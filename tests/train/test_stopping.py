"""Compares a run that is stopped by Ctrl-C and resumed with an uninterrupted run."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.report.runs import read_scalars
from ldm.weights.model import read_model
from tests.runs import TINY
from tests.train.processes import Run, finish, read, start


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, int]:
    """A run that Ctrl-C interrupted, and its last step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    endless = "trainer.max_steps=1000000", "callbacks.checkpoint.every_n_train_steps=3", "metrics=none"
    process = start(*TINY, *endless, f"run_dir={folder}", "resume=auto")
    while not (folder / "checkpoints" / "last.ckpt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    run = finish(process)
    assert run.returncode == 128 + signal.SIGINT, run.stderr
    return folder, run, read(folder)["global_step"]


@pytest.fixture(scope="module")
def straight(stopped: tuple[Path, Run, int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """An uninterrupted run that ends seven steps after the stopped one, and is evaluated."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    evaluation = "evaluation.prompts=4", "evaluation.count=8"
    return folder, finish(start(*TINY, *evaluation, f"trainer.max_steps={stopped[2] + 7}", f"run_dir={folder}"))


@pytest.fixture(scope="module")
def resumed(stopped: tuple[Path, Run, int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """The stopped run, copied and resumed for seven more steps."""
    folder = Path(shutil.copytree(stopped[0], tmp_path_factory.mktemp("resumed") / "run"))
    steps = f"trainer.max_steps={stopped[2] + 7}"
    return folder, finish(start(*TINY, steps, "metrics=none", f"run_dir={folder}", "resume=auto"))


@pytest.mark.slow
def test_a_finished_run_writes_all_of_its_files(straight: tuple[Path, Run]) -> None:
    folder, run = straight
    assert run.returncode == 0, run.stderr
    assert f"run_dir={folder}" in (folder / "command.txt").read_text()
    assert f"run_dir: {folder}" in (folder / "config.yaml").read_text()
    assert "${" not in (folder / "config.yaml").read_text()
    assert {"metrics", "provenance"} <= json.loads((folder / "metrics.json").read_text()).keys()
    assert Image.open(folder / "samples" / "final.png").size > (64, 64)
    assert len(list((folder / "samples").glob("step_*.png"))) == 1
    assert list((folder / "tensorboard").glob("events*"))
    for model in (folder, folder / "unet.safetensors"):
        assert read_model(model).backbone.config["width"] == 16


@pytest.mark.slow
def test_a_run_prints_only_progress_results_and_one_line_warnings(straight: tuple[Path, Run]) -> None:
    folder, run = straight
    others = [line for line in run.stderr.splitlines() if not line.startswith(("training: ", "sampling: ", "encoding"))]
    assert all(line.startswith("warning: FID") for line in others), run.stderr
    assert run.stdout.startswith(f"run folder: {folder}\n") and "accuracy" in run.stdout


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_prints_how_to_resume(stopped: tuple[Path, Run, int]) -> None:
    folder, run, step = stopped
    assert step >= 3 and f"resume={folder}/checkpoints/last.ckpt" in run.stderr
    assert "Traceback" not in run.stderr and "graceful" not in run.stderr
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_like_the_uninterrupted_one(
    stopped: tuple[Path, Run, int], resumed: tuple[Path, Run], straight: tuple[Path, Run]
) -> None:
    (folder, run), step = resumed, stopped[2]
    assert run.returncode == 0, run.stderr
    assert f"resuming from {folder}/checkpoints/last.ckpt" in run.stdout
    ours, theirs = read(folder), read(straight[0])
    assert ours["global_step"] == theirs["global_step"] == step + 7
    assert ours["DataModule"] == theirs["DataModule"] == {"seen": 4 * (step + 7)}
    for part in ("state_dict", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part]), part
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (ours, theirs)]
    for weight, state in moments[0].items():
        assert all(torch.equal(torch.as_tensor(moments[1][weight][name]), tensor) for name, tensor in state.items())


@pytest.mark.slow
def test_a_run_without_evaluation_records_its_validation_and_complete_curves(
    resumed: tuple[Path, Run], straight: tuple[Path, Run]
) -> None:
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (resumed[0], straight[0]))
    losses = {name: value for name, value in theirs["metrics"].items() if name.startswith("val/")}
    assert losses and losses.items() <= ours["metrics"].items()
    assert "accuracy" in theirs["metrics"] and "accuracy" not in ours["metrics"]
    for part in ("steps", "validated", "sets", "ema", "seed"):
        assert ours["provenance"][part] == theirs["provenance"][part], part
    curves = {name.rpartition("/")[0] for name in read_scalars(resumed[0])}
    assert {"train/loss_by_log_snr", "val/shapes/loss_by_log_snr"} <= curves

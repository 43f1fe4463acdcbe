import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import train
from ldm.__main__ import main
from ldm.commands.train.rehearsal import rehearse
from ldm.report.runs import read_run, read_scalars
from ldm.weights.model import read_model
from tests.data.tars import samples, write_tar


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(train.CONF), version_base="1.3"):
        return compose("train", overrides=[*overrides, "name=test", "debug=rehearsal"])


@pytest.mark.parametrize("name", ["laion_sd2_v", "dreambooth", "shapes_vae", "emoji"])
def test_a_rehearsal_keeps_the_groups_of_its_recipe(name: str) -> None:
    with initialize_config_dir(str(train.CONF), version_base="1.3"):
        recipe, rehearsed = (
            compose("train", overrides=[f"experiment={name}", *debug], return_hydra_config=True)
            for debug in ([], ["debug=rehearsal"])
        )
    ours, theirs = (dict(each.hydra.runtime.choices) for each in (rehearsed, recipe))
    assert {group for group in theirs if ours[group] != theirs[group]} <= {"debug", *(g for g in ours if "/" in g)}
    assert (rehearsed.trainer.max_steps, rehearsed.trainer.accelerator) == (10, "cpu")
    assert rehearsed.rehearsal == ("small" if recipe.model.get("width") == 320 else "as_given")


class Calls:
    """Replaces training: records the configs, and exits with the given codes."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.configs = list(codes), list[DictConfig]()

    def __call__(self, config: DictConfig) -> None:
        self.configs.append(config)
        if code := self.codes.pop(0):
            raise SystemExit(code)


def test_a_rehearsal_resumes_in_the_same_folder_after_its_signal(tmp_path: Path) -> None:
    calls = Calls(128 + signal.SIGUSR1, 0)
    rehearse(config(f"run_dir={tmp_path}"), calls)
    first, second = calls.configs
    assert (first.resume, second.resume) == (None, "auto") and first.run_dir == second.run_dir == str(tmp_path)


def test_another_signal_ends_a_rehearsal(tmp_path: Path) -> None:
    calls = Calls(128 + signal.SIGTERM)
    with pytest.raises(SystemExit):
        rehearse(config(f"run_dir={tmp_path}"), calls)
    assert len(calls.configs) == 1


@pytest.mark.slow
def test_a_fine_tuning_rehearsal_starts_from_a_small_complete_model(tmp_path: Path) -> None:
    calls = Calls(128 + signal.SIGUSR1, 0)
    rehearse(config("experiment=lora", "data.root=x", "training.start=SD", f"run_dir={tmp_path}"), calls)
    used: Any = calls.configs[0]
    assert used.training.start == str(tmp_path / "rehearsal" / "unet.safetensors")
    assert used.training.size == [128, 128] and used.trainer.precision == "bf16-mixed"
    model = read_model(used.training.start)
    assert model.backbone.config["width"] == 32 and model.backbone.config["context_width"] == 768


@pytest.mark.slow
def test_a_rehearsal_from_a_cache_keeps_its_first_stage_and_size(tmp_path: Path) -> None:
    calls = Calls(128 + signal.SIGUSR1, 0)
    overrides = "experiment=laion_sd15", "data.cache=x", "first_stage.weights=SD", f"run_dir={tmp_path}"
    rehearse(config(*overrides), calls)
    used: Any = calls.configs[0]
    assert (used.first_stage.weights, used.training.size) == ("SD", [512, 512])
    assert used.text_encoder.weights == str(tmp_path / "rehearsal" / "text_tower.safetensors")
    assert used.training.start is None


@pytest.mark.full_size
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_the_laion_recipe_is_rehearsed_from_a_cache_with_two_processes(tmp_path: Path, launcher: str) -> None:
    tar = write_tar(tmp_path / "gray.tar", samples(32))
    assert main(["encode", str(tar), "--size", "64", "--batch", "4", "--out", str(tmp_path / "cache")]) == 0
    script, run = str(train.CONF.parent / "train.py"), tmp_path / "run"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*(start if launcher == "torchrun" else start[:1]), script, "experiment=laion_sd15", "debug=rehearsal"]
    command += [f"data.cache={tmp_path / 'cache'}", "first_stage=shapes", "training.size=[64,64]", f"run_dir={run}"]
    command += ["trainer.devices=2", "callbacks.previews.prompts=[a]", "precision=fp32", "data.global_batch=4"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "rehearsed: stopped by SIGUSR1, resumed, finished and exported unet.safetensors" in done.stdout
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 10 and checkpoint["dealing"]["ranks"] == 2
    assert read_run(run).state == "finished" and read_scalars(run)["train/loss"].steps == [*range(10)]
    assert json.loads((run / "metrics.json").read_text())["provenance"]["steps"] == 10
    log = (run / "log.txt").read_text()
    for line in (
        "rank 0 INFO training from step 0",
        "rank 1 INFO training from step 5",
        "stopped by SIGUSR1 after step 5",
    ):
        assert line in log
    assert (run / "command.txt").read_text().count("experiment=laion_sd15") == 2

"""Tests that resume a run in this process."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.callbacks.checkpointing.interruption import TIMEOUT
from ldm.report.runs import is_finished, read_run
from ldm.training.optim import constant
from ldm.weights.model import read_model
from tests.train.processes import read


@pytest.mark.slow
def test_resuming_a_finished_run_prints_that_it_is_finished(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    here("resume=auto")
    assert "resuming from" not in capsys.readouterr().out
    here("resume=auto")
    assert "has already trained for 1 steps: raise trainer.max_steps to continue" in capsys.readouterr().out


def test_resuming_a_different_model_is_refused_and_leaves_the_run_unchanged(here: Any, tmp_path: Path) -> None:
    here()
    before = (tmp_path / "config.yaml").read_text(), (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"a different model than this config builds \(width 16 → 32\)"):
        here("resume=auto", "model.width=32", "trainer.max_steps=2")
    assert before == ((tmp_path / "config.yaml").read_text(), (tmp_path / "checkpoints" / "last.ckpt").read_bytes())


@pytest.mark.slow
def test_resuming_a_run_after_its_last_epoch_prints_that_it_is_finished(
    here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        here("resume=auto", "trainer.max_steps=-1", "trainer.max_epochs=1")
    assert "has already trained for 1 epochs: raise trainer.max_epochs to continue" in capsys.readouterr().out


@pytest.mark.slow
def test_an_earlier_checkpoint_is_not_resumed_in_a_folder_with_later_ones(here: Any, tmp_path: Path) -> None:
    here("trainer.max_steps=2", "callbacks.checkpoint.every_n_train_steps=1")
    earlier = shutil.copy(tmp_path / "checkpoints" / "step_00000001.ckpt", tmp_path / "earlier.ckpt")
    with pytest.raises(ValueError, match=r"contains \S+ of step 2, later than step 1 of resume="):
        here(f"resume={earlier}", "trainer.max_steps=3")


@pytest.mark.slow
def test_another_number_of_samples_per_step_is_refused_unless_accepted(
    here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    here("data.batch_size=2", "data.global_batch=4")
    here("resume=auto", "data.batch_size=4", "data.global_batch=null", "trainer.max_steps=2")  # 4 again
    changed = "resume=auto", "data.batch_size=2", "data.global_batch=null", "trainer.max_steps=3"
    with pytest.raises(ValueError, match=r"other settings \(samples per optimizer step 4 → 2, see data\.batch_size"):
        here(*changed)
    here(*changed, "accept_changes=true")
    assert "samples per optimizer step 4 → 2" in capsys.readouterr().out


@pytest.mark.slow
def test_accepted_changes_of_optimizer_settings_take_effect(here: Any, tmp_path: Path) -> None:
    here()
    changed = {"optimizer.lr": 0.01, "optimizer.weight_decay": 0.3, "optimizer.momentum": 0.8}
    given = (f"{name}={value}" for name, value in changed.items())
    here("resume=auto", "accept_changes=true", "trainer.max_steps=2", *given)
    config = OmegaConf.load(tmp_path / "config.yaml")
    for group in read(tmp_path)["optimizer_states"][0]["param_groups"]:
        assert group["initial_lr"] == config.optimizer.lr == 0.01
        assert group["lr"] == 0.01 * constant(config.lr.warmup)(2, 2)
        for name in ("weight_decay", "momentum"):
            assert group[name] == config.optimizer[name] == changed[f"optimizer.{name}"]


@pytest.mark.slow
def test_a_run_stopped_by_its_time_limit_resumes_until_it_is_finished(
    here: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = "resume=auto", "trainer.max_steps=3", "trainer.max_time=00:00:00:00"
    for step in (1, 2):
        with pytest.raises(SystemExit) as stopped:
            here(*again)
        assert stopped.value.code == TIMEOUT and read(tmp_path)["global_step"] == step
        assert read_run(tmp_path).state == "stopped" and not is_finished(tmp_path)
    here(*again)
    assert read(tmp_path)["global_step"] == 3 and is_finished(tmp_path)
    capsys.readouterr()
    here(*again)
    assert "has already trained for 3 steps" in capsys.readouterr().out


def as_of_version_0_1(path: Path) -> None:
    """Rewrites a checkpoint in the format of version 0.1, which had no adapters."""
    checkpoint = torch.load(path, weights_only=True)
    state, settings = checkpoint["state_dict"], checkpoint["settings"]
    checkpoint["state_dict"] = {name.replace("backbone.", "unet.", 1): tensor for name, tensor in state.items()}
    settings["training"]["unet"] = settings["training"].pop("backbone")
    del settings["adapter"], settings["training"]["adapter"]
    torch.save(checkpoint, path)


@pytest.mark.slow
def test_a_run_of_version_0_1_can_be_loaded_and_resumed(here: Any, tmp_path: Path) -> None:
    here()
    exported = read_model(tmp_path / "unet.safetensors").backbone.state_dict()
    as_of_version_0_1(tmp_path / "checkpoints" / "last.ckpt")
    read = read_model(tmp_path).backbone.state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in exported.items())
    here("resume=auto", "trainer.max_steps=2")
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2

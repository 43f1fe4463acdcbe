"""Invalid settings are refused, and valid ones reach Lightning."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from ldm.commands.train.messages import exit_code, sentence
from ldm.errors import EXPECTED
from tests.train.processes import finish, start


@pytest.mark.slow
def test_contradictory_settings_are_refused_in_one_line(tmp_path: Path) -> None:
    run = finish(start("schedule=flow", "prediction=eps", f"run_dir={tmp_path}/run"))
    assert run.returncode == 2 and not run.stdout
    assert run.stderr.startswith("error: prediction=eps") and run.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_is_a_usage_error(tmp_path: Path) -> None:
    run = finish(start("trainer.max_step=1", f"run_dir={tmp_path}/run"))
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == "error: there is no key trainer.max_step: did you mean trainer.max_steps?\n"


@pytest.mark.slow
def test_the_trainer_settings_reach_lightning(here: Any, tmp_path: Path) -> None:
    given = {
        **{"max_steps": 3, "max_epochs": 7, "+min_steps": 2, "+min_epochs": 1, "devices": 1, "num_nodes": 1},
        **{"val_check_interval": 2, "limit_val_batches": 2, "num_sanity_val_steps": 1, "log_every_n_steps": 3},
        **{"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "detect_anomaly": "true"},
    }
    others = "+trainer.inference_mode=false", "trainer.check_val_every_n_epoch=null", "precision=bf16-mixed"
    spy = f"+callbacks.spy._target_={Spy.__module__}.Spy"
    arguments = (f"+trainer.{k[1:]}={v}" if k[0] == "+" else f"trainer.{k}={v}" for k, v in given.items())
    here(*arguments, *others, spy)
    run = Spy.trainer
    for name, value in given.items():
        attribute = (
            "_detect_anomaly" if name == "detect_anomaly" else name.removeprefix("+").replace("devices", "num_devices")
        )
        assert getattr(run, attribute) == (True if value == "true" else value), name
    assert run.check_val_every_n_epoch is None and run.precision == "bf16-mixed" and not Spy.inference
    assert run.accumulate_grad_batches == 1 and run.default_root_dir == str(tmp_path)
    recorded = OmegaConf.load(tmp_path / "config.yaml").trainer
    assert all(
        recorded[name.removeprefix("+")] == (True if value == "true" else value) for name, value in given.items()
    )


class Spy(Callback):
    """Records the Trainer of the last run in this process, and whether it validated in inference mode."""

    trainer: Any = None
    inference: Any = None

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        Spy.trainer = trainer

    def on_validation_batch_start(self, *_: Any) -> None:
        Spy.inference = torch.is_inference_mode_enabled()


def test_without_the_callbacks_there_are_no_checkpoints_and_no_progress_bar(here: Any, tmp_path: Path) -> None:
    here("~callbacks.checkpoint", "~callbacks.progress", f"+callbacks.spy._target_={Spy.__module__}.Spy")
    assert Spy.trainer.global_step == 1 and Spy.trainer.progress_bar_callback is None
    assert not list(tmp_path.rglob("*.ckpt"))


# Parts of messages about files that do not exist, and about what is known only when training is set up.
NOT_IN_THE_CONFIG = "does not exist", "no shards at", "there is no model", "training samples", "callbacks.checkpoint"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resume={}/none.ckpt",), "resume=.*none.ckpt does not exist"),
        (("data=shards", "data.shards={}/none.tar"), "no shards at .*none.tar: no such file"),
        (("data=shards", "data.shards={}"), "no shards at .*: the folder contains no .tar"),
        (("data=folder", "data.root={}"), "has no images: expected .png, .jpg"),
        (("data=shards",), "data.shards has no default: give data.shards=…"),
        (("data.batch_size=19",), "18 training samples, fewer than the 19 of one optimizer step"),
        (("data.global_batch=6",), "data.global_batch=6 is not a multiple of data.batch_size=4 x 1 ranks"),
        (("first_stage.weights={}/none.safetensors",), "there is no model .*none.safetensors"),
        (("text_encoder.weights=assets:vae.safetensors",), "is a vae written by ldm and holds no text_tower"),
        (("sampler.spacing=custom", "+sampler.spacing_options.times=[0.5,0.9]"), "times of spacing=custom must be"),
        (("optimizer.lr=-1",), "are \\(-1, .*but lr must be >= 0|Invalid learning rate: -1"),
        (("evaluation.prompts=8",), "evaluation.prompts=8 asks for images at the end, but metrics=none"),
        (("+sampler.options.eat=1",), "sampler=dpmpp_2m has no option 'eat'"),
        (("+training.sampling.eat=1",), "training.sampling.eat is not a sampling setting: the settings are sampler, "),
        (
            ("+trainer.accumulate_grad_batches=4",),
            "accumulate_grad_batches is not supported: set data.global_batch",
        ),
        (("trainer.max_time=5",), "trainer.max_time is 5, but must give days, hours, minutes and seconds"),
        (
            ("trainer.max_time=00:00:00:09", "~callbacks.checkpoint"),
            "max_time .* requires callbacks.checkpoint",
        ),
        (("+callbacks.new.folder=x",), "callbacks.new has no _target_ and would be ignored"),
        (("training.size=[128,128]",), "images of data.module.train are 64x64, but training.size is \\[128, 128\\]"),
        (("data=shards", "data.shards=x", "data.size=128"), "data.size is 128 and training.size is \\[64, 64\\]"),
        (("schedule=flow_at_resolution", "schedule.positions=9", "schedule.trained=9"), "set schedule.positions=64"),
    ],
)
def test_invalid_settings_are_refused_in_one_sentence(
    here: Any, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises((*EXPECTED, HydraException)) as refusal:
        here(*(argument.format(tmp_path) for argument in arguments))
    assert re.search(message, sentence(refusal.value)), sentence(refusal.value)
    assert exit_code(refusal.value) == (1 if any(part in message for part in NOT_IN_THE_CONFIG) else 2)

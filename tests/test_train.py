"""Tests `python train.py`, in a subprocess where a process of its own is needed, otherwise in this process."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from PIL import Image

import train
from ldm.callbacks.checkpointing.interruption import TIMEOUT
from ldm.commands.train.messages import sentence
from ldm.errors import EXPECTED
from ldm.report.runs import is_finished, read_run, read_scalars
from ldm.training.optim import constant
from ldm.weights.model import read_model
from tests import runs
from tests.runs import ALONE, TINY
from tests.training.tiny import GRADIENT, UNIT

ROOT = Path(train.__file__).parent
Run = subprocess.CompletedProcess[str]


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same order of summation in every run
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> Run:
    out, err = process.communicate(timeout=500)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def read(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


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


def test_a_run_prints_only_progress_results_and_one_line_warnings(straight: tuple[Path, Run]) -> None:
    folder, run = straight
    others = [line for line in run.stderr.splitlines() if not line.startswith(("training: ", "sampling: ", "encoding"))]
    assert all(line.startswith("warning: FID") for line in others), run.stderr
    assert run.stdout.startswith(f"run folder: {folder}\n") and "accuracy" in run.stdout


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


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_global_batch(tmp_path: Path) -> None:
    both = "precision=32", "+optimizer.eps=1e-2", "trainer.max_steps=6", "metrics=none", "ema=none", "logger=none"
    two = "strategy=ddp", "trainer.devices=2", "data.batch_size=2"
    both_runs = [start(*TINY, *both, f"run_dir={tmp_path}/1"), start(*TINY, *both, *two, f"run_dir={tmp_path}/2")]
    for run in map(finish, both_runs):
        assert run.returncode == 0, run.stderr
    one, other = read(tmp_path / "1"), read(tmp_path / "2")
    assert one["DataModule"] == other["DataModule"] == {"seen": 24}
    # Means over two batches of 2 are rounded differently than means over 4. Muon's largest update, of a 16 x 288
    # matrix, is lr · 0.2 · sqrt(288) times the output of Newton-Schulz, whose slope is at most 3.4445⁴ = 141. Weights
    # with AdamW updates differ by less, because 2 · lr / eps is smaller.
    slope = 4e-3 * 0.2 * 288**0.5 * 141
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=6 * 4 * UNIT, atol=6 * slope * 2 * GRADIENT)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_every_run_of_a_sweep_has_its_own_ranks(tmp_path: Path, launcher: str) -> None:
    sweep = "-m", "seed=1,2", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}"
    run = finish(start(*TINY, *sweep, "trainer.max_steps=1", "metrics=none", "strategy=ddp", "trainer.devices=2"))
    assert run.returncode == 0, run.stderr
    folders = [path.parent for path in tmp_path.glob("*/config.yaml")]
    assert [read(folder)["DataModule"] for folder in folders] == [{"seen": 8}, {"seen": 8}]


@pytest.mark.slow
def test_a_sweep_with_a_failed_job_runs_the_others_and_skips_finished_runs(tmp_path: Path) -> None:
    joblib = "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", f"hydra.sweep.dir={tmp_path}"
    sweep = *TINY, "-m", "model.context_width=17,128", "trainer.max_steps=1", "metrics=none", *joblib
    run = finish(start(*sweep))
    assert run.returncode == 1
    assert re.search(
        rf"error: {tmp_path}/\S+: the unet reads text of width 17, but the text encoder gives text of width 128",
        run.stderr,
    ), run.stderr
    assert "Traceback" not in run.stderr
    (folder,) = (path.parent for path in tmp_path.glob("*/config.yaml"))
    assert read(folder)["global_step"] == 1
    assert [*(tmp_path / ".waiting").iterdir()] == []
    command = (folder / "command.txt").read_text()
    assert {"model.context_width=128", f"run_dir='{folder}'", "resume='auto'"} <= {*shlex.split(command)}
    again = finish(start(*sweep))
    assert again.returncode == 1 and f"{folder} is already finished: skipped" in again.stdout


@pytest.mark.slow
def test_a_sweep_that_lacks_a_required_key_names_it() -> None:
    run = finish(start("-m", "experiment=emoji", "seed=0"))
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "data.shards has no default: give data.shards=…" in run.stderr


@pytest.mark.slow
def test_contradictory_settings_are_refused_in_one_line(tmp_path: Path) -> None:
    run = finish(start("schedule=flow", "prediction=eps", f"run_dir={tmp_path}/run"))
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("error: prediction=eps") and run.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_is_a_usage_error(tmp_path: Path) -> None:
    run = finish(start("trainer.max_step=1", f"run_dir={tmp_path}/run"))
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == "error: there is no key trainer.max_step: did you mean trainer.max_steps?\n"


@pytest.fixture
def here(tmp_path: Path) -> Any:
    """Returns a function that trains in this process."""
    return lambda *arguments: runs.run(tmp_path, *TINY, *ALONE, "trainer.max_steps=1", *arguments)


def test_resuming_a_finished_run_prints_that_it_is_finished(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    here("resume=auto")
    assert "resuming" not in capsys.readouterr().out
    here("resume=auto")
    assert "has already trained for 1 steps: raise trainer.max_steps to continue" in capsys.readouterr().out


def test_resuming_a_different_model_is_refused_and_leaves_the_run_unchanged(here: Any, tmp_path: Path) -> None:
    here()
    before = (tmp_path / "config.yaml").read_text(), (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"a different model than this config builds \(width 16 → 32\)"):
        here("resume=auto", "model.width=32", "trainer.max_steps=2")
    assert before == ((tmp_path / "config.yaml").read_text(), (tmp_path / "checkpoints" / "last.ckpt").read_bytes())


def test_resuming_a_run_after_its_last_epoch_prints_that_it_is_finished(
    here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        here("resume=auto", "trainer.max_steps=-1", "trainer.max_epochs=1")
    assert "has already trained for 1 epochs: raise trainer.max_epochs to continue" in capsys.readouterr().out


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
    """Stores the Trainer of the last run in this process, and whether it validated in inference mode."""

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


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that runs a sweep in this process, and returns its exit code and the run folders."""
    monkeypatch.setattr("ldm.commands.train.run.quiet_logging", lambda: None)
    own = (
        "-m",
        "--config-path",
        str(train.CONF),
        *TINY,
        "metrics=none",
        "logger=none",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )

    def run(*arguments: str) -> tuple[int, list[Path]]:
        monkeypatch.setattr(sys, "argv", ["train.py", *own, *arguments])
        code = 0
        try:
            train.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, sorted(path.parent for path in tmp_path.glob("sweep/*/config.yaml"))

    return run


@pytest.mark.slow
def test_a_sweep_resumes_its_runs_that_were_stopped_by_the_time_limit(sweep: Any) -> None:
    limited = "seed=1,2", "trainer.max_steps=2", "trainer.max_time=00:00:00:00"
    for code, step in ((1, 1), (0, 2)):
        got, folders = sweep(*limited)
        assert got == code and [read(folder)["global_step"] for folder in folders] == [step, step]


@pytest.mark.slow
def test_a_sweep_started_from_a_checkpoint_resumes_from_its_own_checkpoints(
    here: Any, sweep: Any, tmp_path: Path
) -> None:
    here()
    start = f"resume={tmp_path}/checkpoints/last.ckpt", "trainer.max_steps=3", "trainer.max_time=00:00:00:00"
    for code, step in ((1, 2), (0, 3)):
        got, (folder,) = sweep("seed=0", *start)
        assert got == code and read(folder)["global_step"] == step


def as_of_version_0_1(path: Path) -> None:
    """Rewrites a checkpoint in the format of version 0.1, which had no adapters."""
    checkpoint = torch.load(path, weights_only=True)
    state, settings = checkpoint["state_dict"], checkpoint["settings"]
    checkpoint["state_dict"] = {name.replace("backbone.", "unet.", 1): tensor for name, tensor in state.items()}
    settings["training"]["unet"] = settings["training"].pop("backbone")
    del settings["adapter"], settings["training"]["adapter"]
    torch.save(checkpoint, path)


def test_a_run_of_version_0_1_can_be_loaded_and_resumed(here: Any, tmp_path: Path) -> None:
    here()
    exported = read_model(tmp_path / "unet.safetensors").backbone.state_dict()
    as_of_version_0_1(tmp_path / "checkpoints" / "last.ckpt")
    read = read_model(tmp_path).backbone.state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in exported.items())
    here("resume=auto", "trainer.max_steps=2")
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resume={}/none.ckpt",), "resume=.*none.ckpt does not exist"),
        (("data=shards", "data.shards={}/none.tar"), "no shards at .*none.tar: no such file"),
        (("data=shards", "data.shards={}"), "no shards at .*: no .tar lies in that folder"),
        (("data=folder", "data.root={}"), "no picture"),
        (("data=shards",), "data.shards has no default: give data.shards=…"),
        (("data.batch_size=19",), "18 training samples, fewer than the 19 of one optimizer step"),
        (("data.global_batch=6",), "data.global_batch=6 is not a multiple of data.batch_size=4 x 1 ranks"),
        (("first_stage.weights={}/none.safetensors",), "there is no model .*none.safetensors"),
        (("text_encoder.weights=assets:vae.safetensors",), "is a vae of ldm and holds no text_tower"),
        (("sampler.spacing=custom", "+sampler.spacing_options.times=[0.5,0.9]"), "times of spacing=custom must be"),
        (("optimizer.lr=-1",), "lr >= 0.* not \\(-1|Invalid learning rate: -1"),
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

"""`python train.py` as a user starts and stops it; what needs no process of its own runs in this one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from PIL import Image

import train
from ldm.commands.edge import EXPECTED
from ldm.config import sentence
from ldm.weights.model import read_model
from tests import runs
from tests.runs import ALONE, TINY

ROOT = Path(train.__file__).parent
Run = subprocess.CompletedProcess[str]


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same sums in the same order in every run
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
    """A run that Ctrl-C ended, and the step at which."""
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
    """A run to seven steps beyond that one's end, with all that a run does."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    pictures = "evaluation.prompts=4", "evaluation.count=8"
    return folder, finish(start(*TINY, *pictures, f"trainer.max_steps={stopped[2] + 7}", f"run_dir={folder}"))


def test_a_run_leaves_what_it_promises(straight: tuple[Path, Run]) -> None:
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


def test_a_user_sees_progress_results_and_warnings_of_one_line_but_no_noise(straight: tuple[Path, Run]) -> None:
    folder, run = straight
    told = [line for line in run.stderr.splitlines() if not line.startswith(("training: ", "sampling: ", "encoding"))]
    assert all(line.startswith("warning: FID") for line in told), run.stderr
    assert run.stdout.startswith(f"run folder: {folder}\n") and "accuracy" in run.stdout


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(stopped: tuple[Path, Run, int]) -> None:
    folder, run, step = stopped
    assert step >= 3 and f"resume={folder}/checkpoints/last.ckpt" in run.stderr
    assert "Traceback" not in run.stderr and "graceful" not in run.stderr
    assert not list(folder.glob("*.safetensors"))


def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_ends(
    stopped: tuple[Path, Run, int], straight: tuple[Path, Run]
) -> None:
    folder, _, step = stopped
    run = finish(start(*TINY, f"trainer.max_steps={step + 7}", "metrics=none", f"run_dir={folder}", "resume=auto"))
    assert run.returncode == 0, run.stderr
    assert f"going on from {folder}/checkpoints/last.ckpt" in run.stdout
    ours, theirs = read(folder), read(straight[0])
    assert ours["global_step"] == theirs["global_step"] == step + 7
    assert ours["DataModule"] == theirs["DataModule"] == {"seen": 4 * (step + 7)}
    for part in ("state_dict", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part]), part
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (ours, theirs)]
    for weight, state in moments[0].items():
        assert all(torch.equal(torch.as_tensor(moments[1][weight][name]), tensor) for name, tensor in state.items())


def test_two_processes_train_as_one_does_on_both_batches(tmp_path: Path) -> None:
    both = "precision=32", "trainer.max_steps=6", "metrics=none", "ema=none", "logger=none"
    two = "strategy=ddp", "trainer.devices=2", "data.batch_size=2"
    both_runs = [start(*TINY, *both, f"run_dir={tmp_path}/1"), start(*TINY, *both, *two, f"run_dir={tmp_path}/2")]
    for run in map(finish, both_runs):
        assert run.returncode == 0, run.stderr
    one, other = read(tmp_path / "1"), read(tmp_path / "2")
    assert one["DataModule"] == other["DataModule"] == {"seen": 24}
    for name, weight in one["state_dict"].items():  # means over two batches of 2 are rounded otherwise than over 4
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_every_run_of_a_sweep_has_its_own_ranks(tmp_path: Path, launcher: str) -> None:
    sweep = "-m", "seed=1,2", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}"
    run = finish(start(*TINY, *sweep, "trainer.max_steps=1", "metrics=none", "strategy=ddp", "trainer.devices=2"))
    assert run.returncode == 0, run.stderr
    folders = [path.parent for path in tmp_path.glob("*/config.yaml")]
    assert [read(folder)["DataModule"] for folder in folders] == [{"seen": 8}, {"seen": 8}]


def test_a_sweep_runs_on_past_a_job_that_fails_and_then_fails_and_runs_no_finished_one_again(tmp_path: Path) -> None:
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
    assert again.returncode == 1 and f"{folder} is finished, and not run again" in again.stdout


def test_a_sweep_without_a_key_that_it_needs_says_which() -> None:
    run = finish(start("-m", "experiment=emoji", "seed=0"))
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "data.shards has no default; give it as data.shards=…" in run.stderr


def test_settings_that_contradict_each_other_are_refused_in_one_line(tmp_path: Path) -> None:
    run = finish(start("schedule=flow", "prediction=eps", f"run_dir={tmp_path}/run"))
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("error: prediction=eps") and run.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_key_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    run = finish(start("trainer.max_step=1", f"run_dir={tmp_path}/run"))
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == "error: there is no key trainer.max_step; did you mean trainer.max_steps?\n"


@pytest.fixture
def here(tmp_path: Path) -> Any:
    """Trains in this process."""
    return lambda *arguments: runs.run(tmp_path, *TINY, *ALONE, "trainer.max_steps=1", *arguments)


def test_a_finished_run_that_is_resumed_says_so(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    here("resume=auto")
    assert "going on" not in capsys.readouterr().out
    here("resume=auto")
    assert "has done its 1 steps; raise trainer.max_steps to train further" in capsys.readouterr().out


def test_another_model_than_the_checkpoints_is_refused_and_the_run_left_as_it_was(here: Any, tmp_path: Path) -> None:
    here()
    before = (tmp_path / "config.yaml").read_text(), (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"another model than this config builds \(width 16 → 32\)"):
        here("resume=auto", "model.width=32", "trainer.max_steps=2")
    assert before == ((tmp_path / "config.yaml").read_text(), (tmp_path / "checkpoints" / "last.ckpt").read_bytes())


def as_of_version_0_1(path: Path) -> None:
    """Rewrites a checkpoint as that version wrote it, whose configuration had no adapters."""
    checkpoint = torch.load(path, weights_only=True)
    state, settings = checkpoint["state_dict"], checkpoint["settings"]
    checkpoint["state_dict"] = {name.replace("backbone.", "unet.", 1): tensor for name, tensor in state.items()}
    settings["training"]["unet"] = settings["training"].pop("backbone")
    del settings["adapter"], settings["training"]["adapter"]
    torch.save(checkpoint, path)


def test_a_run_of_version_0_1_is_read_and_resumed(here: Any, tmp_path: Path) -> None:
    here()
    exported = read_model(tmp_path / "unet.safetensors").backbone.state_dict()
    as_of_version_0_1(tmp_path / "checkpoints" / "last.ckpt")
    read = read_model(tmp_path).backbone.state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in exported.items())
    here("resume=auto", "trainer.max_steps=2")
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("resume={}/none.ckpt",), "resume=.*none.ckpt: there is no such checkpoint"),
        (("data=shards", "data.shards={}/none.tar"), "no shards at .*none.tar: no such file"),
        (("data=shards", "data.shards={}"), "no shards at .*: no .tar lies in that folder"),
        (("data=folder", "data.root={}"), "no picture"),
        (("data=shards",), "data.shards has no default; give it as data.shards=…"),
        (("data.batch_size=19",), "18 training samples, fewer than the 19 of one optimizer step"),
        (("data.global_batch=6",), "data.global_batch=6 is no multiple of data.batch_size=4 x 1 ranks"),
        (("first_stage.weights={}/none.safetensors",), "there is no model .*none.safetensors"),
        (("text_encoder.weights=assets:vae.safetensors",), "is a vae of ldm and holds no text_tower"),
        (("sampler.spacing=custom", "+sampler.spacing_options.times=[0.5,0.9]"), "times of spacing=custom must be"),
        (("optimizer.lr=-1",), "lr >= 0.* not \\(-1|Invalid learning rate: -1"),
        (("evaluation.prompts=8",), "evaluation.prompts=8 asks for pictures at the end, which metrics=none does not"),
        (("+sampler.options.eat=1",), "sampler=dpmpp_2m has no option 'eat'"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    here: Any, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    with pytest.raises((*EXPECTED, HydraException)) as refusal:
        here(*(argument.format(tmp_path) for argument in arguments))
    assert re.search(told, sentence(refusal.value)), sentence(refusal.value)

"""`python train.py` as a user runs it, on the networks that ship."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ["model.width=32", "data.count=64", "data.batch_size=8", "evaluation.prompts=8", "evaluation.count=32"]


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, train("debug=fast", *TINY, "trainer.max_steps=6", f"run_dir={run}")


def test_a_run_leaves_what_the_contract_says(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, result = finished
    assert result.returncode == 0, result.stderr
    for name in ("config.yaml", "command.txt", "checkpoints/last.ckpt", "samples/final.png", "unet.safetensors"):
        assert (run / name).is_file(), name
    report = json.loads((run / "metrics.json").read_text())
    assert 0 <= report["metrics"]["accuracy"] <= 1 and report["provenance"]["steps"] == 6
    assert list((run / "tensorboard").iterdir())
    assert "accuracy" in result.stdout and "Traceback" not in result.stderr


def test_an_interrupted_run_goes_on_to_the_same_weights(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """The first half saves a checkpoint in the midst; the rate must follow the curve of the whole run."""
    whole, _ = finished
    half = tmp_path / "half"
    common = ["debug=fast", *TINY, "lr=constant", "metrics=none", f"run_dir={half}"]
    common = [a for a in common if not a.startswith("evaluation")]
    assert train(*common, "trainer.max_steps=3").returncode == 0
    assert train(*common, "trainer.max_steps=6", "resume=auto").returncode == 0
    once = tmp_path / "once"
    assert train(*common[:-1], f"run_dir={once}", "trainer.max_steps=6").returncode == 0
    ours, theirs = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (half, once))
    for name, tensor in ours["state_dict"].items():
        assert torch.equal(tensor, theirs["state_dict"][name]), name
    for name, tensor in ours["ema"].items():
        assert torch.equal(tensor, theirs["ema"][name]), name
    assert (whole / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("argument", "code", "told"),
    [
        ("schedule=flwo", 2, "did you mean flow?"),
        ("prediction=eps", 1, "use prediction=v or prediction=flow"),
        ("resume=nowhere.ckpt", 1, "no such checkpoint"),
    ],
)
def test_bad_arguments_get_one_sentence(argument: str, code: int, told: str, tmp_path: Path) -> None:
    result = train("debug=fast", argument, "data.count=8", "data.batch_size=8", f"run_dir={tmp_path}")
    assert result.returncode == code
    assert told in result.stderr and "Traceback" not in result.stderr

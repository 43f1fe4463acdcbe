"""Runs the default experiment with every feature, on the command line and the networks that ldm ships."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import refusal

ROOT = Path(__file__).parents[1]
TINY = ["model.width=32", "data.count=64", "data.batch_size=8", "evaluation.prompts=8", "evaluation.count=32"]


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


@pytest.mark.slow
def test_a_run_writes_all_of_its_files_and_its_folder_is_not_overwritten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train("debug=fast", *TINY, "trainer.max_steps=6", f"run_dir={run}")
    assert result.returncode == 0, result.stderr
    for name in ("config.yaml", "command.txt", "checkpoints/last.ckpt", "samples/final.png", "unet.safetensors"):
        assert (run / name).is_file(), name
    report = json.loads((run / "metrics.json").read_text())
    assert 0 <= report["metrics"]["accuracy"] <= 1 and report["provenance"]["steps"] == 6
    assert list((run / "tensorboard").iterdir())
    assert "accuracy" in result.stdout and "Traceback" not in result.stderr
    assert "resume=auto" in refusal(run, "debug=fast", *TINY, "trainer.max_steps=6", "name=test")

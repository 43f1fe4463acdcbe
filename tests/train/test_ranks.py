"""Tests training on several processes."""

from pathlib import Path

import pytest
import torch

from tests import runs
from tests.runs import TINY
from tests.train.processes import finish, read, start
from tests.training.tiny import GRADIENT, UNIT


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_global_batch(tmp_path: Path) -> None:
    both = "precision=fp32", "+optimizer.eps=1e-2", "trainer.max_steps=6", "metrics=none", "ema=none", "logger=none"
    two = "strategy=ddp", "trainer.devices=2", "data.batch_size=2"
    processes = start(*TINY, *both, *two, f"run_dir={tmp_path}/2")
    runs.run(tmp_path / "1", *TINY, *both, "name=test")
    run = finish(processes)
    assert run.returncode == 0, run.stderr
    one, other = read(tmp_path / "1"), read(tmp_path / "2")
    assert one["DataModule"] == other["DataModule"] == {"seen": 24}
    # Means over two batches of 2 are rounded differently than means over 4. Muon's largest update, of a 16 x 288
    # matrix, is lr · 0.2 · sqrt(288) times the output of Newton-Schulz, whose slope is at most 3.4445⁴ = 141. Weights
    # with AdamW updates differ by less, because 2 · lr / eps is smaller.
    slope = 4e-3 * 0.2 * 288**0.5 * 141
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=6 * 4 * UNIT, atol=6 * slope * 2 * GRADIENT)


@pytest.mark.full_size
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_every_run_of_a_sweep_has_its_own_ranks(tmp_path: Path, launcher: str) -> None:
    sweep = "-m", "seed=1,2", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}"
    run = finish(start(*TINY, *sweep, "trainer.max_steps=1", "metrics=none", "strategy=ddp", "trainer.devices=2"))
    assert run.returncode == 0, run.stderr
    folders = [path.parent for path in tmp_path.glob("*/config.yaml")]
    assert [read(folder)["DataModule"] for folder in folders] == [{"seen": 8}, {"seen": 8}]

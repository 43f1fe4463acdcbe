"""Tests the dtypes in which data-parallel training sends gradients."""

from pathlib import Path

import pytest
from torch import Tensor

from ldm.execution.data_parallel import DataParallel
from tests.runs import TINY
from tests.train.processes import finish, read, start

# With an eps that is much larger than any gradient, an update of AdamW is nearly lr / eps = 1 times the gradient.
SETTINGS = "precision=fp32", "optimizer=adamw", "optimizer.lr=1e6", "optimizer.eps=1e6", "optimizer.weight_decay=0"
ONE_STEP = "lr=constant", "lr.warmup=0", "trainer.max_steps=1", "metrics=none", "ema=none", "logger=none"


def weights_after_a_step(folder: Path, *settings: str) -> dict[str, Tensor]:
    two = "strategy=ddp", "trainer.devices=2", "data.batch_size=2"
    run = finish(start(*TINY, *SETTINGS, *ONE_STEP, *two, *settings, f"run_dir={folder}"))
    assert run.returncode == 0, run.stderr
    return read(folder)["state_dict"]


@pytest.mark.slow
def test_bfloat16_gradients_differ_from_float32_ones_by_their_rounding(tmp_path: Path) -> None:
    exact = weights_after_a_step(tmp_path / "exact")
    rounded = weights_after_a_step(tmp_path / "rounded", "strategy.name.gradients=bfloat16")
    before = weights_after_a_step(tmp_path / "before", "optimizer.lr=1e-30")
    gradients = {name: (exact[name] - weight).abs() for name, weight in before.items()}
    different = {name: (rounded[name] - exact[name]).abs() for name in before}
    assert any(difference.any() for difference in different.values())
    for name, gradient in gradients.items():
        # Two terms and their sum are rounded to 8 bits; the terms are at most as large as the largest gradients.
        assert different[name].max() <= 3 * 2**-8 * 4 * gradient.max() + 1e-6, name


def test_another_dtype_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"^strategy\.name\.gradients is 'fp16', but must be float32 or bfloat16$"):
        DataParallel("fp16")

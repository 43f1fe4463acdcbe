from pathlib import Path

import pytest

from ldm.callbacks.progress import Progress
from tests.callbacks.tiny import Batches, Tiny, trainer


def test_a_log_shows_steps_speed_loss_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, Progress(seconds=0), enable_progress_bar=True, accumulate_grad_batches=2)
    run.fit(Tiny(), Batches())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training")]
    assert [line.split(",")[0] for line in lines] == [f"training: {n}/4 steps" for n in (1, 2, 3, 4)]
    assert all("images/s, loss " in line for line in lines) and lines[-1].endswith(", 0:00 left")

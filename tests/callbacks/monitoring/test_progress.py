import re
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from ldm.callbacks.monitoring.health import Health
from ldm.callbacks.monitoring.progress import Progress
from ldm.callbacks.monitoring.throughput import Throughput
from tests.callbacks.logged import Logged
from tests.callbacks.tiny import Batches, Tiny, trainer
from tests.training.tiny import diffusion, fit

EVERY_STEP = {"enable_progress_bar": True, "log_every_n_steps": 1, "accumulate_grad_batches": 2}


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("training")]


def shown(lines: list[str], pattern: str) -> list[float]:
    """Returns the number that the only group of the pattern matches in each line."""
    return [float(match[1]) for line in lines if (match := re.search(pattern, line))]


def test_the_progress_line_shows_steps_speed_loss_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [Throughput(), Progress(seconds=0)]
    fit(tmp_path, diffusion(), 4, batch_size=2, callbacks=callbacks, **EVERY_STEP)
    progress = lines(capsys)
    assert [line.split(",")[0] for line in progress] == [f"training: {n}/4 steps" for n in (1, 2, 3, 4)]
    assert all("images/s, loss " in line for line in progress) and progress[-1].endswith(", 0:00 left")


def test_the_loss_shown_for_a_step_is_the_one_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logged()
    fit(tmp_path, diffusion(), 4, batch_size=2, callbacks=[Progress(seconds=0)], logger=logger, **EVERY_STEP)
    logged = list(logger.curve("train/loss").values())
    assert shown(lines(capsys), r"loss ([\d.]+)") == pytest.approx(logged, abs=5e-5)  # four decimals are shown


def test_a_skipped_step_does_not_affect_the_loss_of_later_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = diffusion()
    losses, calls = module.losses, []

    def broken_once(*batch: Any) -> Any:
        calls.append(1)
        times, loss = losses(*batch)
        return times, loss * (float("nan") if len(calls) == 3 else 1)

    module.losses = broken_once  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="step 2 was skipped"):
        fit(tmp_path, module, 4, batch_size=2, callbacks=[Progress(0), Health(tmp_path)], **EVERY_STEP)
    assert ["loss nan" in line for line in lines(capsys)] == [False, True, False, False]


@pytest.mark.slow
def test_the_speed_shown_is_the_one_logged_and_excludes_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(Callback):
        def on_validation_end(self, *_: Any) -> None:
            time.sleep(0.5)

    logger, callbacks = Logged(), [Throughput(), Progress(seconds=0), Slow()]
    validated = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(tmp_path, diffusion(), 4, batch_size=2, callbacks=callbacks, logger=logger, **EVERY_STEP, **validated)
    logged = list(logger.curve("train/images_per_second").values())
    assert shown(lines(capsys), r"([\d.e+]+) images/s") == pytest.approx(logged, rel=1e-3)  # four digits are shown


def test_values_that_no_callback_measures_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, Progress(seconds=0), enable_progress_bar=True).fit(Tiny(), Batches())
    assert lines(capsys)[-1] == "training: 4/4 steps, 0:00 left"

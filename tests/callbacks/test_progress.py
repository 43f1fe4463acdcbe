from io import StringIO
from pathlib import Path

import pytest

from ldm.callbacks.progress import Display, Progress, clock
from tests.callbacks.tiny import Batches, Tiny, trainer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr("ldm.callbacks.progress.time.monotonic", fake)
    return fake


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_time_left_follows_from_the_pace_since_this_process_began(time: Clock) -> None:
    stream = StringIO()
    display = Display("step", total=100, done=40, stream=stream)
    time.now += 30
    display.show(60, "1 image/s")  # 20 in 30 seconds
    assert stream.getvalue() == "step 60/100, 1 image/s, 1:00 left\n"


def test_outside_a_terminal_a_line_is_due_every_few_seconds_and_at_the_end(time: Clock) -> None:
    display = Display("step", total=100, seconds=10, stream=StringIO())
    time.now += 9
    assert not display.due(50) and display.due(100)
    time.now += 1
    assert display.due(51)
    display.show(51)
    assert not display.due(52)


def test_in_a_terminal_one_line_is_drawn_again_and_again() -> None:
    stream = Terminal()
    display = Display("step", total=4, stream=stream)
    for done in range(1, 5):
        display.show(done, f"loss {done}")
    display.close()
    assert stream.getvalue().count("\n") == 1
    assert "step 4/4" in stream.getvalue() and "loss 4, 00:00 left" in stream.getvalue()


def test_a_log_shows_steps_speed_loss_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, Progress(seconds=0), enable_progress_bar=True, accumulate_grad_batches=2)
    run.fit(Tiny(), Batches())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training")]
    assert [line.split(",")[0] for line in lines] == [f"training: step {n}/4" for n in (1, 2, 3, 4)]
    assert all("images/s, loss " in line for line in lines) and lines[-1].endswith(", 0:00 left")


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (754, "12:34"), (3723, "1:02:03"), (59.6, "1:00")])
def test_a_clock_reads_minutes_or_hours(seconds: float, text: str) -> None:
    assert clock(seconds) == text

import io
import sys

import pytest

from ldm import progress
from ldm.progress import Progress, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def output_of_four_steps(stream: io.StringIO, now: list[float], monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns what four steps of six seconds each print to `stream`."""
    monkeypatch.setattr(sys, "stderr", stream)
    work = Progress(4)
    for _ in range(4):
        now[0] += 6
        work.step()
    return stream.getvalue()


def test_outside_a_terminal_a_line_is_printed_every_ten_seconds_and_at_the_end(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert output_of_four_steps(io.StringIO(), now, monkeypatch).splitlines() == [
        "2/4 steps, 0.167 steps/s, 0:12 left",
        "4/4 steps, 0.167 steps/s, 0:00 left",
    ]


def test_in_a_terminal_the_line_is_rewritten(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    text = output_of_four_steps(Terminal(), now, monkeypatch)
    assert [line.partition(" ")[0] for line in text.split("\r\x1b[K")] == ["", "1/4", "2/4", "3/4", "4/4"]
    assert text.count("\n") == 1 and text.endswith("0:00 left\n")


def test_the_remaining_time_follows_from_the_speed_of_this_process(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    work = Progress(100, "steps", "training: ", done=40)
    now[0] += 30
    work.done = 60  # 20 steps in 30 seconds
    work.show("1 image/s")
    assert capsys.readouterr().err == "training: 60/100 steps, 1 image/s, 1:00 left\n"


def test_a_line_is_due_every_few_seconds_and_at_the_end(now: list[float]) -> None:
    work = Progress(100, seconds=10)
    now[0] += 9
    assert not work.due()
    now[0] += 1
    assert work.due()
    work.show("")
    assert not work.due()
    work.done = 100
    assert work.due()


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (754, "12:34"), (3723, "1:02:03"), (59.6, "1:00")])
def test_a_duration_is_formatted_in_minutes_or_hours(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_lines_of_a_labelled_run_start_with_its_label_and_are_never_rewritten(
    monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("ldm.progress.run_label", "seed=1 ")
    Progress(10, label="training: ").show("3 images/s")
    progress.clear()
    assert terminal.getvalue() == "seed=1 training: 0/10 steps, 3 images/s, 0:00 left\n"

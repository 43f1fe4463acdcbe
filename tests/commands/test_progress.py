import io
import sys

import pytest

from ldm.commands import progress
from ldm.commands.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def told(stream: io.StringIO, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> str:
    """Four steps of six seconds each."""
    monkeypatch.setattr(sys, "stderr", stream)
    work = Progress(4)
    for _ in range(4):
        clock[0] += 6
        work.step()
    return stream.getvalue()


def test_outside_a_terminal_a_line_comes_every_ten_seconds_and_at_the_end(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(io.StringIO(), clock, monkeypatch).splitlines() == [
        "2/4 steps, 0.167 steps/s, 0:12 left",
        "4/4 steps, 0.167 steps/s, 0:00 left",
    ]


def test_in_a_terminal_the_line_is_renewed(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(Terminal(), clock, monkeypatch)
    assert [line.partition(" ")[0] for line in text.split("\r\x1b[K")] == ["", "1/4", "2/4", "3/4", "4/4"]
    assert text.count("\n") == 1 and text.endswith("0:00 left\n")

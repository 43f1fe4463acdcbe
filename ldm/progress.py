"""Prints progress, speed and remaining time on stderr without garbling other output."""

import sys
import time

run_label = ""  # precedes the lines of runs that train in parallel and share a terminal, which no line is rewritten in


class Progress:
    """Rewrites one line in a terminal, and prints a line every `seconds` elsewhere; always prints the last step."""

    def __init__(self, total: int, unit: str = "steps", label: str = "", done: int = 0, seconds: float = 10.0) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.start = self.done = done  # steps of an earlier process do not count towards this one's speed
        self.began = self.shown = time.monotonic()
        self.seconds = 0.1 if _is_rewritable() else seconds

    def step(self, count: int = 1) -> None:
        """Adds `count` completed steps and prints the progress if it is due."""
        self.done += count
        if self.due():
            rate = (self.done - self.start) / max(time.monotonic() - self.began, 1e-9)
            self.show(f"{rate:.3g} {self.unit}/s")

    def due(self) -> bool:
        """Returns whether `show` should be called; asking first avoids computing a note that is not printed."""
        return self.done >= self.total or time.monotonic() - self.shown >= self.seconds

    def show(self, note: str) -> None:
        """Prints the completed and total steps, the note unless it is empty, and the remaining time."""
        self.shown = time.monotonic()
        left = (self.total - self.done) * (self.shown - self.began) / max(1, self.done - self.start)
        clear()
        parts = f"{run_label}{self.label}{self.done}/{self.total} {self.unit}", note, f"{clock(left)} left"
        line = ", ".join(filter(None, parts))
        rewritable = _is_rewritable() and self.done < self.total
        print(line, end="" if rewritable else "\n", file=sys.stderr, flush=True)


def clear() -> None:
    """Erases the progress line in a terminal, so that another line can be printed."""
    if _is_rewritable():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _is_rewritable() -> bool:
    return sys.stderr.isatty() and not run_label


def clock(seconds: float) -> str:
    """Formats a duration as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""How far work is, how fast, and how long it still takes: on stderr, as a line that does not tear other lines."""

import sys
import time


class Progress:
    """In a terminal one line that renews itself, elsewhere a line every ten seconds; both also at the end."""

    def __init__(self, total: int, unit: str = "steps", label: str = "", done: int = 0, seconds: float = 10.0) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.start = self.done = done  # what an earlier process did says nothing of this one's pace
        self.began = self.shown = time.monotonic()
        self.seconds = 0.1 if sys.stderr.isatty() else seconds

    def step(self, count: int = 1) -> None:
        """So many more steps are done."""
        self.done += count
        if self.due():
            rate = (self.done - self.start) / max(time.monotonic() - self.began, 1e-9)
            self.show(f"{rate:.3g} {self.unit}/s")

    def due(self) -> bool:
        """Whether it is time to `show` again; asking before saves making a note that nobody sees."""
        return self.done >= self.total or time.monotonic() - self.shown >= self.seconds

    def show(self, note: str) -> None:
        """What is done of the total, the note if there is one, and the time left."""
        self.shown = time.monotonic()
        left = (self.total - self.done) * (self.shown - self.began) / max(1, self.done - self.start)
        clear()
        parts = f"{self.label}{self.done}/{self.total} {self.unit}", note, f"{clock(left)} left"
        line = ", ".join(filter(None, parts))
        renewed = sys.stderr.isatty() and self.done < self.total
        print(line, end="" if renewed else "\n", file=sys.stderr, flush=True)


def clear() -> None:
    """Make room for another line where a terminal shows the progress."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

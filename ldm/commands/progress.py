"""How far work is, how fast, and how long it still takes: on stderr, as a line that does not tear other lines."""

import sys
import time


class Progress:
    """In a terminal one line that renews itself, elsewhere a line every ten seconds; both also at the end."""

    def __init__(self, total: int, unit: str = "steps") -> None:
        self.total, self.done, self.unit = total, 0, unit
        self.began = self.shown = time.monotonic()

    def step(self, count: int = 1) -> None:
        """So many more steps are done."""
        self.done += count
        now = time.monotonic()
        if self.done == self.total or now - self.shown >= (0.1 if sys.stderr.isatty() else 10):
            self.shown = now
            self._show(now - self.began)

    def _show(self, seconds: float) -> None:
        left = round((self.total - self.done) * seconds / self.done)
        rate = self.done / max(seconds, 1e-9)
        clear()
        line = f"{self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left // 60}:{left % 60:02d} left"
        renewed = sys.stderr.isatty() and self.done < self.total
        print(line, end="" if renewed else "\n", file=sys.stderr, flush=True)


def clear() -> None:
    """Make room for another line where a terminal shows the progress."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

"""What a walk has come to at each step, as a film or in the terminal."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.files import atomic_write
from ldm.image import pixels, to_pil
from ldm.progress import Progress, clear

MARK = b"ldm"  # the comment in films of ours


def save_gif(path: Path, frames: Sequence[Tensor], last: Image.Image, seconds: float = 3.0) -> None:
    """The frames, uint8 (3, h, w), at the size of the last one, which stands for a second more."""
    film = [to_pil(frame)[0].resize(last.size, Image.Resampling.BICUBIC) for frame in frames] + [last]
    pause = max(20, round(1000 * seconds / len(film)))
    pauses = [pause] * (len(film) - 1) + [pause + 1000]  # milliseconds
    how: dict[str, Any] = {"save_all": True, "append_images": film[1:], "duration": pauses, "loop": 0, "comment": MARK}
    atomic_write(path, lambda file: film[0].save(file, "GIF", **how))


def is_film(path: Path) -> bool:
    """Whether `save_gif` wrote the file."""
    try:
        with Image.open(path, formats=["GIF"]) as image:
            return image.info.get("comment") == MARK
    except (OSError, SyntaxError):
        return False


def in_terminal(picture: Tensor, columns: int = 64) -> list[str]:
    """uint8 (3, h, w) → lines of half blocks in true colour, two pixels high each."""
    image = to_pil(picture)[0]
    width = min(columns, image.width)
    small = image.resize((width, max(2, 2 * round(image.height * width / image.width / 2))))
    rows = pixels(small).permute(1, 2, 0).tolist()  # (h, w, 3)
    return ["".join(map(_block, *pair)) + "\x1b[0m" for pair in zip(rows[::2], rows[1::2], strict=True)]


def _block(above: list[int], below: list[int]) -> str:
    """Half a character in each of two colours (r, g, b)."""
    return "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*above, *below)


def film_of(path: Path) -> Path:
    """Where the film of a picture is."""
    return path.with_suffix(".gif")


class Previews:
    """Keeps estimates for GIFs, or shows those of one position in the terminal, above the line of progress."""

    def __init__(self, kind: str | None, position: int, progress: Progress, small: Callable[[Tensor], Tensor]) -> None:
        self.kind, self.position, self.progress, self.small = kind, position, progress, small
        self.films: dict[int, list[Tensor]] = {}

    def show(self, first: int, step: int, x0: Tensor) -> None:
        for position, picture in enumerate(self.small(x0), start=first):
            if step == 0:
                self.films[position] = []
            self.films[position].append(picture)
            if self.kind == "terminal" and position == self.position:
                show_in_terminal(picture, step > 0, self.progress.done >= self.progress.total)

    def save(self, position: int, path: Path, image: Image.Image) -> None:
        if self.kind == "gif":
            save_gif(film_of(path), self.films[position], image)


def show_in_terminal(picture: Tensor, again: bool, below: bool) -> None:
    """On stderr; over the lines of before if `again`, which are one further up if a last line stands `below`."""
    lines = in_terminal(picture)
    clear()
    up = f"\x1b[{len(lines) + below}A" if again else ""
    print(up + "\n".join(lines), end="\n" * (1 + (again and below)), file=sys.stderr, flush=True)

"""Shows the estimates of each sampling step as a GIF or in the terminal."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.files import atomic_write
from ldm.image import pixels, to_pil
from ldm.progress import Progress, clear

MARK = b"ldm"  # the comment in GIFs written by ldm


def save_gif(path: Path, frames: Sequence[Tensor], last: Image.Image, seconds: float = 3.0) -> None:
    """Writes frames, uint8 (3, h, w), scaled to the size of `last`, which is shown for one second more."""
    images = [to_pil(frame)[0].resize(last.size, Image.Resampling.BICUBIC) for frame in frames] + [last]
    duration = max(20, round(1000 * seconds / len(images)))  # milliseconds
    durations = [duration] * (len(images) - 1) + [duration + 1000]
    options: dict[str, Any] = {"save_all": True, "append_images": images[1:], "loop": 0, "comment": MARK}
    atomic_write(path, lambda file: images[0].save(file, "GIF", duration=durations, **options))


def is_own_gif(path: Path) -> bool:
    """Returns whether `save_gif` wrote the file."""
    try:
        with Image.open(path, formats=["GIF"]) as image:
            return image.info.get("comment") == MARK
    except (OSError, SyntaxError):
        return False


def terminal_lines(image: Tensor, columns: int = 64) -> list[str]:
    """Returns an image, uint8 (3, h, w), as lines of half blocks in 24-bit color, each two pixels high."""
    pil_image = to_pil(image)[0]
    width = min(columns, pil_image.width)
    resized = pil_image.resize((width, max(2, 2 * round(pil_image.height * width / pil_image.width / 2))))
    rows = pixels(resized).permute(1, 2, 0).tolist()  # (h, w, 3)
    return ["".join(map(_block, *pair)) + "\x1b[0m" for pair in zip(rows[::2], rows[1::2], strict=True)]


def _block(above: list[int], below: list[int]) -> str:
    """Returns a character whose upper and lower half have the colors (r, g, b)."""
    return "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*above, *below)


def gif_path(path: Path) -> Path:
    """Returns the path of an image's GIF."""
    return path.with_suffix(".gif")


class Previews:
    """Collects estimates for GIFs, or shows those of one position in the terminal, above the progress line."""

    def __init__(self, kind: str | None, position: int, progress: Progress, decode: Callable[[Tensor], Tensor]) -> None:
        self.kind, self.position, self.progress, self.decode = kind, position, progress, decode
        self.frames: dict[int, list[Tensor]] = {}

    def show(self, first: int, step: int, x0: Tensor) -> None:
        for position, image in enumerate(self.decode(x0), start=first):
            if step == 0:
                self.frames[position] = []
            self.frames[position].append(image)
            if self.kind == "terminal" and position == self.position:
                show_in_terminal(image, step > 0, self.progress.done >= self.progress.total)

    def save(self, position: int, path: Path, image: Image.Image) -> None:
        if self.kind == "gif":
            save_gif(gif_path(path), self.frames[position], image)


def show_in_terminal(image: Tensor, overwrite: bool, progress_below: bool) -> None:
    """Prints an image on stderr; `overwrite` replaces the previous one, even above a finished progress line."""
    lines = terminal_lines(image)
    clear()
    up = f"\x1b[{len(lines) + progress_below}A" if overwrite else ""
    print(up + "\n".join(lines), end="\n" * (1 + (overwrite and progress_below)), file=sys.stderr, flush=True)

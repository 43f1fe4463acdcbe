from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.drawing.previews import Previews, save_gif, terminal_lines
from ldm.progress import Progress

RED, BLUE = torch.tensor([255, 0, 0]), torch.tensor([0, 0, 255])
HALVES = (
    torch.stack((RED, BLUE), dim=1)[:, :, None].expand(3, 2, 4).repeat_interleave(2, 1).to(torch.uint8)
)  # (3, 4, 4)


def test_a_gif_ends_with_the_final_image_shown_longer(tmp_path: Path) -> None:
    frames = [HALVES, HALVES.flip(1)]
    save_gif(tmp_path / "x.gif", frames, Image.new("RGB", (32, 16), (0, 255, 0)), seconds=0.3)
    with Image.open(tmp_path / "x.gif") as gif:
        assert (gif.size, gif.n_frames) == ((32, 16), 3)  # type: ignore[attr-defined]
        durations, colors = [], []
        for frame in range(3):
            gif.seek(frame)
            durations.append(gif.info["duration"])
            colors.append(gif.convert("RGB").getpixel((0, 0)))
    assert durations == [100, 100, 1100]
    assert [max(range(3), key=color.__getitem__) for color in colors] == [0, 2, 1]  # red, blue, green


def test_a_terminal_character_shows_two_pixels() -> None:
    lines = terminal_lines(HALVES)
    block = "\x1b[38;2;{0};0;{1}m\x1b[48;2;{0};0;{1}m▀"
    assert lines == [block.format(255, 0) * 4 + "\x1b[0m", block.format(0, 255) * 4 + "\x1b[0m"]
    assert [line.count("▀") for line in terminal_lines(HALVES.repeat(1, 4, 4), columns=8)] == [8] * 4


def test_each_estimate_replaces_the_previous_one_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(3)
    previews = Previews("terminal", position=1, progress=progress, decode=lambda x0: x0)
    for step in range(3):
        progress.done += 1
        previews.show(0, step, torch.stack((HALVES, HALVES)))
    lines = capsys.readouterr().err.splitlines()
    assert [line[: line.find("A") + 1] for line in lines] == ["", "", "\x1b[2A", "", "\x1b[3A", "", ""]

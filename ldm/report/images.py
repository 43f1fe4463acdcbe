"""Pairs the images that different runs generated for the same prompt from the same noise."""

import io
from dataclasses import dataclass

from PIL import Image

from ldm.image import load_image, read_metadata
from ldm.report.groups import Group

SIDE = 192  # maximum side of an image in the report, in pixels


@dataclass(frozen=True)
class Row:
    """A prompt, and each group's image as a PNG; None if its runs have no such image."""

    caption: str
    images: list[bytes | None]


def side_by_side(groups: list[Group]) -> tuple[list[Row], list[str]]:
    """Returns a row for each prompt of the first run that has single images, and notes on groups that are left out."""
    sheets = [_sheet(group) for group in groups]
    first = next((about for found in sheets if found for about in [found[0]]), None)
    if first is None:
        return [], ["No run has images of prompts (samples/tiles.png)"]
    columns = [found[1] if found and found[0] == first else None for found in sheets]
    missing = [group.short for group, found in zip(groups, sheets, strict=True) if found is None]
    others = [group.short for group, found in zip(groups, sheets, strict=True) if found and found[0] != first]
    notes = [f"No images of prompts (samples/tiles.png): {', '.join(missing)}"] if missing else []
    notes += [f"Left out, with other prompts, other noise or another image size: {', '.join(others)}"] if others else []
    rows = [
        Row(caption, [None if images is None else images[index] for images in columns])
        for index, caption in enumerate(first["captions"])
    ]
    return rows, notes


def _sheet(group: Group) -> tuple[dict, list[bytes]] | None:
    """Reads the sheet of single images, with its metadata, of the run with the lowest seed that has one."""
    for run in group.runs:
        file = run.path / "samples" / "tiles.png"
        if file.is_file():
            about, sheet = read_metadata(file), load_image(file)
            height, width = about["size"]
            boxes = [(i * width, 0, (i + 1) * width, height) for i in range(len(about["captions"]))]
            return about, [_png(sheet.crop(box)) for box in boxes]
    return None


def _png(image: Image.Image) -> bytes:
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

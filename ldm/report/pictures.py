"""Pictures that different runs drew of the same prompt from the same noise."""

import io
from dataclasses import dataclass

from PIL import Image

from ldm.image import load_image, read_metadata
from ldm.report.groups import Group

SIDE = 192  # pixels of a picture in the report, at most


@dataclass(frozen=True)
class Row:
    """A prompt, and the PNG of each group's picture; None where its runs drew no such picture."""

    caption: str
    pictures: list[bytes | None]


def side_by_side(groups: list[Group]) -> tuple[list[Row], list[str]]:
    """Rows of the prompts of the first run that has pictures, and why others have no part in them."""
    sheets = [_sheet(group) for group in groups]
    first = next((about for found in sheets if found for about in [found[0]]), None)
    if first is None:
        return [], ["no run kept single pictures (samples/tiles.png)"]
    remarks: list[str] = []
    columns: list[list[bytes] | None] = []
    for group, found in zip(groups, sheets, strict=True):
        fits = found is not None and found[0] == first
        columns.append(found[1] if found and fits else None)
        if found is None:
            remarks.append(f"{group.name} kept no single pictures (samples/tiles.png)")
        elif not fits:
            remarks.append(f"{group.name} drew other prompts, from other noise or in another size")
    rows = [
        Row(caption, [None if pictures is None else pictures[index] for pictures in columns])
        for index, caption in enumerate(first["captions"])
    ]
    return rows, remarks


def _sheet(group: Group) -> tuple[dict, list[bytes]] | None:
    """Of the run with the lowest seed that has one."""
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

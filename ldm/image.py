"""Converts images between files, PIL images, uint8 tensors and float tensors in [-1, 1]."""

import io
import json
import math
import struct
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ldm.files import atomic_write

# Pixel formats only: Pillow would pass PostScript on to ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # Pillow's default: 256 MiB as RGB
WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # the Exif tag; 5 to 8 are turned by 90 degrees
REDUCING_GAP = 3.0  # the fast reduction stops at this multiple of the target size, without a visible difference
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip

Converted = TypeVar("Converted")


def load_image(
    source: str | Path | bytes | BinaryIO,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    side: int | None = None,
) -> Image.Image:
    """Decodes the first frame as RGB, upright, composited onto `background`, with 16 bits scaled to 8.

    A JPEG that will be scaled down to `side` pixels or less is decoded at a reduced size. Raises ValueError with `name`
    (by default the path) and the reason if the file is not an image, is truncated or has more than `max_pixels` pixels,
    and FileNotFoundError for a missing path.
    """
    return _decoded(source, lambda image: _to_rgb(image, background), max_pixels, name, side)


def load_alpha(source: str | Path | bytes | BinaryIO, name: str | None = None) -> Image.Image | None:
    """Decodes the opacity of each pixel, upright, as an image of mode L; None if the image has no transparency.

    Raises the same errors as `load_image`.
    """
    return _decoded(source, _to_alpha, MAX_PIXELS, name, None)


def upright_size(source: str | Path | bytes | BinaryIO, name: str | None = None) -> tuple[int, int]:
    """Reads width and height as displayed, without decoding the pixels. Raises the same errors as `load_image`."""
    return _opened(source, _upright_size, name)


def _decoded(
    source: str | Path | bytes | BinaryIO,
    convert: Callable[[Image.Image], Converted],
    max_pixels: int,
    name: str | None,
    side: int | None,
) -> Converted:
    def decode(image: Image.Image) -> Converted:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width}×{image.height} exceeds the limit of {max_pixels:,} pixels")
        if side is not None:
            image.draft(None, (round(REDUCING_GAP * side),) * 2)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return convert(image)

    return _opened(source, decode, name)


def _opened(
    source: str | Path | bytes | BinaryIO, read: Callable[[Image.Image], Converted], name: str | None
) -> Converted:
    if isinstance(source, (str, Path)):
        with open(source, "rb") as opened:
            return _opened(opened, read, name or str(source))
    file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source
    name = name or str(getattr(file, "name", "the image"))
    try:
        with Image.open(file, formats=FORMATS) as image:
            return read(image)
    except UnidentifiedImageError as error:
        expected = ", ".join(FORMATS)
        raise ValueError(f"{name} cannot be read as an image: expected one of {expected}") from error
    except _DECODE_ERRORS as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    sideways = image.getexif().get(ORIENTATION, 1) >= 5
    return (image.height, image.width) if sideways else (image.width, image.height)


def _to_alpha(image: Image.Image) -> Image.Image | None:
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no standard range; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if not image.has_transparency_data:
        return _rgb(image)
    backdrop = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales greyscale values from 0 … 65535 to the nearest in 0 … 255 (Pillow's conversion clips at 255)."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("it has values outside 0 … 65535; save it with 8 or 16 bits per channel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def to_tensor(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """Converts RGB images of one size to float32 (b, 3, h, w) in [-1, 1]."""
    images = [images] if isinstance(images, Image.Image) else images
    return from_uint8(torch.stack([pixels(image) for image in images]))


def pixels(image: Image.Image) -> Tensor:
    """Converts one image to uint8 (3, h, w)."""
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in _rgb(image).split()]))


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies even RGB images


def to_uint8(x: Tensor) -> Tensor:
    """Converts floats in [-1, 1] to uint8, rounded to the nearest and clamped. Raises ValueError on NaN."""
    if not x.is_floating_point():
        raise ValueError(f"expected a float tensor in [-1, 1], got {x.dtype}; use from_uint8 for uint8 tensors")
    if x.isnan().any():
        raise ValueError("the images contain NaN because the network or the first stage overflowed: try precision=fp32")
    x = x if x.dtype == torch.float64 else x.float()
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """Converts uint8 to float32 in [-1, 1]; `to_uint8` is its exact inverse."""
    if x.dtype != torch.uint8:
        raise ValueError(f"expected a uint8 tensor, got {x.dtype}")
    return x.float() / 127.5 - 1


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB (b,) between images in [-1, 1]."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


def to_pil(x: Tensor) -> list[Image.Image]:
    """Converts a uint8 tensor, or floats in [-1, 1], of shape (b, 3, h, w) or (3, h, w) to a list of RGB images."""
    if x.ndim not in (3, 4) or x.shape[-3] != 3:
        raise ValueError(f"expected images of shape (b, 3, h, w) or (3, h, w), got {tuple(x.shape)}")
    x = x.detach() if x.dtype == torch.uint8 else to_uint8(x.detach())
    x = x.reshape(-1, *x.shape[-3:]).permute(0, 2, 3, 1).cpu()  # (b, h, w, 3)
    return [Image.fromarray(image) for image in x.contiguous().numpy()]


def resize_and_crop(
    image: Image.Image, size: int | tuple[int, int], offset: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """Scales the image to just cover `size` (a square, or (height, width)), then crops it.

    `offset` (u, v) in [0, 1]² places the crop: (0, 0) is top left, (0.5, 0.5) the centre, (1, 1) bottom right. The
    filter is Lanczos, after a box reduction if the image shrinks by more than a factor of `REDUCING_GAP`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    scale = max(width / image.width, height / image.height)
    left, right = _span(image.width, width, scale, offset[0])
    top, bottom = _span(image.height, height, scale, offset[1])
    box = (left, top, right, bottom)
    if box == (0, 0, width, height) == (0, 0, *image.size):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP)


def _span(length: int, size: int, scale: float, offset: float) -> tuple[float, float]:
    """Returns the start and end along one axis, in source pixels, of a crop of `size` scaled pixels."""
    scaled = max(size, round(length * scale))
    start = min(int(offset * (scaled - size + 1)), scaled - size)
    return start * length / scaled, min((start + size) * length / scaled, length)


def grid(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Arranges images row by row, each with its caption wrapped below; nearly square without `columns`.

    With captions, images narrower than 192 pixels are enlarged by an integer factor so that captions are readable.
    """
    if not images or (captions is not None and len(captions) != len(images)):
        raise ValueError(
            f"a grid needs at least one image and one caption per image, but got {len(images)} images "
            f"and {len(captions or [])} captions"
        )
    columns = min(columns or math.ceil(len(images) ** 0.5), len(images))
    width, height = max(i.width for i in images), max(i.height for i in images)
    factor = max(1, -(-192 // width)) if captions is not None else 1
    width, height = width * factor, height * factor
    gap, line = 8, 18
    font = ImageFont.load_default(14)
    texts = [_wrap(_printable(caption), width, font) for caption in captions or [""] * len(images)]
    rows = range(0, len(images), columns)
    tops = np.cumsum([gap] + [height + gap + line * max(map(len, texts[r : r + columns])) for r in rows])
    sheet = Image.new("RGB", (gap + columns * (width + gap), int(tops[-1])), WHITE)
    draw = ImageDraw.Draw(sheet)
    for k, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + k % columns * (width + gap), int(tops[k // columns])
        enlarged = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, y))
        for n, text in enumerate(lines):
            draw.text((x, y + height + 2 + n * line), text, fill=(0, 0, 0), font=font)
    return sheet


def _printable(text: str) -> str:
    """Replaces accented letters and dashes, which the font lacks: é by e, – by -. Other scripts are shown as boxes."""
    letters = unicodedata.normalize("NFKD", text).translate({ord("–"): "-", ord("—"): "-"})
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _wrap(text: str, width: int, font: Any, max_lines: int = 8) -> list[str]:
    """Breaks `text` at spaces, and words wider than a line anywhere; text beyond `max_lines` becomes an …"""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > max_lines:
            return [*lines[: max_lines - 1], lines[max_lines - 1][:-1] + "…"]
    return lines


def save_png(image: Image.Image, path: str | Path, metadata: dict[str, Any]) -> None:
    """Writes a PNG atomically, with `metadata` as JSON in its text chunk `ldm`."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("ldm", json.dumps(metadata, allow_nan=False))
    atomic_write(path, lambda file: image.save(file, "PNG", pnginfo=chunks))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads the metadata that `save_png` wrote. Raises ValueError if the file has none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            text = image.text.get("ldm", "null")
        metadata = json.loads(text)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except _DECODE_ERRORS as error:
        raise ValueError(f"{path} cannot be read as a PNG written by ldm: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{path} holds no settings: it was not written by sample.py, or was re-saved by other software"
        )
    return metadata

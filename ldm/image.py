"""Converts images between files, PIL images, uint8 tensors and float tensors in [-1, 1].

`to_rgb` decides what the pixels of an image mean, wherever it comes from.
"""

import io
import json
import math
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ldm.files import atomic_write

COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Pillow would run ghostscript for EPS, and needs Windows for WMF; the others are identified but not decoded.
REFUSED_FORMATS = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
MAX_PIXELS = 89_478_485  # Pillow's default: 256 MiB as RGB
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
REDUCING_GAP = 3.0  # the fast reduction stops at this multiple of the target size, without a visible difference
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # the inverse of each EXIF orientation
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"tRNS", b"eXIf")  # beside critical chunks, which have an upper-case first letter
_TIFF = {b"II*\0": "<", b"MM\0*": ">"}  # signature: byte order
_TIFF_KEPT = {
    *range(254, 260), 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, *range(320, 326), *range(332, 335),
    338, 339, 347, *range(529, 533), 34675,
}  # fmt: skip  # layout and compression of the pixels, orientation and color profile
_SAME = 2  # a profile that changes no color by more levels than this counts as sRGB
_DECODE_ERRORS = (  # all that Pillow's plugins raise for malformed files
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, AttributeError,
    AssertionError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip

Read = TypeVar("Read")


def load_image(
    source: str | Path | bytes | BinaryIO,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    side: int | None = None,
) -> Image.Image:
    """Decodes the first frame as `to_rgb` does.

    A JPEG that will be scaled down to `side` pixels or less is decoded at a reduced size. Raises ValueError with `name`
    (by default the path) and the reason if the file is not an image, is truncated or has more than `max_pixels` pixels,
    and FileNotFoundError for a missing path. Metadata that cannot be read are ignored.
    """

    def decode(image: Image.Image) -> Image.Image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width}×{image.height} exceeds the limit of {max_pixels:,} pixels")
        if side is not None:
            image.draft(None, (round(REDUCING_GAP * side),) * 2)
        rgb = _rgb_of(image, background)
        rgb.info = {}
        return rgb

    return _read(source, decode, name)


def load_alpha(source: str | Path | bytes | BinaryIO, name: str | None = None) -> Image.Image | None:
    """Decodes the opacity of each pixel, upright, as an image of mode L; None if the image has no transparency.

    Raises the same errors as `load_image`.
    """
    return _read(source, _alpha_of, name)


def upright_size(source: str | Path | bytes | BinaryIO, name: str | None = None) -> tuple[int, int]:
    """Reads width and height as displayed. Raises the same errors as `load_image`."""
    return _read(source, _upright_size, name)


def _read(source: str | Path | bytes | BinaryIO, use: Callable[[Image.Image], Read], name: str | None) -> Read:
    """Opens an image and returns the result of `use`, even if its metadata are malformed."""
    if isinstance(source, (str, Path)):
        with open(source, "rb") as opened:
            return _read(opened, use, name or str(source))
    file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source
    name = name or str(getattr(file, "name", "the image"))
    try:
        return _use_stripped_if_malformed(file, use)
    except UnidentifiedImageError as error:
        expected = ", ".join(COMMON_FORMATS)
        raise ValueError(
            f"{name} cannot be read as an image: expected one of {expected}, or another format that Pillow decodes"
        ) from error
    except _DECODE_ERRORS as error:
        reason = str(error) or "it is corrupt"
        raise ValueError(f"{name} cannot be read as an image: {reason}") from error


def _use_stripped_if_malformed(file: BinaryIO, use: Callable[[Image.Image], Read]) -> Read:
    try:
        with Image.open(file, formats=_formats()) as image:
            return use(image)
    except _DECODE_ERRORS:  # malformed metadata in PNG and TIFF cause these
        file.seek(0)
        data = file.read()
        stripped = _without_metadata(data)
        if stripped == data:
            raise
        with Image.open(io.BytesIO(stripped), formats=_formats()) as image:
            return use(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "PNG":
        image.load()  # the orientation may be stored behind the pixels
    return image.size[::-1] if _orientation(image) >= 5 else image.size


def _alpha_of(image: Image.Image) -> Image.Image | None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}×{image.height} exceeds the limit of {MAX_PIXELS:,} pixels")
    if image.format != "TIFF":
        image.load()  # PNG may store the orientation behind the pixels
    orientation = _orientation(image)
    image.load()
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else alpha


def image_format(data: bytes) -> str | None:
    """Returns Pillow's name of an image file's format, None if `load_image` would refuse the header."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return image.format
    except _DECODE_ERRORS:
        stripped = data and _without_metadata(data)
        return None if stripped == data else image_format(stripped)


@cache
def _formats() -> tuple[str, ...]:
    """Returns the formats that Pillow decodes itself, the common ones first."""
    Image.init()
    return (*COMMON_FORMATS, *sorted(Image.OPEN.keys() - {*COMMON_FORMATS, *REFUSED_FORMATS}))


def _without_metadata(data: bytes) -> bytes:
    """Returns a PNG or TIFF without the data that do not affect its pixels, and any other file unchanged."""
    if data.startswith(_PNG):
        return _PNG + b"".join(c for c in _chunks(data) if c[4:5].isupper() or c[4:8] in _PNG_KEPT)
    if order := _TIFF.get(data[:4]):
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        kept = [entry for tag, entry in _entries(data, order) if tag in _TIFF_KEPT]
        directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)  # and no further image
        return data[:start] + directory + data[start + len(directory) :]
    return data


def _chunks(png: bytes) -> Iterator[bytes]:
    at = len(_PNG)
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])  # length, type and checksum take 12 bytes
        yield png[at:end]
        at = end


def _entries(tiff: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yields the tag and the 12 bytes of each entry in the first directory of a TIFF file, or of EXIF."""
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for at in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        yield struct.unpack_from(f"{order}H", tiff, at)[0], tiff[at : at + 12]


def to_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Converts any PIL image to RGB without metadata: upright, in sRGB, 16 bits scaled to 8, and on `background`.

    The EXIF orientation is applied, an embedded color profile is converted to sRGB, and transparent pixels are
    composited onto `background`. Malformed metadata are ignored. Raises ValueError for pixels without a standard range.
    """
    rgb = _rgb_of(image, background)
    rgb = rgb.copy() if rgb is image else rgb
    rgb.info = {}  # the metadata have been applied and must not be applied again
    return rgb


def _rgb_of(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Like `to_rgb`, but keeps the metadata, and does not copy an image that needs no conversion."""
    if image.format != "TIFF":
        image.load()  # PNG may store the orientation behind the pixels
    orientation = _orientation(image)
    image.load()
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no standard range; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "La", "LA") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert(image.mode.removesuffix("A"))
    rgb = _to_srgb(image, profile)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, (*background, 255)), rgb).convert("RGB")
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 if there is none or EXIF cannot be read."""
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, _orientation_in(image.info.get("exif")))
        if image.format == "TIFF":  # Pillow would turn it upright itself, but fail if another tag is malformed
            exif.pop(ExifTags.Base.Orientation, None)
    except _DECODE_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _orientation_in(exif: object) -> int | None:
    """Returns the orientation in EXIF data, also behind a malformed tag, at which Pillow stops."""
    tiff = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""
    order = _TIFF.get(tiff[:4], "<")
    found = (entry for tag, entry in _entries(tiff, order) if tag == ExifTags.Base.Orientation)
    return next((int(struct.unpack_from(f"{order}H", entry, 8)[0]) for entry in found), None)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales greyscale values from 0 … 65535 to the nearest in 0 … 255 (Pillow's conversion clips at 255)."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("it has values outside 0 … 65535; save it with 8 or 16 bits per channel")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Converts an image without alpha to RGB, by its color profile if it has a valid one."""
    if image.mode == "P":
        image = image.convert("RGB")
    transform = _transform(profile, image.mode) if isinstance(profile, bytes) else None
    if transform is None and image.mode == "LAB":
        transform = _lab_to_srgb()
    return _rgb(image) if transform is None else ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the conversion of pixels from a color profile to sRGB, None if it is sRGB, malformed or for other pixels.

    It is relative colorimetric with black point compensation.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if mode == "RGB" and _is_identity(transform) else transform


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    converted = ImageCms.applyTransform(Image.fromarray(cube), transform)
    return bool(np.abs(np.asarray(converted).astype(int) - cube).max() <= _SAME)


@cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


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

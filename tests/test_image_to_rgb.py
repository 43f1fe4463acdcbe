import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.app.painting import sources_of
from ldm.data.sources.image import Framing
from ldm.drawing.sources import read
from ldm.image import BLACK, WHITE, load_image, pixels, to_rgb
from ldm.pipeline.inputs import image_requests

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
MALFORMED = {
    "an offset outside the file": (0x010F, 2, 100, 0xFFFFFF),
    "an unknown type": (0x010F, 99, 1, 0),
    "a ratio outside the file": (0x011A, 5, 1, 0xFFFFFF),
    "a directory outside the file": (0x8769, 4, 1, 0xFFFFFF),
    "a directory that is text": (0x8769, 2, 4, 0x61626364),
}
LONG = zlib.compress(b"x" * 3_000_000)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(extra: bytes, image: Image.Image) -> bytes:
    data = encoded(image)
    return data[:33] + extra + data[33:]  # after the header


def exif_with(*tags: tuple[int, int, int, int]) -> bytes:
    """Returns little-endian EXIF of the entries (tag, type, count, value), sorted."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def swapped_profile() -> bytes:
    """Returns sRGB with the red and green primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(profile[128:132]), 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("malformed", MALFORMED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_orientation_is_applied_beside_a_malformed_tag(format: str, malformed: str) -> None:
    exif = b"Exif\0\0" + exif_with((0x0112, 3, 1, 6), MALFORMED[malformed])
    assert load_image(encoded(noise(), format, exif=exif)).size == (6, 8)


@pytest.mark.parametrize("malformed", MALFORMED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tiff_with_a_malformed_tag_is_read(malformed: str) -> None:
    data = encoded(noise(), "TIFF")
    start = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[start : start + 2], "little")
    tags = [struct.unpack_from("<HHII", data, start + 2 + 12 * k) for k in range(count)]
    directory = exif_with(*tags, (0x0112, 3, 1, 6), MALFORMED[malformed])[8:]
    upright = load_image(data[:4] + struct.pack("<I", len(data)) + data[8:] + directory)
    assert upright.tobytes() == noise().transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"key\0\0" + LONG),
        chunk(b"iTXt", b"key\0\1\0\0\0" + LONG),
        chunk(b"tEXt", b"key\0" + bytes(70_000_000)),
        chunk(b"tEXt", b"key\0value")[:-4] + b"oops",
        chunk(b"iCCP", b"name\0\0" + LONG),
        chunk(b"iCCP", b"name\0\0no deflate stream"),
        chunk(b"pHYs", b"1"),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff"),
    ],
    ids=["zTXt", "iTXt", "tEXt", "checksum", "long profile", "profile", "pHYs", "eXIf"],
)
def test_a_png_with_long_or_malformed_metadata_is_read(extra: bytes) -> None:
    image = noise()
    assert load_image(png_with(extra, image)).tobytes() == image.tobytes()


def test_transparency_and_orientation_survive_malformed_metadata() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    data = encoded(image, transparency=GREEN, exif=exif_with((0x0112, 3, 1, 3)))
    loaded = load_image(data[:33] + chunk(b"zTXt", b"key\0\0" + LONG) + data[33:], BLUE)
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [BLUE, RED]


def test_corrupt_pixels_are_refused_regardless_of_the_metadata() -> None:
    data = encoded(noise(size=(64, 64)))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load_image(data[:33] + chunk(b"zTXt", b"key\0\0" + LONG) + data[33 : len(data) // 2])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_a_color_profile_is_converted_to_srgb(format: str, mode: str) -> None:
    options = {"icc_profile": swapped_profile(), **({"lossless": True} if format == "WEBP" else {})}
    loaded = load_image(encoded(Image.new("RGB", (4, 4), RED).convert(mode), format, **options))
    assert np.abs(np.subtract(loaded.getpixel((0, 0)), GREEN)).max() <= 1


def test_a_profile_for_grey_pixels_is_applied_to_grey_images() -> None:
    """Linear grey 0.5 becomes 188 in sRGB: 255 · (1.055 · 0.5^(1/2.4) − 0.055)."""
    tags = {b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061), b"kTRC": b"curv" + bytes(8)}
    directory, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        directory += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content
    header = bytes(4) + bytes(4) + b"\2\x40\0\0" + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    white = struct.pack(">3i", 63190, 65536, 54061)
    profile = (header + white).ljust(128, b"\0") + directory + data
    profile = struct.pack(">I", len(profile)) + profile[4:]
    for mode in ("L", "LA"):
        image = Image.new("L", (4, 4), 128).convert(mode)
        assert load_image(encoded(image, icc_profile=profile)).getpixel((0, 0)) == (188, 188, 188)


@pytest.mark.parametrize("profile", [b"", b"no profile", swapped_profile()[:200]])
def test_a_malformed_profile_is_ignored(profile: bytes) -> None:
    image = noise()
    assert load_image(encoded(image, icc_profile=profile)).tobytes() == image.tobytes()


def test_a_profile_that_is_srgb_changes_no_pixel() -> None:
    image, srgb = noise(size=(64, 64)), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert load_image(encoded(image, icc_profile=srgb)).tobytes() == image.tobytes()


def test_16_bit_greyscale_with_a_transparent_value_shows_the_background() -> None:
    values = np.array([[65535, 300]], np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), transparency=300), BLUE)
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, BLUE]


def test_an_image_is_converted_only_once() -> None:
    """Applied metadata is removed, so that a second conversion, also of a saved copy, has no effect."""
    with Image.open(
        io.BytesIO(encoded(noise("RGBA"), icc_profile=swapped_profile(), exif=exif_with((274, 3, 1, 6))))
    ) as image:
        once = to_rgb(image)
    assert to_rgb(once).tobytes() == load_image(encoded(once)).tobytes() == once.tobytes()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16"]
)
def test_every_mode_of_pillow_with_a_standard_range_is_converted(mode: str) -> None:
    assert to_rgb(Image.new(mode, (2, 3))).mode == "RGB"


def test_the_given_image_is_not_modified() -> None:
    image = noise("RGBA")
    image.info["icc_profile"] = swapped_profile()
    before = image.tobytes()
    to_rgb(image)
    assert image.tobytes() == before and image.mode == "RGBA" and image.info["icc_profile"] == swapped_profile()


TRICKY = {
    "RGBA": encoded(noise("RGBA")),
    "LA": encoded(noise("LA")),
    "transparent palette": encoded(noise().quantize(16), transparency=3),
    "16 bits": encoded(Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300)),
    "orientation": encoded(noise(), "JPEG", exif=exif_with((0x0112, 3, 1, 8))),
    "profile": encoded(noise(), icc_profile=swapped_profile()),
    "CMYK": encoded(noise("CMYK"), "JPEG", quality=95),
    "TIFF": encoded(noise(), "TIFF", exif={0x0112: 5}),
}


@pytest.mark.parametrize("name", TRICKY)
@pytest.mark.parametrize("key", ["image", "mask"])
def test_the_api_and_the_command_read_the_same_pixels(key: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(TRICKY[name])
    command = read("init" if key == "image" else "mask", str(tmp_path / "x")).image
    with Image.open(tmp_path / "x") as image:
        (request,) = image_requests("", "", None, 1.0, **{"image": image, key: image})
    api = getattr(request, key)
    assert api.size == command.size and api.tobytes() == command.tobytes()


@pytest.mark.parametrize("name", TRICKY)
def test_training_reads_the_pixels_of_the_command(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(TRICKY[name])
    command = read("init", str(tmp_path / "x")).image
    framing = Framing(8, WHITE, "center", 0.0, 0, buckets=((command.height, command.width),))
    assert framing(TRICKY[name], "", "x", 0, 0).equal(pixels(command))


def test_the_app_reads_the_pixels_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(TRICKY["RGBA"])
    with Image.open(tmp_path / "x") as image:
        found = sources_of({"background": image, "layers": []})
    assert found["init"].tobytes() == read("init", str(tmp_path / "x")).image.tobytes()


def test_transparent_pixels_of_a_mask_are_not_repainted() -> None:
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    (request,) = image_requests("", "", None, 1.0, noise(), mask)
    assert request.mask is not None and [request.mask.getpixel((x, 0)) for x in (0, 1)] == [BLACK, WHITE]


def test_an_image_without_a_standard_range_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"^the image cannot be used: floating-point pixels have no standard range"):
        image_requests("", "", None, 1.0, Image.new("F", (2, 2)))


@pytest.mark.parametrize("format", ["BMP", "DDS", "ICO", "IM", "PCX", "PPM", "QOI", "SGI", "TGA", "JPEG2000", "AVIF"])
def test_the_formats_that_pillow_decodes_are_read(format: str) -> None:
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this version of Pillow cannot write {format}")
    lossless = {"irreversible": False} if format == "JPEG2000" else {"quality": 100} if format == "AVIF" else {}
    loaded = load_image(encoded(Image.new("RGB", (32, 32), RED), format, **lossless))
    assert loaded.size == (32, 32) and np.abs(np.subtract(loaded.getpixel((9, 9)), RED)).max() <= 2


@pytest.mark.parametrize("data", [b"FTEX" + bytes(200), b"DDS " + struct.pack("<I", 124) + bytes(200), b"8BPS\0\1"])
def test_a_corrupt_file_of_a_rare_format_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^x cannot be read as an image: ."):
        load_image(data, name="x")

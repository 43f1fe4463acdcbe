import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.image import (
    from_uint8,
    load_image,
    pixels,
    psnr,
    resize_and_crop,
    to_pil,
    to_tensor,
    to_uint8,
)

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(mode: str, size: tuple[int, int] = (8, 6), seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_rgb_is_loaded_unchanged_from_a_path_bytes_or_a_file(tmp_path: Path) -> None:
    image = noise("RGB")
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, io.BytesIO(data)):
        assert np.array_equal(array(load_image(source)), array(image))


def test_transparent_images_are_composited_onto_the_background() -> None:
    image = noise("RGBA")
    background = (10, 200, 90)
    rgba = np.asarray(image).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + np.array(background) * (1 - alpha)
    loaded = array(load_image(encoded(image), background))
    assert np.abs(loaded - expected).max() <= 1  # Pillow rounds intermediate values


def test_greyscale_with_alpha_is_composited_onto_the_background() -> None:
    image = noise("LA")
    grey, alpha = np.asarray(image).astype(float).transpose(2, 0, 1)
    expected = grey * alpha / 255 + 40 * (1 - alpha / 255)
    loaded = array(load_image(encoded(image), (40, 40, 40)))
    assert np.abs(loaded - expected[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1"])
def test_greyscale_and_binary_images_become_three_equal_channels(mode: str) -> None:
    image = noise("L").convert(mode)
    loaded = array(load_image(encoded(image)))
    assert np.array_equal(loaded, np.asarray(image.convert("L")).astype(int)[..., None].repeat(3, -1))


def test_a_transparent_palette_entry_shows_the_background() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=1)
    assert array(load_image(data, BLUE)).tolist() == [[[*RED], [*BLUE]]]
    assert array(load_image(encoded(image), BLUE)).tolist() == [[[*RED], [*GREEN]]]


def test_the_transparent_colour_of_an_rgb_png_shows_the_background() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    assert array(load_image(encoded(image, transparency=GREEN), BLUE)).tolist() == [[[*RED], [*BLUE]]]


def test_cmyk_is_converted_to_rgb() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    loaded = array(load_image(encoded(image, "JPEG", quality=95)))
    assert np.abs(loaded - np.array(RED)).max() <= 4  # JPEG


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_to_the_nearest_of_8_bits(format: str) -> None:
    values = np.array([[0, 1, 128, 129, 257, 32768, 65407, 65535]], dtype=np.uint16)
    loaded = array(load_image(encoded(Image.fromarray(values), format)))
    assert loaded[0, :, 0].tolist() == np.round(values[0] / 257).astype(int).tolist()


def test_big_endian_16_bits_are_decoded_alike() -> None:
    values = np.array([[0, 1000, 40000, 65535]], dtype=np.uint16)
    header = struct.pack(">2sHI", b"MM", 42, 8)
    tags = [(256, 4), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 8 * 12 + 4), (278, 1), (279, 8)]
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", t, 4, 1, v) for t, v in tags)
    data = header + directory + struct.pack(">I", 0) + values.astype(">u2").tobytes()
    assert array(load_image(data))[0, :, 0].tolist() == np.round(values[0] / 257).astype(int).tolist()


@pytest.mark.parametrize("values", [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32)])
def test_pixels_without_a_standard_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^x.tif cannot be read as an image: .*save it with 8 or 16 bits"):
        load_image(encoded(Image.fromarray(values), "TIFF"), name="x.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied(orientation: int, format: str) -> None:
    # How a camera stores an upright scene under each orientation: the inverse of the table in EXIF 2.3.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    scene = np.zeros((32, 48, 3), np.uint8)
    scene[:16, :16], scene[:16, 32:], scene[16:, :16] = RED, GREEN, BLUE
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossy = {"quality": 95} if format in ("JPEG", "WEBP") else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored[orientation](scene))), format, exif=exif, **lossy)
    loaded = array(load_image(data))
    assert loaded.shape == scene.shape
    corners = (slice(4, None, 24), slice(4, None, 36))
    assert np.abs(loaded[corners] - scene[corners].astype(int)).max() <= 12  # JPEG and WebP


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_loaded(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **lossless)
    assert np.array_equal(array(load_image(data)), array(frames[0]))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_refused_with_its_path(format: str, tmp_path: Path) -> None:
    path = tmp_path / "half.img"
    data = encoded(noise("RGB", (64, 64)), format)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"^{path} cannot be read as an image: ."):
        load_image(path)


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_a_file_that_is_not_an_image_is_refused_with_its_name(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^a\.png in x\.tar cannot be read as an image: expected one of PNG"):
        load_image(data, name="a.png in x.tar")


def test_a_missing_file_raises_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png")


def test_a_large_jpeg_is_decoded_at_a_reduced_size_without_visible_change() -> None:
    rows, columns = np.mgrid[:1024, :1536] / 1536
    waves = [np.sin(40 * columns + k) * np.cos(30 * rows) * 100 + 128 for k in range(3)]
    file = io.BytesIO()
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(file, "JPEG", quality=95)
    full = load_image(file.getvalue())
    for side, size in ((400, (1536, 1024)), (170, (768, 512)), (64, (384, 256)), (8, (192, 128))):
        small = load_image(file.getvalue(), side=side)
        assert small.size == size
        one, other = (to_tensor(resize_and_crop(image, side)) for image in (small, full))
        assert psnr(one, other) > 40


def test_an_image_with_too_many_pixels_is_refused() -> None:
    image = Image.new("RGB", (20, 10))
    assert load_image(encoded(image), max_pixels=200).size == (20, 10)
    with pytest.raises(ValueError, match="20×10 exceeds the limit of 199 pixels"):
        load_image(encoded(image), max_pixels=199)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused(side: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=r"^bomb.png cannot be read as an image: .*(pixels|bomb)"):
        load_image(bomb, name="bomb.png")


def test_every_byte_survives_conversion_to_float_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert from_uint8(every)[[0, -1]].tolist() == [-1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_rounded_to_the_nearest_byte_and_clamped(dtype: torch.dtype) -> None:
    x = torch.linspace(-1.5, 1.5, 1001, dtype=torch.float64).to(dtype)
    exact = (x.double() + 1) * 127.5
    assert (to_uint8(x).double() - exact.clamp(0, 255)).abs().max() <= 0.5 + 1e-4


def test_nan_is_refused_and_infinity_is_clamped() -> None:
    assert to_uint8(torch.tensor([-torch.inf, torch.inf])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, torch.nan]))


def test_tensors_of_another_dtype_or_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a float tensor"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected a uint8 tensor"):
        from_uint8(torch.zeros(2))
    with pytest.raises(ValueError, match=r"got \(2, 8, 8\)"):
        to_pil(torch.zeros(2, 8, 8))


def test_images_survive_conversion_to_tensors_and_back() -> None:
    images = [noise("RGB", seed=k) for k in range(3)]
    x = to_tensor(images)
    assert x.shape == (3, 3, 6, 8) and x.dtype == torch.float32
    for back in (to_pil(x), to_pil(to_uint8(x)), [to_pil(image)[0] for image in x]):
        assert all(np.array_equal(array(a), array(b)) for a, b in zip(images, back, strict=True))
    assert torch.equal(to_tensor(images[0])[0], from_uint8(pixels(images[0])))


def test_images_that_require_gradients_can_be_converted() -> None:
    assert to_pil(torch.zeros(3, 4, 4, requires_grad=True))[0].getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("offset", [(0, 0), (0.5, 0.5), (0.3, 0.9), (1, 1)])
@pytest.mark.parametrize("size", [(90, 40), (33, 77), (32, 32)])
def test_resize_and_crop_equals_resizing_then_cropping(size: tuple[int, int], offset: tuple[float, float]) -> None:
    # Mid-tones avoid overshoots, which Pillow would clip between its two passes, whose order depends on the sizes.
    image = noise("RGB", size).point(lambda value: 64 + value // 2)
    scale = 32 / min(size)
    scaled = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS)
    extra = scaled.width - 32, scaled.height - 32
    left, top = (min(int(o * (e + 1)), e) for o, e in zip(offset, extra, strict=True))
    expected = scaled.crop((left, top, left + 32, top + 32))
    assert np.abs(array(resize_and_crop(image, 32, offset)) - array(expected)).max() <= 2  # two passes, each rounded


def test_a_crop_without_scaling_copies_pixels() -> None:
    image = noise("RGB", (45, 32))
    assert np.array_equal(array(resize_and_crop(image, 32)), array(image)[:, 7:39])


def test_the_target_height_and_width_may_differ() -> None:
    image = Image.new("RGB", (100, 100), RED)
    assert resize_and_crop(image, (20, 60)).size == (60, 20)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (2000, 1), (640, 480)])
def test_an_image_of_any_shape_covers_the_crop(size: tuple[int, int]) -> None:
    cropped = resize_and_crop(Image.new("RGB", size, GREEN), 32, (0.7, 0.7))
    assert cropped.size == (32, 32) and cropped.getcolors() == [(1024, GREEN)]


def test_a_large_reduction_averages_pixels() -> None:
    board = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(array(resize_and_crop(board, 16)) - 127.5).max() <= 1


def test_an_error_of_a_tenth_of_the_range_is_20_decibels() -> None:
    x = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(x, x + 0.2), torch.full((2,), 20.0))

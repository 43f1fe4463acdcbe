"""Creates shards for tests, with images of a single gray level that identifies them."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def image_file(shade: int = 0, size: tuple[int, int] = (12, 8), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(file, format)
    return file.getvalue()


def sample(key: str, shade: int = 0) -> dict[str, bytes]:
    return {f"{key}.png": image_file(shade), f"{key}.txt": f"shade {shade}".encode()}


def samples(count: int, first: int = 0) -> dict[str, bytes]:
    """Returns samples with the keys 0000, 0001, …, and their number as gray level."""
    return {name: data for k in range(first, first + count) for name, data in sample(f"{k:04d}", k).items()}


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path

"""Lists the files in an uncompressed tar by reading only its headers (POSIX.1-2001 pax and GNU), and writes tars."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_FILE, _GNU_NAME, _GNU_LINK, _PAX = (b"0", b"\0", b"7"), b"L", b"K", b"x"


@dataclass(frozen=True)
class Member:
    name: str
    offset: int  # of the data, in bytes from the beginning of the tar
    size: int


def members(file: BinaryIO, length: int, tar: str) -> tuple[list[Member], str]:
    """Returns all regular files in a tar of `length` bytes, and why the list is incomplete ("" if it is complete).

    Raises ValueError if the file does not start with a tar header.
    """
    found: list[Member] = []
    at, name, size_override = 0, "", ""  # name and size come from extended headers, which precede a member's own

    def read(size: int, offset: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    while at < length:
        header = read(BLOCK, at)
        if not any(header):
            complete = len(header) == BLOCK and read(BLOCK, at + BLOCK) == bytes(BLOCK)
            return found, "" if complete else f"the end-of-archive marker at byte {at} is truncated or corrupt"
        try:
            kind, size = _kind_and_size(header, size_override)
            if at + BLOCK + size > length:
                return found, f"the member at byte {at} extends beyond the end of the file"
            if kind == _GNU_NAME:
                name = _text(read(size, at + BLOCK))
            elif kind == _PAX:
                records = _pax(read(size, at + BLOCK))
                name, size_override = records.get("path", name), records.get("size", "")
        except ValueError as error:
            if at == 0:
                raise ValueError(f"{tar} is not an uncompressed tar: {error}") from error
            return found, f"the header at byte {at} is corrupt"
        if kind in _FILE:
            found.append(Member(name or _name(header), at + BLOCK, size))
        if kind not in (_GNU_NAME, _GNU_LINK, _PAX):
            name, size_override = "", ""
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return found, "it has no end-of-archive marker"


def _kind_and_size(header: bytes, size_override: str) -> tuple[bytes, int]:
    """Returns type and size. Raises ValueError for a wrong size or checksum, which counts its own field as spaces."""
    checksum = header[148:156]
    if len(header) < BLOCK or _number(checksum) != sum(header) - sum(checksum) + 8 * ord(" "):
        raise ValueError("its first block is not a tar header")
    kind = header[156:157]
    size = int(size_override) if size_override and kind in _FILE else _number(header[124:136])
    if size < 0:
        raise ValueError("a size is negative")
    return kind, size


def _number(field: bytes) -> int:
    """Parses octal digits or, if the top bit is set, GNU's big-endian binary for larger numbers."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    """Returns the name field after the ustar prefix, if any; GNU headers use those bytes for other fields."""
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Parses the records "length key=value\\n" of an extended header. Raises ValueError for a truncated one."""
    records: dict[str, str] = {}
    while data:
        length = int(data.partition(b" ")[0])
        if not 0 < length <= len(data):
            raise ValueError("an extended header is truncated")
        key, _, value = data[:length].partition(b" ")[2].partition(b"=")
        records[key.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def tar_of(samples: Iterable[Mapping[str, bytes]]) -> bytes:
    """Returns an uncompressed tar without dates and owners, so that the same samples give the same bytes.

    It has pax headers only for names that are long or not ASCII.
    """
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (member for members in samples for member in members.items()):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return file.getvalue()

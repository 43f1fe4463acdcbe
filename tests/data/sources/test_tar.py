import gzip
import io
import tarfile
from pathlib import Path

import pytest

from ldm.data.sources import tar
from ldm.data.sources.tar import BLOCK, Member
from tests.data.tars import write_tar

LONG = "folder/" * 20 + "x" * 120 + ".png"  # 264 characters, longer than a ustar name and prefix
UNICODE = "café/🍵.txt"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def members(path: Path) -> tuple[list[Member], str]:
    with open(path, "rb") as file:
        return tar.members(file, path.stat().st_size, str(path))


def read(path: Path) -> dict[str, bytes]:
    found, loss = members(path)
    assert loss == ""
    data = path.read_bytes()
    return {m.name: data[m.offset : m.offset + m.size] for m in found}


@pytest.mark.parametrize("format", FORMATS)
def test_members_have_the_offsets_that_tarfile_wrote(format: str, tmp_path: Path) -> None:
    contents = {"a.png": b"", "b/c.txt": b"x", "d.json": b"y" * 512, UNICODE: b"z" * 1025}
    if format != "ustar":
        contents[LONG] = b"long"
    contents["last.txt"] = b"!"
    assert read(write_tar(tmp_path / "a.tar", contents, FORMATS[format])) == contents


def test_the_ustar_prefix_precedes_the_name(tmp_path: Path) -> None:
    name = "p" * 90 + "/" + "n" * 90
    path = write_tar(tmp_path / "a.tar", {name: b"x"})
    assert b"p" * 90 + b"/" not in path.read_bytes() and read(path) == {name: b"x"}


def test_a_pax_size_overrides_the_header(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        header = tarfile.TarInfo("a.txt")
        header.size, header.pax_headers = 3, {"size": "3", "comment": "ignored"}
        archive.addfile(header, io.BytesIO(b"abc"))
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    at = raw.index(b"a.txt\0")
    raw[at + 124 : at + 135] = b"00000000000"
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 155] = f"{sum(raw[at : at + BLOCK]):06o}\0".encode()
    (tmp_path / "a.tar").write_bytes(raw)
    assert read(tmp_path / "a.tar") == {"a.txt": b"abc"}


def test_a_size_in_base_256_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"abc"})
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"\x80" + (3).to_bytes(11, "big")
    raw[148:156] = b" " * 8
    raw[148:155] = f"{sum(raw[:BLOCK]):06o}\0".encode()
    path.write_bytes(raw)
    assert read(path) == {"a.txt": b"abc"}


def test_folders_links_and_devices_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            header = tarfile.TarInfo("d" * 150)
            header.type, header.linkname = kind, "l" * 150
            archive.addfile(header)
        header = tarfile.TarInfo("a.txt")
        header.size = 3
        archive.addfile(header, io.BytesIO(b"abc"))
    assert read(tmp_path / "a.tar") == {"a.txt": b"abc"}


def test_an_empty_tar_has_no_members(tmp_path: Path) -> None:
    assert read(write_tar(tmp_path / "a.tar", {})) == {}


def test_a_tar_truncated_anywhere_reports_it_and_keeps_earlier_members(tmp_path: Path) -> None:
    contents = {f"{k}.txt": bytes([65 + k]) * 700 for k in range(3)}
    complete = write_tar(tmp_path / "a.tar", contents).read_bytes()
    truncated = tmp_path / "b.tar"
    size = 3 * BLOCK  # header and 700 bytes in two blocks
    for cut in range(BLOCK, 3 * size + 2 * BLOCK, 100):
        truncated.write_bytes(complete[:cut])
        found, loss = members(truncated)
        assert [m.name for m in found] == list(contents)[: (cut + size - BLOCK - 700) // size], cut
        assert loss, cut
    truncated.write_bytes(complete[: 3 * size + 2 * BLOCK])
    assert members(truncated)[1] == ""


def test_a_corrupt_header_ends_the_list_and_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{k}.txt": b"abc" for k in range(3)})
    raw = bytearray(path.read_bytes())
    raw[2 * BLOCK + 3] ^= 1  # in the second member's name
    path.write_bytes(raw)
    found, loss = members(path)
    assert [m.name for m in found] == ["0.txt"] and loss == f"the header at byte {2 * BLOCK} is corrupt"


@pytest.mark.parametrize("records", [b"0 path=x\n", b"-9 path=x\n", b"99 path=x\n", b"path=x\n", b"11 size=-9\n"])
def test_an_invalid_extended_header_is_reported_without_an_endless_loop(records: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, data in (("0.txt", b"0", b"abc"), ("pax", b"x", records), ("1.txt", b"0", b"abc")):
            header = tarfile.TarInfo(name)
            header.type, header.size = kind, len(data)
            archive.addfile(header, io.BytesIO(data))
    found, loss = members(tmp_path / "a.tar")
    assert [m.name for m in found] == ["0.txt"] and "corrupt" in loss


def test_a_compressed_tar_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(write_tar(path, {"a.txt": b"abc"}).read_bytes()))
    with pytest.raises(ValueError, match=f"^{path} is not an uncompressed tar"):
        members(path)

import errno
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from ldm.files import atomic_folder, atomic_write, check_writable, write_json, write_text


def full_disk(file: BinaryIO) -> None:
    file.write(b"half of i")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_written_arrives_and_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    atomic_write(tmp_path / "new" / "a.bin", lambda file: file.write(b"abc"))
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"abc"
    assert os.listdir(tmp_path / "new") == ["a.bin"]


def test_a_writer_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(file: BinaryIO) -> None:
        file.write(b"new")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        atomic_write(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_the_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    seen = []
    atomic_write(path, lambda file: seen.append((path.exists(), Path(file.name).parent)))
    assert seen == [(False, tmp_path)]


def test_a_full_disk_is_one_sentence_with_the_path_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(OSError, match="the disk is full") as raised:
        atomic_write(path, full_disk)
    assert str(raised.value).startswith(f"cannot write {path}: ")
    assert raised.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_a_folder_appears_whole_in_place_of_the_old_one_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_folder(path) as folder:
            write_text(folder / f"{text}.txt", text)
        assert os.listdir(tmp_path) == ["model"] and os.listdir(path) == [f"{text}.txt"]
    with pytest.raises(OSError, match=f"^cannot write {path}: the disk is full"), atomic_folder(path) as folder:
        atomic_write(folder / "part" / "a.bin", full_disk)
    assert os.listdir(tmp_path) == ["model"] and os.listdir(path) == ["new.txt"]


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full")
def test_the_sentence_is_the_same_when_the_system_itself_says_that_the_disk_is_full(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            os.dup2(full.fileno(), file.fileno())
        file.write(b"abc")

    with pytest.raises(OSError, match="the disk is full"):
        atomic_write(tmp_path / "a.bin", write)
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_a_file_is_refused_with_the_path_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"^cannot write {tmp_path}/file/a.txt: "):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_text(tmp_path, "x")


def test_a_new_file_has_the_permissions_that_open_would_give_it(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "ours", "x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_json_comes_back_as_it_went_and_is_utf8(tmp_path: Path) -> None:
    value = {"prompt": "a café 🍵", "steps": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_bytes()) == value
    assert "🍵".encode() in (tmp_path / "a.json").read_bytes()


def test_json_refuses_nan_before_it_touches_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == 1


def test_a_folder_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"cannot write into .*/file/new: .*/file is no folder"):
        check_writable(tmp_path / "file" / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"cannot write into .*/new: .* is read-only here"):
        check_writable(tmp_path / "new")

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import pytest

from ldm import files
from ldm.files import atomic_folder, atomic_write, check_writable, leftovers, recover_folder, write_json, write_text


def full_disk(file: BinaryIO) -> None:
    file.write(b"half of i")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write_creates_the_file_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    atomic_write(tmp_path / "new" / "a.bin", lambda file: file.write(b"abc"))
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"abc"
    assert os.listdir(tmp_path / "new") == ["a.bin"]


def test_a_failed_write_keeps_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(file: BinaryIO) -> None:
        file.write(b"new")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        atomic_write(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_the_file_does_not_exist_before_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    seen = []
    atomic_write(path, lambda file: seen.append((path.exists(), Path(file.name).parent)))
    assert seen == [(False, tmp_path)]


def test_a_full_disk_is_reported_in_one_sentence_with_the_requested_path(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(OSError, match="the disk is full") as raised:
        atomic_write(path, full_disk)
    assert str(raised.value).startswith(f"cannot write {path}: ")
    assert raised.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_folder(path) as folder:
            write_text(folder / f"{text}.txt", text)
        assert os.listdir(tmp_path) == ["model"] and os.listdir(path) == [f"{text}.txt"]
    with pytest.raises(OSError, match=f"^cannot write {path}: the disk is full"), atomic_folder(path) as folder:
        atomic_write(folder / "part" / "a.bin", full_disk)
    assert os.listdir(tmp_path) == ["model"] and os.listdir(path) == ["new.txt"]


@pytest.fixture
def undeletable(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file that cannot be removed, not even by root."""
    path = tmp_path / "model"
    write_text(path / "part" / "old.txt", "old")
    if os.geteuid():
        (path / "part").chmod(0o500)
    elif subprocess.run(["chattr", "+i", path / "part" / "old.txt"], capture_output=True, check=False).returncode:
        pytest.skip("root can remove any file here")
    yield path
    for part in tmp_path.rglob("part"):
        if os.geteuid():
            part.chmod(0o700)
        else:
            subprocess.run(["chattr", "-R", "-i", part], check=True)


def test_an_undeletable_folder_is_replaced_and_its_remains_are_reported(undeletable: Path) -> None:
    with (
        pytest.warns(UserWarning, match="of the old one could not be removed") as caught,
        atomic_folder(undeletable) as new,
    ):
        write_text(new / "new.txt", "new")
    [old] = undeletable.parent.glob(".model.*")
    assert str(old) in str(caught[0].message) and (old / "part" / "old.txt").read_text() == "old"
    assert os.listdir(undeletable) == ["new.txt"]


def test_the_old_folder_is_restored_if_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_text(path / "old.txt", "old")
    with pytest.raises(FileNotFoundError), atomic_folder(path) as folder:
        write_text(folder / "new.txt", "new")
        folder.rename(tmp_path / "elsewhere")
    assert os.listdir(path) == ["old.txt"] and sorted(os.listdir(tmp_path)) == ["elsewhere", "model"]


def replaced_until(path: Path, lines: int) -> bool:
    """Returns whether a process replaced the folder before it was killed after `lines` lines of ldm/files.py."""
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        assert status in (0, 9)
        return status == 0
    left = lines

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != files.__file__:
            return None
        left -= event == "line"
        if left < 0:
            os.kill(os.getpid(), 9)
        return trace

    try:
        sys.settrace(trace)
        with atomic_folder(path) as folder:
            for name in "ab":
                write_text(folder / name, "new")
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.slow
def test_a_kill_at_any_line_keeps_the_old_or_new_folder_and_is_cleaned_up(tmp_path: Path) -> None:
    path, killed, found = tmp_path / "model", 0, set()
    while True:
        for name in "ab":
            write_text(path / name, "old")
        finished = replaced_until(path, killed)
        recover_folder(path)
        found.add("".join((path / name).read_text() for name in "ab"))
        assert os.listdir(tmp_path) == ["model"] and sorted(os.listdir(path)) == ["a", "b"]
        if finished:
            break
        killed += 1
    assert found == {"oldold", "newnew"} and killed > 50


def test_the_files_of_a_running_process_are_not_cleaned_up(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        write_text(folder / "a.txt", "a")
        recover_folder(tmp_path / "model")
    assert os.listdir(tmp_path / "model") == ["a.txt"]


def test_leftovers_excludes_files_that_only_resemble_temporary_ones(tmp_path: Path) -> None:
    seen: list[Path] = []
    atomic_write(tmp_path / "a.txt", lambda file: seen.extend(leftovers(tmp_path, {"a.txt", "b.txt"}.__contains__)))
    assert [path.parent for path in seen] == [tmp_path]
    for name in (".a.txt.notes.tmp", ".a.txt.tmp", ".c.txt.01234567.tmp", "a.txt.01234567.tmp"):
        (tmp_path / name).touch()
    assert leftovers(tmp_path, {"a.txt", "b.txt"}.__contains__) == []


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full")
def test_a_disk_that_the_system_reports_as_full_gives_the_same_message(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            os.dup2(full.fileno(), file.fileno())
        file.write(b"abc")

    with pytest.raises(OSError, match="the disk is full"):
        atomic_write(tmp_path / "a.bin", write)
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_a_file_is_refused_with_the_requested_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"^cannot write {tmp_path}/file/a.txt: "):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_text(tmp_path, "x")


def test_a_new_file_has_the_same_permissions_as_one_made_by_open(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "ours", "x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_json_survives_a_round_trip_and_is_utf8(tmp_path: Path) -> None:
    value = {"prompt": "a café 🍵", "steps": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_bytes()) == value
    assert "🍵".encode() in (tmp_path / "a.json").read_bytes()


def test_writing_nan_as_json_fails_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == 1


def test_check_writable_refuses_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"cannot write into .*/file/new: .*/file is not a folder"):
        check_writable(tmp_path / "file" / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"cannot write into .*/new: .* is not writable"):
        check_writable(tmp_path / "new")

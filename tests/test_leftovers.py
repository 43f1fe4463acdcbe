"""Tests that leftovers of killed writers are removed, and files of living ones are not."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ldm import files
from ldm.files import MACHINE, atomic_folder, atomic_write, sweep, temporary_folder, write_text

WRITERS = {
    "file": "atomic_write(folder / 'a', lambda file: (file.write(b'half'), wait()))",
    "folder": "with atomic_folder(folder / 'a') as new: (new / 'half').write_text('half'); wait()",
    "temporary folder": "with temporary_folder(folder / 'a') as new: (new / 'half').write_text('half'); wait()",
}


@contextmanager
def writing(folder: Path, writer: str) -> Iterator[None]:
    """Runs the block while another process is in the middle of writing, then kills that process."""
    code = f"""
import sys
from pathlib import Path
from ldm.files import atomic_folder, atomic_write, temporary_folder
folder = Path(sys.argv[1])
def wait():
    print(flush=True)
    sys.stdin.read()
{WRITERS[writer]}
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, folder], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_killed_writer_left_is_removed_by_the_next_write_to_the_folder(tmp_path: Path, writer: str) -> None:
    with writing(tmp_path, writer):
        sweep(tmp_path)
        assert any(path.name.startswith(f".a.{MACHINE}-") for path in tmp_path.iterdir())
        files._swept.clear()
    write_text(tmp_path / "another", "name")
    assert os.listdir(tmp_path) == ["another"]


def test_a_replaced_folder_is_restored_by_whichever_write_follows_a_kill(tmp_path: Path) -> None:
    write_text(tmp_path / f".a.{MACHINE}-01234567.old" / "old", "old")
    (tmp_path / f".a.{MACHINE}-01234567.tmp").mkdir()
    (tmp_path / f".a.{MACHINE}-01234567.lock").touch()
    with atomic_folder(tmp_path / "b"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and os.listdir(tmp_path / "a") == ["old"]


def leftovers_of_another_machine(folder: Path, days: float) -> list[Path]:
    """Returns an unlocked temporary file, and the mark of an unlocked folder, both last written `days` ago."""
    file, mark, part = (folder / f".a.00000000-0123456{name}" for name in ("7.tmp", "8.lock", "8.tmp/part"))
    part.parent.mkdir()
    for path in (file, mark, part):
        path.touch()
        os.utime(path, (0, time.time() - days * 24 * 3600))
    os.utime(part.parent, (0, 0))
    return [file, mark, part]


def test_files_of_another_machine_stay_for_a_day_since_locks_may_be_local(tmp_path: Path) -> None:
    recent = leftovers_of_another_machine(tmp_path, 0.9)
    os.utime(recent[1], (0, 0))  # the folder was written to since
    sweep(tmp_path)
    assert all(path.exists() for path in recent)


def test_files_of_another_machine_are_removed_after_a_day(tmp_path: Path) -> None:
    leftovers_of_another_machine(tmp_path, 1.1)
    sweep(tmp_path)
    assert os.listdir(tmp_path) == []


def test_nothing_is_removed_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = tmp_path / f".a.{MACHINE}-01234567.tmp"
    leftover.touch()

    def without(file: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", without)
    write_text(tmp_path / "b", "written all the same")
    assert leftover.exists() and (tmp_path / "b").read_text() == "written all the same"


def test_a_file_removed_before_it_was_locked_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, removed = fcntl.flock, list[Path]()

    def late(file: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.glob(".*.tmp"))
            removed[0].unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write_text(tmp_path / "a", "complete")
    assert removed and os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "complete"


def test_files_with_names_similar_to_leftovers_are_kept(tmp_path: Path) -> None:
    names = {".a.01234567.tmp", ".01234567-01234567.tmp", "a.01234567-01234567.tmp", ".a.01234567-01234567.tmp.txt"}
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path)
    assert set(os.listdir(tmp_path)) == names


def test_a_link_with_the_name_of_a_leftover_is_kept_with_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / f".a.{MACHINE}-01234567.tmp").symlink_to(tmp_path / "target")
    sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 2


def test_a_temporary_folder_is_private_and_removed(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "a") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700 and folder.parent == tmp_path
    assert os.listdir(tmp_path) == []


def test_a_file_stays_locked_until_it_has_its_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def swept_before(source: Path, target: Path) -> None:
        sweep(tmp_path)
        replace(source, target)

    monkeypatch.setattr(os, "replace", swept_before)
    atomic_write(tmp_path / "a", lambda file: file.write(b"complete"))
    assert (tmp_path / "a").read_bytes() == b"complete"

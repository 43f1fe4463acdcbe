import errno
import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.files import is_locked, lock, try_lock


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes flock behave as on NFS, where exclusive locks require a writable file."""
    flock = fcntl.flock

    def emulated(file: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr("ldm.files.fcntl.flock", emulated)


def test_a_folder_is_locked_while_its_lock_is_open(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    held = try_lock(tmp_path)
    assert held is not None and is_locked(tmp_path) and try_lock(tmp_path) is None
    os.close(held)
    assert not is_locked(tmp_path)


def test_locks_work_on_nfs(tmp_path: Path, nfs: None) -> None:
    test_a_folder_is_locked_while_its_lock_is_open(tmp_path)


def test_the_lock_of_a_file_that_may_only_be_read_is_seen(
    tmp_path: Path, nfs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, opened = lock(tmp_path), os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, mode)

    monkeypatch.setattr("ldm.files.os.open", read_only)
    assert is_locked(tmp_path)
    os.close(held)
    assert not is_locked(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def without(file: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("ldm.files.fcntl.flock", without)
    for work in (lock, try_lock, is_locked):
        (tmp_path / ".lock").touch()
        with pytest.raises(OSError, match=rf"cannot lock {re.escape(str(tmp_path))}/\.lock .*mount it with them"):
            work(tmp_path)


@pytest.mark.parametrize("call", [is_locked, try_lock, lock])
def test_another_error_of_a_lock_names_the_file_too(
    tmp_path: Path, call: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.close(lock(tmp_path))

    def failing(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("ldm.files.fcntl.flock", failing)
    with pytest.raises(OSError, match=rf"cannot lock: Input/output error: '{tmp_path}/\.lock'") as raised:
        call(tmp_path)
    assert raised.value.errno == errno.EIO

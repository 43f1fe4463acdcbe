"""Atomic writing of files and folders, and locks on folders."""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

LOCK = ".lock"  # the file in a folder that a process locks while it works there
ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EFBIG: "the file exceeds the size limit there; give another disk, or raise ulimit -f",
}
# Errors of flock on Lustre mounted without -o flock, on NFS without its lock service, and on some FUSE file systems.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def atomic_write(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` with a temporary file beside `path`, then flushes, fsyncs and renames it to `path`.

    Missing parent folders are created. On any failure the old file at `path` stays and the temporary one is removed.
    Raises OSError with a one-sentence message if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; give the path of a file")
    temporary = _beside(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, "xb")  # noqa: SIM115 - closed below, where errors raised by `write` are handled apart
    except OSError as error:
        raise write_error(error, path) from error
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in ADVICE:
            raise write_error(error, path) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that replaces `path` when the block ends.

    An existing folder at `path` is renamed first and removed last, so that a complete folder is always in place or can
    be restored; if the old one cannot be removed, a warning says where it is. `recover_folder` cleans up after a
    process that was killed in between. Raises OSError as `atomic_write` does.
    """
    new = _beside(path, "tmp")
    old, mark = new.with_suffix(".old"), new.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(mark)
        try:
            new.mkdir()
            yield new
            if os.path.lexists(path):
                path.rename(old)
            new.rename(path)
        finally:
            _tidy(path, new, old)
            mark.unlink(missing_ok=True)
            os.close(descriptor)
    except OSError as error:
        if error.errno in ADVICE:
            raise write_error(error, path) from error
        raise


def recover_folder(path: Path) -> None:
    """Cleans up after processes that were killed while they wrote a folder at `path`.

    The old folder is restored if the new one had not replaced it yet; everything else that they left is removed.
    """
    for mark in leftovers(path.parent, path.name[:200].__eq__, "lock"):
        if not _is_locked(mark):
            _tidy(path, mark.with_suffix(".tmp"), mark.with_suffix(".old"))
            mark.unlink(missing_ok=True)


def _tidy(path: Path, new: Path, old: Path) -> None:
    """Keeps the one complete folder, whichever step between writing `new` and removing `old` was reached."""
    if os.path.lexists(old) and not os.path.lexists(path):
        old.rename(path)
    elif os.path.lexists(old) and new.exists():
        warnings.warn(
            f"something else was created at {path} while it was being replaced; its former content is in {old}",
            stacklevel=2,
        )
    elif os.path.lexists(old):
        _remove(old, path)
    shutil.rmtree(new, ignore_errors=True)


def _remove(old: Path, path: Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as error:
        warnings.warn(
            f"the new {path} is complete, but {error.filename} of the old one could not be removed "
            f"({error.strerror}): its remains are in {old}; delete that folder yourself",
            stacklevel=2,
        )


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.{ending}")


def leftovers(folder: Path, is_ours: Callable[[str], object], ending: str = "tmp") -> list[Path]:
    """Returns the temporary files and folders in `folder` whose final name, cut to 200 characters, satisfies `is_ours`.

    Each is being written by a process, or was left behind by one that was killed.
    """
    pattern = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}\.{ending}")
    matches = ((path, pattern.fullmatch(path.name)) for path in folder.glob(f".*.{ending}"))
    return [path for path, match in matches if match and is_ours(match[1])]


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` atomically."""
    atomic_write(path, lambda file: file.write(data))


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def cache_home() -> Path:
    """Returns the folder for files that can be created again: ldm in $XDG_CACHE_HOME or else in ~/.cache.

    Raises RuntimeError if there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")  # the XDG specification ignores relative paths
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ldm"


def check_writable(folder: str | Path) -> None:
    """Raises OSError if files cannot be written into `folder`, which need not exist yet.

    Call it before long work, whose result would be lost otherwise.
    """
    given = Path(folder).absolute()
    existing = next(path for path in (given, *given.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write into {folder}: {existing} is not a folder; give another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {folder}: {existing} is not writable; give another folder")


def lock(folder: str | Path, shared: bool = False) -> int:
    """Waits for the lock of a folder, exclusive or shared, and returns the file descriptor to `os.close` to release it.

    The operating system releases the lock however the process ends, kill -9 included.
    """
    return _lock(Path(folder) / LOCK, shared)


def try_lock(folder: str | Path) -> int | None:
    """Like `lock`, but returns None at once if another process holds the lock."""
    path = Path(folder) / LOCK
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _lock(path: Path, shared: bool = False) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, path)
    return file


def _flock(file: int, operation: int, path: Path) -> None:
    """Calls `flock`. Raises OSError that names `path` and the remedy if the file system has no locks."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        os.close(file)
        raise OSError(
            f"cannot lock {path} ({error.strerror}): its file system has no file locks; mount it with them (Lustre: "
            "-o flock, NFS: without -o nolock and with its lock service), or choose a folder on another file system"
        ) from error


def is_locked(folder: str | Path) -> bool:
    """Returns whether a process is working in the folder; the lock of one that died does not count."""
    return _is_locked(Path(folder) / LOCK)


def _is_locked(path: Path) -> bool:
    try:
        file, operation = os.open(path, os.O_RDWR), fcntl.LOCK_EX  # NFS locks exclusively only what may be written
    except FileNotFoundError:
        return False
    except OSError:  # a file of another user, or on a read-only file system
        file, operation = os.open(path, os.O_RDONLY), fcntl.LOCK_SH
    try:
        _flock(file, operation | fcntl.LOCK_NB, path)
    except BlockingIOError:
        os.close(file)
        return True
    os.close(file)
    return False


def write_error(error: OSError, path: Path) -> OSError:
    """Returns an error of the same type with a one-sentence message that names `path`, not the temporary file."""
    renamed = type(error)(f"cannot write {path}: {ADVICE.get(error.errno or 0, error.strerror)}")
    renamed.errno = error.errno
    return renamed

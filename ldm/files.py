"""Atomic writing of files and folders, locks on folders, and removal of what killed writers left."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
SILENCE = 24 * 3600.0  # seconds without a write after which a writer on another machine counts as dead


def _machine() -> str:
    """Returns 8 hexadecimal digits of the running kernel: between its processes, locks work on every file system."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


MACHINE = _machine()
_swept: set[Path] = set()  # the folders that this process has swept


def atomic_write(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` with a temporary file beside `path`, then flushes, fsyncs and renames it to `path`.

    Missing parent folders are created, and the first write of a process to a folder sweeps it. On any failure the old
    file at `path` stays and the temporary one is removed. Raises OSError with a one-sentence message if the disk is
    full or the folder cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; give the path of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        temporary, file = _create(path, "tmp")
    except OSError as error:
        raise write_error(error, path) from error
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before the file is closed, which releases its lock
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
    try:
        with _marked(path) as (new, old):
            new.mkdir()
            yield new
            if os.path.lexists(path):
                path.rename(old)
            new.rename(path)
    except OSError as error:
        if error.errno in ADVICE:
            raise write_error(error, path) from error
        raise


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`, which only this user may read, and removes it when the block ends.

    What a killed process left is removed by the next one that writes beside `path`.
    """
    with _marked(path) as (new, _):
        new.mkdir(mode=0o700)
        yield new


@contextmanager
def _marked(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yields the names of a new and an old folder beside `path`; a locked file marks them while this process lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent)
    mark, file = _create(path, "lock", required=True)
    with file:
        new, old = mark.with_suffix(".tmp"), mark.with_suffix(".old")
        try:
            yield new, old
        finally:
            _tidy(path, new, old)
            mark.unlink(missing_ok=True)


def recover_folder(path: Path) -> None:
    """Cleans up after processes that were killed while they wrote a folder at `path`.

    The old folder is restored if the new one had not replaced it yet; everything else that they left is removed.
    """
    for mark in leftovers(path.parent, path.name[:200].__eq__, "lock"):
        _recover(mark, path)


def _recover(mark: Path, path: Path) -> None:
    with _of_dead_writer(mark) as dead:
        if dead:
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


def _create(path: Path, ending: str, required: bool = False) -> tuple[Path, BinaryIO]:
    """Creates a hidden file beside `path` and locks it until it is closed, so that no other process removes it.

    On a file system without locks the file is not locked, or OSError is raised if the lock is `required`.
    """
    while True:
        token = f"{MACHINE}-{secrets.token_hex(4)}"
        temporary = path.with_name(f".{path.name[:200]}.{token}.{ending}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _flock(descriptor, fcntl.LOCK_EX, temporary)
        except OSError:
            if required:
                temporary.unlink()
                raise
            return temporary, open(temporary, "wb")
        if os.path.exists(temporary):  # else another process removed it before it was locked
            return temporary, open(temporary, "wb", opener=lambda *_, descriptor=descriptor: descriptor)
        os.close(descriptor)


def leftovers(folder: Path, is_ours: Callable[[str], object], ending: str = "tmp") -> list[Path]:
    """Returns the temporary files and folders in `folder` whose final name, cut to 200 characters, satisfies `is_ours`.

    Each is being written by a process, or was left behind by one that was killed.
    """
    names = re.compile(rf"\.(.+)\.([0-9a-f]{{8}}-)?[0-9a-f]{{8}}\.{ending}")  # earlier versions named no machine
    matches = ((path, names.fullmatch(path.name)) for path in folder.glob(f".*.{ending}"))
    return [path for path, match in matches if match and is_ours(match[1])]


def sweep(folder: Path) -> None:
    """Removes temporary files and folders in `folder` whose writers were certainly killed, and restores old folders.

    A living writer holds the lock of its file. Where locks are local to a machine, the file of another machine must
    not have changed for a day either. What is not certain, such as without locks, stays.
    """
    _swept.add(folder.resolve())
    for name in os.listdir(folder):
        if match := re.fullmatch(r"\.(.+)\.[0-9a-f]{8}-[0-9a-f]{8}\.(tmp|lock)", name):
            path = folder / name
            if match[2] == "lock" and len(match[1]) < 200:  # else the final name is not known
                _recover(path, folder / match[1])
            elif match[2] == "tmp":
                with _of_dead_writer(path) as dead:
                    if dead:
                        path.unlink(missing_ok=True)


def _sweep_once(folder: Path) -> None:
    if folder.resolve() not in _swept:
        with suppress(OSError):  # leftovers, such as of another user, do not prevent this process from writing
            sweep(folder)


@contextmanager
def _of_dead_writer(path: Path) -> Iterator[bool]:
    """Yields whether the writer of a temporary file, or of the folder that it marks, is dead; holds its lock if so."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)  # fails for a folder, which has a mark of its own
    except OSError:
        yield False
        return
    try:
        _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
    except OSError:
        yield False
        return
    try:
        machine = re.search(r"\.([0-9a-f]{8})-[0-9a-f]{8}\.\w+$", path.name)  # absent in names of earlier versions
        yield machine is None or machine[1] == MACHINE or time.time() - _last_write(path) > SILENCE
    finally:
        os.close(file)


def _last_write(path: Path) -> float:
    """Returns when a temporary file, or the folder that it marks, was last changed."""
    changed = [path, *path.with_suffix(".tmp").rglob("*")] if path.suffix == ".lock" else [path]
    return max((file.lstat().st_mtime for file in changed if os.path.lexists(file)), default=0.0)


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
        return None
    return file


def _lock(path: Path, shared: bool = False) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, path)
    return file


def _flock(file: int, operation: int, path: Path) -> None:
    """Calls `flock`, and closes the file if that fails.

    Raises BlockingIOError if another process holds the lock, and else OSError that names `path`, and the remedy if the
    file system has no locks.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, f"cannot lock: {error.strerror}", str(path)) from error
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
        return True
    os.close(file)
    return False


def write_error(error: OSError, path: Path) -> OSError:
    """Returns an error of the same type with a one-sentence message that names `path`, not the temporary file."""
    renamed = type(error)(f"cannot write {path}: {ADVICE.get(error.errno or 0, error.strerror)}")
    renamed.errno = error.errno
    return renamed

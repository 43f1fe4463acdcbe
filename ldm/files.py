"""Files and folders that are either there in full or not there at all, and locks on folders."""

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

LOCK = ".lock"  # in a folder: who works in it holds a lock on this file
ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EFBIG: "no file may be as large there; give another disk, or raise ulimit -f",
}


def atomic_write(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Give `write` a temporary file beside `path`; flush, fsync and rename it to `path` once it returns.

    Missing parent folders are made. On any failure the old file at `path` stays and the temporary one goes.
    Raises OSError in one sentence when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; give the path of a file")
    temporary = _beside(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, "xb")  # noqa: SIM115 - closed below, where errors of `write` are told apart
    except OSError as error:
        raise named(error, path) from error
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in ADVICE:
            raise named(error, path) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place once the block ends.

    A folder at `path` is renamed first and removed last, so that one of the two is in place or can be put there,
    whatever fails; a warning says where the old one is if it cannot be removed. What a process leaves that is killed
    in between is for `recover_folder`. Raises OSError as `atomic_write` does.
    """
    new = _beside(path, "tmp")
    old, mark = new.with_suffix(".old"), new.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = _lock(mark)
        try:
            new.mkdir()
            yield new
            if os.path.lexists(path):
                path.rename(old)
            new.rename(path)
        finally:
            _tidy(path, new, old)
            mark.unlink(missing_ok=True)
            os.close(held)
    except OSError as error:
        if error.errno in ADVICE:
            raise named(error, path) from error
        raise


def recover_folder(path: Path) -> None:
    """Tidy up after processes that were killed while they wrote a folder at `path`.

    The old folder is put back where the new one had not taken its place; all else that they left is removed.
    """
    for mark in leftovers(path.parent, path.name[:200].__eq__, "lock"):
        if not _is_locked(mark):
            _tidy(path, mark.with_suffix(".tmp"), mark.with_suffix(".old"))
            mark.unlink(missing_ok=True)


def _tidy(path: Path, new: Path, old: Path) -> None:
    """Keep the one complete folder, whichever step between writing `new` and removing `old` was the last."""
    if os.path.lexists(old) and not os.path.lexists(path):
        old.rename(path)
    elif os.path.lexists(old) and new.exists():
        warnings.warn(f"{path} was taken while it was replaced; what was there before is in {old}", stacklevel=2)
    elif os.path.lexists(old):
        _remove(old, path)
    shutil.rmtree(new, ignore_errors=True)


def _remove(old: Path, path: Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as error:
        warnings.warn(
            f"the new {path} is complete, but of the old one {error.filename} could not be removed "
            f"({error.strerror}): what is left of it is in {old}; delete that folder yourself",
            stacklevel=2,
        )


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.{ending}")


def leftovers(folder: Path, is_ours: Callable[[str], object], ending: str = "tmp") -> list[Path]:
    """The temporary files and folders in `folder` for what has a name that `is_ours`, cut to 200 characters.

    A process is writing them, or was killed while it did.
    """
    pattern = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}\.{ending}")
    matches = ((path, pattern.fullmatch(path.name)) for path in folder.glob(f".*.{ending}"))
    return [path for path, match in matches if match and is_ours(match[1])]


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` atomically."""
    atomic_write(path, lambda file: file.write(data))


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_writable(folder: str | Path) -> None:
    """Before hours of work: raises OSError where files cannot be written into a folder, which may not be there yet."""
    given = Path(folder).absolute()
    there = next(path for path in (given, *given.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"cannot write into {folder}: {there} is no folder; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {folder}: {there} is read-only here; give another folder")


def lock(folder: str | Path, shared: bool = False) -> int:
    """Takes the lock of a folder, once no other process has it, or only shares it; gives what `os.close` lets go of it.

    The system lets go of it however the process ends, kill -9 included.
    """
    return _lock(Path(folder) / LOCK, shared)


def try_lock(folder: str | Path) -> int | None:
    """As `lock`, but returns None at once if another process holds the lock."""
    file = os.open(Path(folder) / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _lock(path: Path, shared: bool = False) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    return file


def is_locked(folder: str | Path) -> bool:
    """Whether a process works in the folder now; the lock of one that died is gone with it."""
    return _is_locked(Path(folder) / LOCK)


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def named(error: OSError, path: Path) -> OSError:
    """The same kind of error as one sentence that names the file asked for, not the temporary one."""
    told = type(error)(f"cannot write {path}: {ADVICE.get(error.errno or 0, error.strerror)}")
    told.errno = error.errno
    return told

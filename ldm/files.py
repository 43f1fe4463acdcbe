"""Files that are either there in full or not there at all."""

import errno
import fcntl
import json
import os
import secrets
import shutil
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
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
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
    """A temporary folder beside `path` that becomes it, in place of what was there, once the block ends.

    On any failure the old folder stays and the temporary one goes. Raises OSError as `atomic_write` does.
    """
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        if error.errno in ADVICE:
            raise named(error, path) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    data = text.encode()
    atomic_write(path, lambda file: file.write(data))


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
    file = os.open(Path(folder) / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    return file


def is_locked(folder: str | Path) -> bool:
    """Whether a process works in the folder now; the lock of one that died is gone with it."""
    try:
        with open(Path(folder) / LOCK, "rb") as file:
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

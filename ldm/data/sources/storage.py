"""Reads files on disk and in object storage, sequentially or by byte ranges, with retries."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import fsspec
from fsspec import AbstractFileSystem

Result = TypeVar("Result")
TRIES = 4  # of a read from object storage, with pauses of 1, 2 and 4 seconds between them
READ_AHEAD = 8 << 20  # bytes per request of a sequential read
GAP = 64 << 10  # bytes; reading this many unneeded bytes costs less than another request


class Unreachable(OSError):
    """Raised if object storage does not answer in `TRIES` attempts."""


@dataclass(frozen=True)
class File:
    """A path or protocol://address, with its size in bytes and a stamp that changes with the content."""

    url: str
    size: int
    stamp: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.partition("?")[0].rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".tar")

    @property
    def path(self) -> Path | None:
        """The path of a file on disk, None for object storage."""
        return None if "://" in self.url else Path(self.url)

    def open(self) -> BinaryIO:
        """Opens the file for sequential reading; object storage is read in requests of `READ_AHEAD` bytes."""
        if self.path:
            return open(self.path, "rb")
        filesystem = self._filesystem()
        return cast(BinaryIO, filesystem.open(self.url, "rb", block_size=READ_AHEAD, cache_type="readahead"))

    def read(self, *spans: tuple[int, int]) -> list[bytes]:
        """Returns the bytes of each (offset, size); adjacent ranges in object storage take a single request.

        Raises OSError with the file's name if it cannot be read, for object storage after `TRIES` attempts.
        """
        if "://" not in self.url:
            # Opened on every read, which takes 10 µs, because descriptors cannot be pickled for spawned workers.
            with open(self.url, "rb") as file:
                return [os.pread(file.fileno(), size, offset) for offset, size in spans]
        first, last = min(offset for offset, _ in spans), max(offset + size for offset, size in spans)
        if last - first > sum(size for _, size in spans) + GAP:
            return [self.read(span)[0] for span in spans]
        data = self.with_retries(lambda: self._range(first, last))
        return [data[offset - first : offset - first + size] for offset, size in spans]

    def with_retries(self, work: Callable[[], Result]) -> Result:
        """Returns `work()`, which reads this file, with the retries of `with_retries` for object storage."""
        return work() if self.path else with_retries(work, self.url, self._filesystem())

    def _range(self, first: int, last: int) -> bytes:
        # Keyword arguments, because s3fs has another order of parameters.
        data = cast(bytes, self._filesystem().cat_file(self.url, start=first, end=last))
        if len(data) != last - first:
            raise OSError(f"received {len(data)} bytes instead of the {last - first} requested")
        return data

    def _filesystem(self) -> AbstractFileSystem:
        return _filesystem(self.url.partition("://")[0], os.getpid())


@lru_cache
def _filesystem(protocol: str, process: int) -> AbstractFileSystem:
    """Returns one file system per process, because connections must not be shared with forked processes.

    fsspec itself would create one per thread.
    """
    return fsspec.filesystem(protocol)


def summary(files: Sequence[File]) -> str:
    """Returns a human-readable summary: the first file and the number of others."""
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def local_file(path: str | Path) -> File:
    """Returns the file at `path`. Raises FileNotFoundError if it does not exist."""
    stat = os.stat(path)
    return File(str(path), stat.st_size, str(stat.st_mtime_ns))


def remote_files(url: str) -> list[File]:
    """Returns the .tar at an address, or those that match a pattern or are in a folder, sorted by name.

    Raises ValueError for an address that cannot be opened, and OSError if the storage does not answer.
    """
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {url}: {in_one_line(error)}") from error
    if is_local(filesystem):
        raise ValueError(f"{url} is a file on this machine: give its path {path}")
    pattern = any(letter in path for letter in "*?[") and not url.startswith("http")
    if path.endswith(".tar") and not pattern:
        found: dict[str, dict] = {path: {}}
    else:
        folder = path if pattern or "*" in path else f"{path.rstrip('/')}/*.tar"
        found = with_retries(lambda: dict(filesystem.glob(folder, detail=True)), url, filesystem)
    return [_file(filesystem, path, found[path]) for path in sorted(found)]


def _file(filesystem: AbstractFileSystem, path: str, listed: dict) -> File:
    """Returns a file with the size and stamp of the listing, or of a request for the file if the listing has none."""
    address = filesystem.unstrip_protocol(path)
    info = listed if listed.get("size") else with_retries(lambda: filesystem.info(path), address, filesystem)
    if info.get("size") is None:
        raise OSError(f"{address} has no known size: the server must send Content-Length and accept range requests")
    marks = [str(info[name]) for name in ("ETag", "etag", "LastModified", "last_modified", "created") if name in info]
    return File(address, int(info["size"]), " ".join(marks))


def with_retries(work: Callable[[], Result], what: str, filesystem: AbstractFileSystem) -> Result:
    """Returns `work()`, retried after network errors if it reads object storage.

    Raises Unreachable with the name `what` after `TRIES` attempts. ValueError, which reports invalid content, and
    programming errors are not retried.
    """
    for attempt in range(TRIES):
        try:
            return work()
        except (FileNotFoundError, PermissionError) as error:
            if is_local(filesystem):
                raise
            raise type(error)(f"{what} does not exist or is not readable: {in_one_line(error)}") from error
        except Exception as error:  # because each storage library has its own exceptions
            if is_local(filesystem) or isinstance(
                error, (ValueError, TypeError, LookupError, AttributeError, MemoryError)
            ):
                raise
            if attempt == TRIES - 1:
                raise Unreachable(f"{what} could not be read in {TRIES} attempts: {in_one_line(error)}") from error
            time.sleep(2**attempt)
    raise AssertionError


def is_local(filesystem: AbstractFileSystem) -> bool:
    return protocol(filesystem) in ("file", "local")


def protocol(filesystem: AbstractFileSystem) -> str:
    names = filesystem.protocol
    return names if isinstance(names, str) else str(names[0])


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Files on disk and in object storage: opened from end to end, or read a range at a time."""

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
TRIES = 4  # of a read from object storage, the pauses between them doubling from one second
READ_AHEAD = 8 << 20  # bytes a request, where a file is read from end to end
GAP = 64 << 10  # bytes; a request costs more than reading over so many that nobody asked for


class Unreachable(OSError):
    """Object storage gave no answer in `TRIES`."""


@dataclass(frozen=True)
class File:
    """A path or protocol://address, with the size in bytes and a stamp that changes with the content."""

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
        """Where it lies on disk, if it does."""
        return None if "://" in self.url else Path(self.url)

    def open(self) -> BinaryIO:
        """For reading from the start to the end; from object storage `READ_AHEAD` bytes at a time."""
        if self.path:
            return open(self.path, "rb")
        filesystem = self._filesystem()
        return cast(BinaryIO, filesystem.open(self.url, "rb", block_size=READ_AHEAD, cache_type="readahead"))

    def read(self, *spans: tuple[int, int]) -> list[bytes]:
        """The bytes of each (offset, size); in object storage one request where they lie side by side.

        Raises OSError that names the file where it cannot be read, there after `TRIES` attempts.
        """
        if "://" not in self.url:
            # Opened anew each time: a descriptor would not survive pickling into a spawned worker, and costs 10 µs.
            with open(self.url, "rb") as file:
                return [os.pread(file.fileno(), size, offset) for offset, size in spans]
        first, last = min(offset for offset, _ in spans), max(offset + size for offset, size in spans)
        if last - first > sum(size for _, size in spans) + GAP:
            return [self.read(span)[0] for span in spans]
        data = self.with_retries(lambda: self._range(first, last))
        return [data[offset - first : offset - first + size] for offset, size in spans]

    def with_retries(self, work: Callable[[], Result]) -> Result:
        """`work()`, which reads this file; see `with_retries` where it lies in object storage."""
        return work() if self.path else with_retries(work, self.url, self._filesystem())

    def _range(self, first: int, last: int) -> bytes:
        data = cast(bytes, self._filesystem().cat_file(self.url, start=first, end=last))  # s3fs has another order
        if len(data) != last - first:
            raise OSError(f"{len(data)} bytes came where {last - first} were asked for")
        return data

    def _filesystem(self) -> AbstractFileSystem:
        return _filesystem(self.url.partition("://")[0], os.getpid())


@lru_cache
def _filesystem(protocol: str, process: int) -> AbstractFileSystem:
    """One a process, for it holds connections, which a fork must not share; fsspec itself would make one a thread."""
    return fsspec.filesystem(protocol)


def summary(files: Sequence[File]) -> str:
    """The first, and how many more, for people."""
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def local_file(path: str | Path) -> File:
    """FileNotFoundError if there is none."""
    stat = os.stat(path)
    return File(str(path), stat.st_size, str(stat.st_mtime_ns))


def remote_files(url: str) -> list[File]:
    """The .tar at the address, those that match the pattern, or those of the folder, by name.

    ValueError for an address that cannot be opened; OSError where the storage does not answer.
    """
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {url}: {in_one_line(error)}") from error
    if is_local(filesystem):
        raise ValueError(f"{url} is a file on this machine: give its path, {path}")
    pattern = any(letter in path for letter in "*?[") and not url.startswith("http")
    if path.endswith(".tar") and not pattern:
        found: dict[str, dict] = {path: {}}
    else:
        folder = path if pattern or "*" in path else f"{path.rstrip('/')}/*.tar"
        found = with_retries(lambda: dict(filesystem.glob(folder, detail=True)), url, filesystem)
    return [_file(filesystem, path, found[path]) for path in sorted(found)]


def _file(filesystem: AbstractFileSystem, path: str, listed: dict) -> File:
    """What the listing says, or else the file itself; its stamp is whatever the storage has for one."""
    address = filesystem.unstrip_protocol(path)
    info = listed if listed.get("size") else with_retries(lambda: filesystem.info(path), address, filesystem)
    if info.get("size") is None:
        raise OSError(f"{address} does not say how long it is: the server must give Content-Length and take ranges")
    marks = [str(info[name]) for name in ("ETag", "etag", "LastModified", "last_modified", "created") if name in info]
    return File(address, int(info["size"]), " ".join(marks))


def with_retries(work: Callable[[], Result], what: str, filesystem: AbstractFileSystem) -> Result:
    """`work()`; on object storage again after errors of the network, then Unreachable, naming `what`.

    ValueError is of the content and passes, as do errors of the program.
    """
    for attempt in range(TRIES):
        try:
            return work()
        except (FileNotFoundError, PermissionError) as error:
            if is_local(filesystem):
                raise
            raise type(error)(f"{what} is not there or may not be read: {in_one_line(error)}") from error
        except Exception as error:  # each storage's library has its own errors
            if is_local(filesystem) or isinstance(
                error, (ValueError, TypeError, LookupError, AttributeError, MemoryError)
            ):
                raise
            if attempt == TRIES - 1:
                raise Unreachable(f"{what} could not be read in {TRIES} tries: {in_one_line(error)}") from error
            time.sleep(2**attempt)
    raise AssertionError


def is_local(filesystem: AbstractFileSystem) -> bool:
    return protocol(filesystem) in ("file", "local")


def protocol(filesystem: AbstractFileSystem) -> str:
    names = filesystem.protocol
    return names if isinstance(names, str) else str(names[0])


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Shards on disk and in object storage: in memory, and on a web server on loopback that fails on request."""

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import DataLoader

from ldm.data.loading.datamodule import DataModule, collate
from ldm.data.sources.shards import Shards, find_tars
from ldm.data.sources.storage import TRIES, with_retries
from ldm.data.sources.tolerant import Tolerant
from tests.data.tars import samples, write_tar


class Storage(http.server.SimpleHTTPRequestHandler):
    """A file server that accepts ranges; it answers 503 to the next `failures` range requests."""

    failures, short, requests = 0, False, list[str]()

    def do_GET(self) -> None:
        data, span = Path(self.translate_path(self.path)), self.headers.get("Range", "")
        type(self).requests.append(f"{data.name} {span}")
        if not data.is_file():
            return self.send_error(404)
        if type(self).failures and span:
            type(self).failures -= 1
            return self.send_error(503)
        content = data.read_bytes()
        first, last = (int(n) for n in span.removeprefix("bytes=").split("-")) if span else (0, len(content) - 1)
        body = content[first : last + 1][: 10 if type(self).short else None]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(body)
        return None

    def send_head(self):  # type: ignore[no-untyped-def]
        """Announces range requests, for HEAD too."""
        data = Path(self.translate_path(self.path))
        if not data.is_file():
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(data.stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("ldm.data.sources.storage.time.sleep", lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = tmp_path / "shards"
    shards.mkdir()
    for k, count in enumerate((4, 3)):
        write_tar(shards / f"x-{k}.tar", samples(count, 4 * k))
    return shards


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    Storage.failures, Storage.short, Storage.requests = 0, False, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Storage, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        filesystem.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    filesystem.rm("/bucket", recursive=True)


def assert_same(one: Shards, other: Shards) -> None:
    assert len(one) == len(other)
    for k in range(len(one)):
        a, b = one[k], other[k]
        assert torch.equal(a.pop("image"), b.pop("image")) and a == b  # type: ignore[misc]


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/*.tar", "{}/x-{{0..1}}.tar"])
def test_a_bucket_a_pattern_and_braces_give_the_samples_of_the_folder(spelling: str, memory: str, folder: Path) -> None:
    assert_same(Shards(spelling.format(memory), 8), Shards(folder, 8))


def test_each_sample_on_a_web_server_is_read_in_one_request(web: str, folder: Path) -> None:
    shards = Shards(web + "/x-{0..1}.tar", 8)
    assert [file.name for file in shards.files] == ["x-0.tar", "x-1.tar"]
    assert_same(shards, Shards(folder, 8))
    Storage.requests.clear()
    shards[5]
    (request,) = Storage.requests
    first, last = map(int, request.removeprefix("x-1.tar bytes=").split("-"))
    assert last - first < 2048  # image, header and caption; the shard has 10 KiB


def test_the_index_is_cached_so_that_a_second_start_reads_no_shard(web: str, tmp_path: Path) -> None:
    url = web + "/x-{0..1}.tar"
    Shards(url, 8)
    Storage.requests.clear()
    assert len(Shards(url, 8)) == 7
    assert not Storage.requests and list((tmp_path / "home").rglob("*.safetensors"))


def test_ranges_are_passed_to_storage_by_keyword_as_s3fs_requires(
    memory: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MemoryFileSystem.cat_file

    def as_in_s3fs(self: Any, path: str, version_id: Any = None, start: Any = None, end: Any = None) -> bytes:
        assert version_id is None
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", as_in_s3fs)
    assert_same(Shards(memory, 8), Shards(folder, 8))


def test_a_temporary_error_is_retried(web: str) -> None:
    shards = Shards(web + "/x-0.tar", 8)
    Storage.failures = TRIES - 1
    assert shards[1]["key"] == "0001"


def test_a_permanent_error_is_reported_and_the_sample_replaced(web: str) -> None:
    shards = Shards(web + "/x-0.tar", 8)
    Storage.failures = TRIES
    with pytest.raises(OSError, match=rf"{web}/x-0.tar could not be read in {TRIES} attempts: 503"):
        shards[1]
    Storage.failures = TRIES
    sample = Tolerant(shards)[1]
    assert sample["key"] == "0002" and "503" in sample["bad"][0]


def test_a_response_shorter_than_requested_is_an_error(web: str) -> None:
    shards = Shards(web + "/x-0.tar", 8)
    Storage.short = True
    with pytest.raises(OSError, match="received 10 bytes instead of"):
        shards[0]


def test_forked_workers_read_a_batch_with_several_threads(web: str, folder: Path) -> None:
    Shards(web + "/x-0.tar", 8)[0]  # connections of the main process, which the workers must not use
    module = DataModule(Tolerant(Shards(web + "/x-{0..1}.tar", 8)), {}, 3, workers=1, readers=3)  # type: ignore[arg-type]
    here = DataModule(Tolerant(Shards(folder, 8)), {}, 3)  # type: ignore[arg-type]
    for far, near in zip(module.train_dataloader(), here.train_dataloader(), strict=True):
        assert torch.equal(far.pop("image"), near.pop("image"))
        assert torch.equal(far.pop("id"), near.pop("id")) and far["bad"] == [[]] * 3


def test_files_in_object_storage_are_read_by_their_address(memory: str) -> None:
    files = find_tars(memory)
    assert [file.url for file in files] == ["memory:///bucket/x-0.tar", "memory:///bucket/x-1.tar"]
    batch = next(iter(DataLoader(Shards(memory, 8), batch_size=7, collate_fn=collate)))
    assert batch["key"] == [f"{k:04d}" for k in range(7)]


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("memory://nothing", FileNotFoundError, "no shards at memory://nothing"),
        ("memory://nothing/x.tar", FileNotFoundError, "x.tar"),
        ("nowhere://x.tar", ValueError, "cannot open nowhere://x.tar"),
        ("file:///tmp/x.tar", ValueError, "is a file on this machine: give its path /tmp/x.tar"),
    ],
)
def test_missing_shards_and_unknown_protocols_are_refused(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Shards(url, 8)


def test_reads_from_object_storage_are_retried_and_then_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("ldm.data.sources.storage.time.sleep", waits.append)
    tries = iter([OSError("reset"), RuntimeError("an error of the storage's own library"), None])

    def read() -> int:
        if error := next(tries):
            raise error
        return 7

    assert with_retries(read, "s3://b/x", fsspec.filesystem("memory")) == 7 and waits == [1, 2]

    def broken() -> int:
        raise OSError("connection reset")

    with pytest.raises(OSError, match=r"s3://b/x could not be read in 4 attempts: connection reset"):
        with_retries(broken, "s3://b/x", fsspec.filesystem("memory"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("no such key"), "s3://b/x does not exist or is not readable: no such key"),
        (PermissionError("Forbidden"), "s3://b/x does not exist or is not readable: Forbidden"),
        (ValueError("x is not an uncompressed tar"), "^x is not an uncompressed tar$"),
    ],
)
def test_errors_that_retrying_cannot_fix_are_raised_immediately(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.data.sources.storage.time.sleep", lambda _: pytest.fail("it waited"))

    def broken() -> int:
        raise error

    with pytest.raises(type(error), match=message):
        with_retries(broken, "s3://b/x", fsspec.filesystem("memory"))

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.metadata.tables import Source, find, open_sources, salvaged, sampled
from tests.data.dumps import dump


def names(files: list) -> list[str]:
    return [Path(path).name for _, path in files]


def opened(path: Path) -> Source:
    return open_sources(find([str(path)]))[0][0]


def test_a_folder_is_all_of_its_parquet_by_name_at_any_depth(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "data/train-0.parquet", "_temporary.parquet", ".hidden.parquet"):
        dump(tmp_path / name, {})
    (tmp_path / "README.md").write_text("x")
    assert names(find([str(tmp_path)])) == ["a.parquet", "b.parquet", "train-0.parquet"]


def test_files_and_globs_come_in_the_order_given(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b1"):
        dump(tmp_path / f"{name}.parquet", {})
    assert names(find([str(tmp_path / "b1.parquet"), str(tmp_path / "a*.parquet")])) == [
        "b1.parquet",
        "a1.parquet",
        "a2.parquet",
    ]


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", {})
    with pytest.raises(ValueError, match="given twice"):
        find([str(file), str(tmp_path)])


@pytest.mark.parametrize("given", ["nowhere", "nowhere/*.parquet"])
def test_nothing_there_is_said(given: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no parquet file at .*nowhere"):
        find([str(tmp_path / given)])


@pytest.mark.parametrize("given", ["pipe:cat /etc/passwd", "pipe://x.parquet", "nothing://x.parquet"])
def test_an_address_of_no_known_kind_is_refused(given: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)):
        find([given])


def test_object_storage_is_read_as_files_are(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/dump/a.parquet", dump(tmp_path / "a.parquet", {}, {}).read_bytes())
    sources, damaged = open_sources(find(["memory://dump/"]))
    assert [s.rows for s in sources] == [2] and not damaged and sources[0].address == "memory:///dump/a.parquet"


def test_a_file_cut_short_is_damaged_and_the_others_are_read(tmp_path: Path) -> None:
    whole = dump(tmp_path / "a.parquet", {}, {})
    (tmp_path / "b.parquet").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "c.parquet").write_bytes(b"")
    sources, damaged = open_sources(find([str(tmp_path)]))
    assert [s.rows for s in sources] == [2]
    assert [Path(d.path).name for d in damaged] == ["b.parquet", "c.parquet"]


def spoilt_group(path: Path, group: int) -> Path:
    """The first page of a row group's first column overwritten."""
    at = pq.ParquetFile(path).metadata.row_group(group).column(0)
    start = at.dictionary_page_offset or at.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 24] = b"\xff" * 24
    path.write_bytes(data)
    return path


def test_of_a_damaged_file_the_whole_row_groups_are_mended_in_order(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", *[{"WIDTH": i} for i in range(9)], row_group_size=3)
    copy, lost, _ = salvaged(opened(spoilt_group(file, 1)), ["URL", "WIDTH"], tmp_path / "out.parquet")
    assert pq.read_table(copy.path)["WIDTH"].to_pylist() == [0, 1, 2, 6, 7, 8] and copy.rows == 6
    assert [(d.path, d.rows) for d in lost] == [(str(file), 3)] and all(d.reason for d in lost)


def test_texts_of_a_wrong_encoding_become_null_and_are_counted(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xe9t\xe9 latin-1", None, "été".encode()], pa.binary()).view(pa.string())
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"TEXT": texts}), file)
    copy, lost, spoilt = salvaged(opened(file), ["TEXT"], tmp_path / "out.parquet")
    assert pq.read_table(copy.path)["TEXT"].to_pylist() == ["good", None, None, "été"]
    assert spoilt == {"TEXT": 1} and not lost


def test_a_sample_takes_from_all_over_the_files(tmp_path: Path) -> None:
    for i in range(4):
        dump(tmp_path / f"{i}.parquet", *[{"WIDTH": 100 * i + j} for j in range(50)])
    sources, _ = open_sources(find([str(tmp_path)]))
    sample = sampled(sources, ["WIDTH"], 20, tmp_path / "sample")
    assert pq.read_table(sample.path)["WIDTH"].to_pylist() == [100 * i + j for i in range(4) for j in range(5)]
    assert sample.rows == 20


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that answers range requests, as object storage does."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        asked = self.headers.get("Range")
        first, last = (int(x) for x in asked.removeprefix("bytes=").split("-")) if asked else (0, len(data) - 1)
        body = data[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_metadata_is_read_over_http(tmp_path: Path, server: str) -> None:
    dump(tmp_path / "a.parquet", {}, {}, {})
    assert [s.rows for s in open_sources(find([f"{server}/a.parquet"]))[0]] == [3]

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.metadata.tables import Source, find, open_sources, salvage, sample_rows
from tests.data.dumps import dump


def names(files: list) -> list[str]:
    return [Path(path).name for _, path in files]


def opened(path: Path) -> Source:
    return open_sources(find([str(path)]))[0][0]


def test_parquet_files_are_found_in_subfolders_and_sorted(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "data/train-0.parquet", "_temporary.parquet", ".hidden.parquet"):
        dump(tmp_path / name, {})
    (tmp_path / "README.md").write_text("x")
    assert names(find([str(tmp_path)])) == ["a.parquet", "b.parquet", "train-0.parquet"]


def test_files_and_globs_keep_the_given_order(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b1"):
        dump(tmp_path / f"{name}.parquet", {})
    assert names(find([str(tmp_path / "b1.parquet"), str(tmp_path / "a*.parquet")])) == [
        "b1.parquet",
        "a1.parquet",
        "a2.parquet",
    ]


@pytest.mark.parametrize("name", ["a [v2]", "what?", "5* images", "[]"])
def test_a_folder_with_a_name_like_a_pattern_is_found(name: str, tmp_path: Path) -> None:
    dump(tmp_path / name / "a.parquet", {})
    (tmp_path / "a v").mkdir()  # matches the pattern "a [v2]"
    assert names(find([str(tmp_path / name)])) == ["a.parquet"]


def test_text_tables_count_only_without_parquet_files(tmp_path: Path) -> None:
    for name in ("b.tsv", "a.csv.gz", "c.JSONL", "notes.txt"):
        (tmp_path / name).write_text("x")
    assert names(find([str(tmp_path)])) == ["a.csv.gz", "b.tsv", "c.JSONL"]
    dump(tmp_path / "z.parquet", {})
    assert names(find([str(tmp_path)])) == ["z.parquet"]


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", {})
    with pytest.raises(ValueError, match="given twice"):
        find([str(file), str(tmp_path)])


@pytest.mark.parametrize("given", ["nowhere", "nowhere/*.parquet"])
def test_an_input_without_parquet_files_is_refused(given: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metadata file at .*nowhere"):
        find([str(tmp_path / given)])


@pytest.mark.parametrize("given", ["pipe:cat /etc/passwd", "pipe://x.parquet", "nothing://x.parquet"])
def test_an_address_with_an_unknown_protocol_is_refused(given: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)):
        find([given])


def test_object_storage_is_read_like_local_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/dump/a.parquet", dump(tmp_path / "a.parquet", {}, {}).read_bytes())
    sources, damaged = open_sources(find(["memory://dump/"]))
    assert [s.rows for s in sources] == [2] and not damaged and sources[0].address == "memory:///dump/a.parquet"


def test_corrupt_files_are_reported_and_the_others_are_read(tmp_path: Path) -> None:
    complete = dump(tmp_path / "a.parquet", {}, {})
    (tmp_path / "b.parquet").write_bytes(complete.read_bytes()[:-100])
    (tmp_path / "c.parquet").write_bytes(b"")
    data = complete.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    (tmp_path / "d.parquet").write_bytes(data[:footer] + b"\xff" * 40 + data[footer + 40 :])
    (tmp_path / "e.parquet").write_bytes(data.replace(b"HEIGHT", b"HEIGH\xff"))
    sources, damaged = open_sources(find([str(tmp_path)]))
    assert [s.rows for s in sources] == [2]
    assert [Path(d.path).name[0] for d in damaged] == ["b", "c", "d", "e"] and all(d.reason for d in damaged)


def corrupt_group(path: Path, group: int) -> Path:
    """Overwrites the first page of the first column of a row group."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 24] = b"\xff" * 24
    path.write_bytes(data)
    return path


def test_readable_row_groups_of_a_corrupt_file_are_kept_in_order(tmp_path: Path) -> None:
    file = dump(tmp_path / "a.parquet", *[{"WIDTH": i} for i in range(9)], row_group_size=3)
    copy, lost, _ = salvage(opened(corrupt_group(file, 1)), ["URL", "WIDTH"], tmp_path / "out.parquet")
    assert pq.read_table(copy.path)["WIDTH"].to_pylist() == [0, 1, 2, 6, 7, 8] and copy.rows == 6
    assert [(d.path, d.rows) for d in lost] == [(str(file), 3)] and all(d.reason for d in lost)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("dictionary", [False, True], ids=["plain", "dictionary"])
def test_texts_with_an_invalid_encoding_become_null_and_are_counted(
    kind: pa.DataType, dictionary: bool, tmp_path: Path
) -> None:
    texts = with_bytes([b"good", b"\xe9t\xe9 latin-1", None, "été".encode()], kind)
    texts = texts.dictionary_encode() if dictionary and kind != pa.string_view() else texts
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"TEXT": texts}), file)
    copy, lost, invalid = salvage(opened(file), ["TEXT"], tmp_path / "out.parquet")
    assert pq.read_table(copy.path)["TEXT"].to_pylist() == ["good", None, None, "été"]
    assert invalid == {"TEXT": 1} and not lost


def with_bytes(values: list[bytes | None], kind: pa.DataType) -> pa.Array:
    """Returns an array of text whose bytes may be invalid UTF-8."""
    if pa.types.is_string_view(kind):
        if int(pa.__version__.split(".")[0]) < 21:
            pytest.skip("pyarrow below 21 cannot write views")
        array = pa.array(values, pa.binary_view())
        return pa.Array.from_buffers(kind, len(array), array.buffers(), array.null_count)
    large = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    return pa.array(values, pa.large_binary() if large else pa.binary()).view(kind)


def test_sampled_rows_are_spread_over_all_files(tmp_path: Path) -> None:
    for i in range(4):
        dump(tmp_path / f"{i}.parquet", *[{"WIDTH": 100 * i + j} for j in range(50)])
    sources, _ = open_sources(find([str(tmp_path)]))
    sample = sample_rows(sources, ["WIDTH"], 20, tmp_path / "sample")
    assert pq.read_table(sample.path)["WIDTH"].to_pylist() == [100 * i + j for i in range(4) for j in range(5)]
    assert sample.rows == 20


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that answers range requests, as object storage does."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        span = self.headers.get("Range")
        first, last = (int(x) for x in span.removeprefix("bytes=").split("-")) if span else (0, len(data) - 1)
        body = data[first : last + 1]
        self.send_response(206 if span else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if span:
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

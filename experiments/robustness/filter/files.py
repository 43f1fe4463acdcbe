"""Writes random metadata files in many types, encodings and layouts, and returns their values."""

import math
import random
import string
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.robustness.filter import texts

NAMES = {
    "url": ("URL", "url", "image_url"),
    "caption": ("TEXT", "caption", "text"),
    "width": ("WIDTH", "width", "original_width"),
    "height": ("HEIGHT", "height", "original_height"),
    "similarity": ("similarity", "clip_similarity"),
    "punsafe": ("punsafe", "unsafe"),
    "pwatermark": ("pwatermark", "watermark"),
    "aesthetic": ("AESTHETIC_SCORE", "aesthetic"),
    "nsfw": ("NSFW",),
    "language": ("LANGUAGE", "lang"),
    "hash": ("hash",),
}
TEXTS = ("url", "caption", "nsfw", "language")
RANGES = {
    "width": (300, 1200),
    "height": (300, 1200),
    "similarity": (0.26, 0.4),
    "punsafe": (0, 0.6),
    "pwatermark": (0, 0.6),
    "aesthetic": (6.3, 7.2),
}
SPECIAL = (
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 1e300, 5e-324, 1e-40),
    *(2.0**31, 2.0**31 - 0.5, 2.0**31 - 1, -(2.0**31), -(2.0**31) - 0.5, -(2.0**31) - 1, 2.0**63, 2.0**64),
    *(512.0, 511.5, 0.28, 0.5, 6.5, float(np.float32(0.28)), float(np.float32(3.4028235e38)), 3.5e38),
)
SPELLINGS = (
    *(b"", b" ", b"wide", b"640px", b"1,000", b"0x280", b"1e3", b"+640", b"640.", b".5", b" 640 ", b"\t640\n", b"--5"),
    *(b"nan", b"NaN", b"inf", b"-Infinity", b"1e400", b"1e-400", b"true", b"NULL", b"None", b"640\x00", b"\xff640"),
    *("٦٤٠".encode(), "６４０".encode(), b"1_000", b"9" * 400, b"2147483647.5", b"0.28", b"6.5", b"1d", b"\xc2\xa0640"),
)
CAPTIONS = (
    *(
        b"",
        b" " * 30,
        b"caf\xe9 au lait, in a small cup",
        "é".encode() * 20,
        b"\x00" * 25,
        "\U0001f469‍\U0001f4bb".encode() * 7,
    ),
    *(
        b"x" * 19,
        b"x" * 20,
        b"x" * 300,
        b"x" * 301,
        "日本".encode() * 151,
        b"a\r\nb\tc" * 8,
        b"\xed\xa0\x80" * 10,
        b'"' * 24,
    ),
    *(b"\xc0\xaf" * 15, b"\xf5" * 22, "e\u0301".encode() * 11, b"\xef\xbb\xbf" + b"y" * 25, b"x" * 70_000),
)
URLS = (
    *(
        b"",
        b" ",
        b"http://",
        b"https:///a",
        b"HTTP://A.org/1",
        b"http://www.a.org:80/1",
        b"https://a.org/1#x",
        b"//a.org/1",
    ),
    *(
        b"file:///etc/passwd",
        b"ftp://a.org/1",
        b" http://a.org/1",
        b"http://a.org/\xff",
        "http://a.org/é ü".encode(),
        b"http://a.org/1?",
    ),
    *(
        b"https://www.www.a.org/1/",
        b"http://a.org:443/1",
        b"http://a.org:8080/1",
        b"http://a.org/1 ",
        b"http://a.org/1\n",
    ),
)
LABELS = (
    b"UNLIKELY",
    b"unlikely",
    b" Unlikely  ",
    b"NSFW",
    b"UNSURE",
    b"",
    b"UNLIKELY\x00",
    b"\xffUNLIKELY",
    b"\tUNLIKELY",
)
LANGUAGES = (b"en", b"EN ", b" en", b"fr", b"", b"\xe9n", b"en-us")
SPECIAL_TEXTS = {"url": URLS, "caption": CAPTIONS, "nsfw": LABELS, "language": LANGUAGES}
INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
FLOATS = (pa.float16(), pa.float32(), pa.float64())
# pyarrow below 21 cannot write view types.
VIEWS = (pa.string_view(), pa.binary_view()) if int(pa.__version__.split(".")[0]) >= 21 else ()
STRINGS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), *VIEWS)
DECIMALS = (pa.decimal128(9, 4), pa.decimal128(18, 6), pa.decimal128(38, 10))


def write(
    rng: random.Random, path: Path, rows: int, names: dict[str, str], first: int, twins: bool
) -> list[dict[str, Any]]:
    """Writes a file in the format of the path's suffix; returns its rows as dicts of standard names.

    The hash of a row is its position, counted from `first`. With `twins`, a parquet file also has columns whose names
    differ only in case.
    """
    trouble = rng.choice([0.0, 0.02, 0.3])
    columns: dict[str, list[Any]] = {}
    kinds: dict[str, pa.DataType] = {}
    for name in names:
        if path.suffix == ".parquet":
            kind = rng.choice(STRINGS) if name in TEXTS else _kind_of_number(rng)
        else:
            kind = pa.string() if name in TEXTS else rng.choice([pa.string(), pa.float64(), pa.int64()])
        kinds[name] = pa.int64() if name == "hash" else kind
        columns[name] = [first + i for i in range(rows)] if name == "hash" else _values(rng, name, kind, rows, trouble)
    if path.suffix == ".parquet":
        _write_parquet(rng, path, {name: _array(rng, columns[name], kinds[name]) for name in names}, names, rows, twins)
    else:
        spelled = {name: [_spelled(value, path.suffix) for value in values] for name, values in columns.items()}
        texts.write(path, {names[name]: values for name, values in spelled.items()})
        columns = dict(spelled)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _spelled(value: Any, suffix: str) -> bytes | None:
    """Returns the value as text that the file format can represent."""
    if value is None:
        return None
    text = value if isinstance(value, bytes) else repr(value).encode()
    if suffix != ".jsonl" and text in texts.NULLS:
        return None
    return bytes(text.translate(bytes.maketrans(b"\t\r\n", b"   "))) if suffix == ".tsv" else text


def _write_parquet(
    rng: random.Random, path: Path, arrays: dict[str, pa.Array], names: dict[str, str], rows: int, twins: bool
) -> None:
    columns = {names[name]: arrays[name] for name in rng.sample([*arrays], len(arrays))}
    extra: dict[str, pa.Array] = {f"extra{i}": pa.array([i] * rows) for i in range(rng.choice([0, 0, 2]))}
    if rng.random() < 0.1:
        extra["file_row_number"] = pa.array(["x"] * rows)
    if twins:
        extra |= {names[name].swapcase(): pa.array([-5.0] * rows) for name in ("width", "caption", "aesthetic")}
    table = pa.table(extra | columns if rng.random() < 0.5 else columns | extra)
    pq.write_table(table, path, **_layout(rng, table, rows))


def _kind_of_number(rng: random.Random) -> pa.DataType:
    return rng.choice(
        [rng.choice(FLOATS), pa.float32(), pa.float64(), *(rng.choice(k) for k in (INTEGERS, STRINGS, DECIMALS))]
    )


def _values(rng: random.Random, name: str, kind: pa.DataType, rows: int, trouble: float) -> list[Any]:
    nulls = rng.choice([0.0, 0.0, 0.02, 1.0 if rng.random() < 0.03 else 0.1])
    one = _text if name in TEXTS else _number
    return [None if rng.random() < nulls else one(rng, name, kind, trouble) for _ in range(rows)]


def _text(rng: random.Random, name: str, kind: pa.DataType, trouble: float) -> bytes:
    if rng.random() < trouble:
        if rng.random() < 0.2:
            return rng.randbytes(rng.randrange(40))
        return rng.choice(SPECIAL_TEXTS[name])
    if name == "url":
        return f"http{rng.choice(['', 's'])}://{rng.choice(['', 'www.'])}a.org/{rng.randrange(3000)}".encode()
    if name == "caption":
        letters = string.ascii_lowercase + "  éß日😀"
        return "".join(rng.choices(letters, k=rng.randrange(15, 320 if rng.random() < 0.1 else 60))).encode()
    return b"UNLIKELY" if name == "nsfw" else b"en"


def _number(rng: random.Random, name: str, kind: pa.DataType, trouble: float) -> Any:
    """Returns a number, or its text, that a column of this type represents exactly."""
    special = rng.random() < trouble
    value = rng.choice(SPECIAL) if special else rng.uniform(*RANGES[name])
    if kind in STRINGS:
        if special and rng.random() < 0.7:
            return rng.choice(SPELLINGS)
        return repr(value).encode() if rng.random() < 0.5 or not math.isfinite(value) else f"{value:.3f}".encode()
    if kind in FLOATS:
        with np.errstate(over="ignore"):
            return float(np.dtype(f"float{kind.bit_width}").type(value))
    if kind in INTEGERS:
        limits = np.iinfo(str(kind))
        near = [limits.min, limits.max, limits.max - 1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**53 + 1, 0]
        whole = rng.choice(near) if special else round(value)
        return int(min(max(whole, limits.min), limits.max))
    digits = Decimal(10 ** (kind.precision - kind.scale) - 1)
    exact = Decimal(str(value)) if math.isfinite(value) else digits
    exact = max(min(exact, digits), -digits)
    return exact.quantize(Decimal(1).scaleb(-kind.scale), context=Context(prec=400))


def _array(rng: random.Random, values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind not in STRINGS:
        if kind == pa.float16():
            values = [None if value is None else np.float16(value) for value in values]
        array = pa.array(values, kind)
    elif pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        array = pa.array(values, pa.binary()).cast(pa.binary_view())
        if pa.types.is_string_view(kind):
            array = pa.Array.from_buffers(kind, len(array), array.buffers(), array.null_count)
    else:
        wide = kind in (pa.large_string(), pa.large_binary())
        array = pa.array(values, pa.large_binary() if wide else pa.binary())
        array = array.view(kind)
    encodable = kind in (pa.string(), pa.large_string(), pa.int64(), pa.float64(), pa.int32())
    return array.dictionary_encode() if encodable and rng.random() < 0.25 else array


def _layout(rng: random.Random, table: pa.Table, rows: int) -> dict[str, Any]:
    """Returns random options of the parquet writer: encodings, compression, pages and statistics."""
    layout: dict[str, Any] = {
        "row_group_size": rng.choice([max(1, rows // 7), rows or 1, rows or 1]),
        "compression": rng.choice(["none", "snappy", "gzip", "zstd", "brotli", "lz4"]),
        "data_page_version": rng.choice(["1.0", "2.0"]),
        "data_page_size": rng.choice([512, 1 << 20]),
        "write_statistics": rng.random() < 0.8,
        "write_page_index": rng.random() < 0.3,
        "store_schema": rng.random() < 0.8,
        "version": rng.choice(["1.0", "2.4", "2.6"]),
    }
    if rng.random() < 0.5:
        layout["use_dictionary"] = False
        layout["column_encoding"] = {
            field.name: encoding for field in table.schema if (encoding := _encoding(rng, field.type))
        }
    return layout


def _encoding(rng: random.Random, kind: pa.DataType) -> str | None:
    if pa.types.is_dictionary(kind):
        return None
    if pa.types.is_integer(kind):
        return rng.choice([None, "PLAIN", "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"])
    if kind in FLOATS:
        return rng.choice([None, "PLAIN", "BYTE_STREAM_SPLIT"])
    if kind in STRINGS:
        return rng.choice([None, "PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
    return None

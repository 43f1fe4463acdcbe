"""Compares `ldm filter` on 10 M rows like LAION's with pandas and with reading the columns only.

The contenders run one after the other, each in a process of its own, so that its peak memory can be measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ldm.commands.bench.command import check_replaceable, save
from ldm.commands.filter.arguments import UNITS

COLUMNS = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE", "hash"]


def measure(rows: int = 10_000_000, files: int = 10, data: Path | None = None) -> dict[str, Any]:
    """Returns times of `ldm filter`, pandas and reading, their ratios, and whether both keep the same rows."""
    with tempfile.TemporaryDirectory(prefix="ldm.bench.") as folder:
        source = data or Path(folder) / "in"
        if data is None:
            source.mkdir()
            for i in range(files):
                write_rows(source / f"{i:05d}.parquet", rows // files, seed=i)
        size = sum(path.stat().st_size for path in source.iterdir())
        for path in source.iterdir():
            path.read_bytes()  # puts it into the page cache for all contenders
        out = Path(folder) / "kept"
        times = {name: _alone(name, source, out) for name in CONTENDERS}
    return {
        "rows": rows,
        "bytes": size,
        "cores": os.cpu_count(),
        "contenders": times,
        "times_pandas": {of: times["pandas"][of] / times["ldm"][of] for of in ("seconds", "cpu_seconds")},
        "share_of_reading": {of: times["read"][of] / times["ldm"][of] for of in ("seconds", "cpu_seconds")},
        "share_of_arrow_reading": {of: times["read_arrow"][of] / times["ldm"][of] for of in ("seconds", "cpu_seconds")},
        "same_rows_as_pandas": times["ldm"]["kept"] == times["pandas"]["kept"],
    }


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Writes random columns of LAION-2B-en-aesthetic with realistic rejection rates; 2 % of the rows are duplicates."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", np.uint8)

    def texts(least: int, most: int, spread: float) -> pa.Array:
        lengths = np.clip(rng.lognormal(np.log((least * most) ** 0.5), spread, rows), least, most).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        text = letters[rng.integers(0, 32, offsets[-1], dtype=np.uint8)].tobytes()
        return pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(text))

    start = pa.scalar("https://images.example.org/")
    names = pc.binary_join_element_wise(start, pc.replace_substring(texts(20, 90, 0.3), " ", "/"), "")
    twice = np.where(rng.random(rows) < 0.02, rng.integers(0, rows, rows), np.arange(rows))

    def scores(values: np.ndarray) -> pa.Array:
        return pa.array(values.astype(np.float32))

    sides = {name: pa.array(rng.lognormal(6.5, 0.5, rows).astype(np.int32)) for name in ("WIDTH", "HEIGHT")}
    table = pa.table(
        {
            "URL": names.take(pa.array(twice)),
            "TEXT": texts(6, 400, 0.7),
            **sides,
            "similarity": scores(rng.normal(0.31, 0.03, rows)),
            "hash": pa.array(rng.integers(-(2**63), 2**63 - 1, rows)),
            "punsafe": scores(rng.beta(0.3, 4, rows)),
            "pwatermark": pc.if_else(pa.array(rng.random(rows) < 0.01), None, scores(rng.beta(0.6, 1.2, rows))),
            "AESTHETIC_SCORE": scores(rng.normal(5.2, 0.55, rows)),
        }
    )
    pq.write_table(table, path, row_group_size=200_000, compression="snappy")


def by_reading(source: Path, out: Path) -> int:
    """Decodes the columns with the same engine, without further processing."""
    import duckdb

    numbers = ", ".join(f'sum("{name}")' for name in COLUMNS[2:])
    query = f"SELECT count(*), max(strlen(URL)), max(strlen(TEXT)), {numbers} FROM '{source}/*.parquet'"
    return int(duckdb.connect().execute(query).fetchall()[0][0])


def by_reading_arrow(source: Path, out: Path) -> int:
    """Decodes the columns with pyarrow, one row group at a time."""
    rows = 0
    for path in sorted(source.iterdir()):
        with pq.ParquetFile(path) as file:
            rows += sum(len(file.read_row_group(i, columns=COLUMNS)) for i in range(file.num_row_groups))
    return rows


def by_ldm(source: Path, out: Path) -> int:
    from ldm.__main__ import main

    assert main(["filter", str(source), "--out", str(out), "--threads", str(os.cpu_count())]) == 0
    return int(json.loads(out.with_name("kept.report.json").read_text())["kept"])


def by_keeping_all(source: Path, out: Path) -> int:
    """Applies only the rules on URLs, so that all rows are staged, compared and written, which needs most memory."""
    from ldm.__main__ import main

    off = [f"--{name.replace('_', '-')}" for name in UNITS if name != "deduplicate"]
    options = [word for option in off for word in (option, "none")]
    assert main(["filter", str(source), "--out", f"{out}-all", *options]) == 0
    return int(json.loads(out.with_name("kept-all.report.json").read_text())["kept"])


def by_pandas(source: Path, out: Path) -> int:
    """Computes the same rules, counts, histograms, duplicates and output with idiomatic pandas."""
    frame = pd.concat([pd.read_parquet(path, columns=COLUMNS) for path in sorted(source.iterdir())])
    side, aspect = frame[["WIDTH", "HEIGHT"]].min(axis=1), frame.WIDTH / frame.HEIGHT
    length = frame.TEXT.str.len()
    for values in (frame.AESTHETIC_SCORE, frame.similarity, side, aspect, frame.pwatermark, frame.punsafe, length):
        np.histogram(values[:: len(frame) // 100_000 or 1].dropna(), bins=60)
    rules = {
        "aesthetic": frame.AESTHETIC_SCORE >= 6.5,
        "similarity": frame.similarity >= np.float32(0.28),
        "side": side >= 512,
        "aspect": aspect.between(0.5, 2),
        "watermark": frame.pwatermark < 0.5,
        "unsafe": frame.punsafe < 0.5,
        "url": frame.URL.str.match("(?i)https?://[^/]"),
        "caption_length": length.between(20, 300),
    }
    left = pd.Series(True, index=frame.index)
    for keep in rules.values():
        keep.sum()
        left = left & keep
        left.sum()
    kept = frame[left].drop_duplicates("URL")
    normalised = kept.URL.str.replace(r"^https?://(www\.)?", "", regex=True, case=False)
    kept = kept[~normalised.str.replace(r"(#.*)?[/?]*$", "", regex=True).duplicated()]
    out.with_name("pandas").mkdir()
    kept.to_parquet(out.with_name("pandas") / "0.parquet")
    return len(kept)


CONTENDERS = {
    "read": by_reading,
    "read_arrow": by_reading_arrow,
    "ldm": by_ldm,
    "pandas": by_pandas,
    "ldm_keeping_all": by_keeping_all,
}


def _alone(name: str, source: Path, out: Path) -> dict[str, float]:
    """Returns wall and CPU seconds (without imports), peak memory and kept rows of one contender."""
    command = [sys.executable, __file__, "--contender", name, str(source), str(out)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    return dict(json.loads(output))


def _contend(name: str, source: Path, out: Path) -> None:
    import resource

    import duckdb  # noqa: F401 - imports are not timed
    import matplotlib.figure  # noqa: F401

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    began, spent = time.perf_counter(), cpu()
    kept = CONTENDERS[name](source, out)
    measured = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu() - spent, "kept": kept}
    print(json.dumps(measured | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("filter.json"))
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--data", type=Path, help="a folder of parquet files instead of random rows")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        name, source, out = args.contender
        _contend(name, Path(source), Path(out))
    else:
        check_replaceable(args.json, "filter")
        found = measure(args.rows, data=args.data)
        save(args.json, "filter", found)
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

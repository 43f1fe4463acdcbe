"""Writes small metadata files in the form of public dumps, small enough to count by hand."""

import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GOOD: dict[str, Any] = {
    "URL": "https://a.org/1.jpg",
    "TEXT": "a caption of some length",
    "WIDTH": 640,
    "HEIGHT": 512,
    "similarity": 0.3,
    "punsafe": 0.1,
    "pwatermark": 0.2,
    "AESTHETIC_SCORE": 6.75,
}
SCORES = ("similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE")


def rows(*changes: dict[str, Any]) -> pa.Table:
    """Returns one row per change: a row that passes all rules, with the change and its own URL unless one is given."""
    changed = [GOOD | {"URL": f"https://a.org/{i}.jpg"} | change for i, change in enumerate(changes)]
    names = dict.fromkeys(key for row in changed for key in row)
    table = pa.table({name: [row[name] for row in changed] for name in names})
    for name in SCORES:
        if name in table.column_names and pa.types.is_floating(table[name].type):
            place = table.column_names.index(name)
            table = table.set_column(place, name, table[name].cast(pa.float32()))
    return table


def dump(path: Path, *changes: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows(*changes), path, **options)
    return path


def replace_in_footer(path: Path, old: float, new: float) -> None:
    """Changes a float32 minimum or maximum in a parquet footer, as written by writers that violate the format."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    before, after = (struct.pack("<f", value) for value in (old, new))
    assert before in data[start:]
    path.write_bytes(data[:start] + data[start:].replace(before, after))

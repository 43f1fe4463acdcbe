"""Reads files that list the captions of many images: metadata.jsonl, .csv and .parquet, and COCO's annotations."""

import csv
import io
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data.sources.captions import Captions, decode_utf8
from ldm.data.sources.parquet import parquet_rows

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the names that Hugging Face's imagefolder reads
ANNOTATIONS = "annotations"  # the folder of COCO's annotation files
Listed = dict[str, list[str]]  # captions by the path of an image, relative to the root


def captions_in_tables(root: Path, files: list[str], captions: Captions) -> Listed:
    """Returns the captions in all tables among `files`; COCO's annotations may also be beside the root.

    An image may be listed without a caption. Warns about rows whose image does not exist. Raises ValueError if a table
    cannot be read.
    """
    listed: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        if PurePosixPath(file).name in METADATA:
            for name, found in _metadata(root / file, captions):
                listed[os.path.normpath(PurePosixPath(file).parent / name)] += found
    absent = sorted(listed.keys() - set(files))
    for key, found in _coco(root, files, captions):
        listed[key] += found
    if absent:
        warnings.warn(
            f"{' and '.join(_tables(files))} in {root} names {len(absent)} files that do not exist, such as "
            f"{absent[0]}",
            stacklevel=4,
        )
    return dict(listed)


def _tables(files: list[str]) -> list[str]:
    return [name for name in METADATA if any(PurePosixPath(file).name == name for file in files)]


def _metadata(path: Path, captions: Captions) -> Iterator[tuple[str, list[str]]]:
    """Yields file names, relative to the table, and captions."""
    rows = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix]
    for where, row in rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{where} has no "file_name"')
        yield row["file_name"], _captions_of(row, captions, where)


def _captions_of(row: dict[str, Any], captions: Captions, where: str) -> list[str]:
    found = captions.of_row(row)
    return captions.without_blank(found, where) if found and not captions.places else found


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(decode_utf8(path.read_bytes(), str(path)).split("\n"), 1):
        where = f"line {number} of {path}"
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if row is not None:
            yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = csv.DictReader(io.StringIO(decode_utf8(path.read_bytes(), str(path)), newline=""))
    try:
        for row in rows:
            yield f"line {rows.line_num} of {path}", {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num} of {path} is not CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(parquet_rows(path), 1):
        yield f"row {number} of {path}", row


def _coco(root: Path, files: list[str], captions: Captions) -> Iterator[tuple[str, list[str]]]:
    """Yields the captions in COCO's annotations for the images among `files`."""
    tables = [root / file for file in files if file.endswith(".json") and ANNOTATIONS in Path(file).parts[:-1]]
    tables += sorted((root.resolve().parent / ANNOTATIONS).glob(f"*_{root.resolve().name}.json"))
    named = [table for table in tables if "caption" in table.name]  # the other files are large and contain boxes
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        by_name[PurePosixPath(file).name].append(file)
    for table in named or tables:
        split = table.stem.rpartition("_")[2]  # captions_train2017.json describes the images in train2017
        for name, found in _coco_rows(table, captions):
            keys = by_name.get(name.rpartition("/")[2], [])
            for key in [key for key in keys if split in key.split("/")[:-1]] or keys:
                yield key, found


def _coco_rows(table: Path, captions: Captions) -> Iterator[tuple[str, list[str]]]:
    try:
        content = json.loads(decode_utf8(table.read_bytes(), str(table)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{table} is not JSON: {error}") from error
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        for annotation in content["annotations"]:
            if "caption" in annotation and annotation["image_id"] in names:
                yield names[annotation["image_id"]], _captions_of(annotation, captions, str(table))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{table} has not the form of COCO's annotations: expected images with id and file_name, and annotations "
            "with image_id and caption"
        ) from error

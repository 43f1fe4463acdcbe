"""Reads prompts_file of sample.py: prompts with their own negative prompts, seeds and guidance scales."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.drawing.keys import KEYS

ROW_KEYS = ("negative", "seed", "guidance", "n")  # keys that a row of a file may set
SUFFIXES = (".txt", ".csv", ".jsonl")


@dataclass(frozen=True)
class ImageSpec:
    """One image of a job. A value of None is taken from the job or the model."""

    prompt: str
    seed: int
    negative: str | None = None
    guidance: float | None = None


def image_specs(rows: Iterable[Mapping[str, Any]], seed: int, n: int) -> list[ImageSpec]:
    """Returns n images per row with consecutive seeds; `seed` and `n` are the defaults of rows that set none."""
    return [
        ImageSpec(row["prompt"], row.get("seed", seed) + k, row.get("negative"), row.get("guidance"))
        for row in rows
        for k in range(row.get("n", n))
    ]


def read_rows(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a prompts_file: a prompt each, optionally with negative, seed, guidance and n.

    A .txt has one prompt per line, a .csv a header with the column names, a .jsonl one object per line. Raises
    FileNotFoundError, or ValueError with the line number, for a file that cannot be read.
    """
    file = Path(path).expanduser()
    if file.suffix not in SUFFIXES:
        raise ValueError(f"prompts_file={path} has an unknown type; give a file of type {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise FileNotFoundError(f"prompts_file={path} does not exist; give the path of a file of prompts")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file={path} is not UTF-8 text; save it as UTF-8") from error
    parse = {".txt": _parse_txt, ".csv": _parse_csv, ".jsonl": _parse_jsonl}[file.suffix]
    rows = [_checked(row, f"{path}, line {line}") for line, row in parse(text, path)]
    if not rows:
        raise ValueError(f"prompts_file={path} holds no prompts; write one per line")
    return rows


def _parse_txt(text: str, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _parse_csv(text: str, path: str) -> Iterator[tuple[int, Any]]:
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if text and "prompt" not in (names := [*(lines.fieldnames or [])]):
            raise ValueError(
                f"{path} has the columns {', '.join(map(repr, names))}, but needs one that is named prompt: begin it "
                f"with a line such as prompt,{','.join(ROW_KEYS)}"
            )
        for row in lines:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {lines.line_num} does not have as many fields as the header")
            yield lines.line_num, {name: value for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num} cannot be read as CSV: {error}") from error


def _parse_jsonl(text: str, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where} has no prompt: every row needs a text prompt, as in {{"prompt": "a red circle"}}')
    if any("\ud800" <= letter <= "\udfff" for letter in row["prompt"] + str(row.get("negative"))):
        raise ValueError(f"{where} contains half of a surrogate pair: write complete characters")
    if unknown := [name for name in row if name not in ("prompt", *ROW_KEYS)]:
        raise ValueError(f"{where} sets {unknown[0]!r}, but a row may only set prompt, {', '.join(ROW_KEYS)}")
    return {"prompt": row["prompt"]} | {
        name: _parse(name, row[name], where) for name in ROW_KEYS if row.get(name) is not None
    }


def _parse(name: str, value: Any, where: str) -> Any:
    """Parses a value as on the command line."""
    if name == "negative" and not isinstance(value, str):
        raise ValueError(f"{where} has the negative {value!r}, which is not text")
    try:
        return KEYS[name].parse(str(value))
    except ValueError as error:
        raise ValueError(f"{where} has {name}={value}, but {name} must be {error}") from error

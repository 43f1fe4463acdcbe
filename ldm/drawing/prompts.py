"""The prompts of sample.py, each with what is its own, from the command line and from files."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.drawing.keys import KEYS

OWN = ("negative", "seed", "guidance", "n")  # keys that a row of a file may set for itself
KINDS = (".txt", ".csv", ".jsonl")


@dataclass(frozen=True)
class ImageSpec:
    """One picture of a job; what is None is as the job or the model says."""

    prompt: str
    seed: int
    negative: str | None = None
    guidance: float | None = None


def image_specs(rows: Iterable[Mapping[str, Any]], seed: int, n: int) -> list[ImageSpec]:
    """In order, those of every row with seeds counting up; `seed` and `n` are of rows that have none of their own."""
    return [
        ImageSpec(row["prompt"], row.get("seed", seed) + k, row.get("negative"), row.get("guidance"))
        for row in rows
        for k in range(row.get("n", n))
    ]


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a prompts_file: each a prompt, and maybe its own negative, seed, guidance and n.

    A .txt has a prompt a line, a .csv a head that names its columns, a .jsonl an object a line. Raises ValueError or
    FileNotFoundError, with the line, for what cannot be read so.
    """
    file = Path(path).expanduser()
    if file.suffix not in KINDS:
        raise ValueError(f"prompts_file={path} is none of the kinds that can be read: {', '.join(KINDS)}")
    if not file.is_file():
        raise FileNotFoundError(f"there is no prompts_file {path}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file={path} is not UTF-8 text; save it as UTF-8") from error
    found = {".txt": _of_txt, ".csv": _of_csv, ".jsonl": _of_jsonl}[file.suffix](text, path)
    rows = [_checked(row, f"{path}, line {line}") for line, row in found]
    if not rows:
        raise ValueError(f"prompts_file={path} holds no prompt; write one a line")
    return rows


def _of_txt(text: str, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _of_csv(text: str, path: str) -> Iterator[tuple[int, Any]]:
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in lines:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {lines.line_num} has not as many fields as the head")
            yield lines.line_num, {name: value for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num} cannot be read as CSV: {error}") from error


def _of_jsonl(text: str, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where} has no prompt: it must have one that is text, as in {{"prompt": "a red circle"}}')
    if any("\ud800" <= letter <= "\udfff" for letter in row["prompt"] + str(row.get("negative"))):
        raise ValueError(f"{where} holds half of a surrogate pair; write whole characters")
    if unknown := [name for name in row if name not in ("prompt", *OWN)]:
        raise ValueError(f"{where} sets {unknown[0]!r}, but a row may set prompt, {', '.join(OWN)} only")
    return {"prompt": row["prompt"]} | {
        name: _read(name, row[name], where) for name in OWN if row.get(name) is not None
    }


def _read(name: str, value: Any, where: str) -> Any:
    """As the command line reads it."""
    if name == "negative" and not isinstance(value, str):
        raise ValueError(f"{where} has the negative {value!r}, which is no text")
    try:
        return KEYS[name].read(str(value))
    except ValueError as error:
        raise ValueError(f"{where} has {name}={value}, but {name} must be {error}") from error

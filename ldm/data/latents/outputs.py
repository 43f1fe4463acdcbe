"""Recognises files written by `ldm encode`, even if damaged, so that it never replaces other files."""

import json
from pathlib import Path

from ldm.data.mapped import HEADER, read_record


def is_latents(path: Path) -> bool:
    """Returns whether `write_shard` wrote the file, which may be truncated."""
    try:
        return {"settings", "source", "samples"} <= read_record(path).keys()
    except (ValueError, AttributeError):
        head = _head(path, len(HEADER) + 8)
        return len(head) <= 8 or head[8:] == HEADER[: len(head) - 8]


def is_manifest(path: Path) -> bool:
    """Returns whether the file is a manifest of cached latents, of any format version, which may be truncated."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return b'{\n  "format": '.startswith(_head(path, 14))
    return isinstance(manifest, dict) and {"format", "settings", "samples", "shards"} <= manifest.keys()


def is_quarantine(path: Path, shard: str) -> bool:
    """Returns whether the file lists unusable samples of the tar `shard`, and may be truncated."""
    start = json.dumps({"shard": shard}, ensure_ascii=False)[:-1].encode("utf-8", "replace")
    return start.startswith(_head(path, len(start)))


def _head(path: Path, count: int) -> bytes:
    """Returns the first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(count)

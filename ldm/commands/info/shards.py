"""Describes WebDataset shards for `ldm info`, from their index."""

import numpy as np

from ldm.data.sources.captions import DEFAULT
from ldm.data.sources.shard_index import Index, load_index
from ldm.data.sources.shards import find_tars

MAX_PROBLEMS = 3  # how many damaged shards are named


def describe_shards(path: str) -> dict[str, str]:
    """Returns human-readable lines, name → value. Scans shards that training has not indexed yet."""
    files = find_tars(path)
    index = load_index(files)
    size = sum(file.size for file in files)
    return {
        "shards": f"{path} ({size / 2**20:,.1f} MiB in {len(files)} file{'s' if len(files) != 1 else ''})",
        "kind": "WebDataset shards of images with captions",
        "samples": f"{len(index):,}",
        **_counts(index),
        "problems": "; ".join(_losses(index, [str(file) for file in files]))
        or "none at a glance; ldm verify reads all",
    }


def _counts(index: Index) -> dict[str, str]:
    """Counts images and captions; of several texts of a sample, training reads the first, by default."""
    image, texts = index.spans[:, 0, 0] >= 0, index.spans[:, 1:, 0] >= 0
    first = np.where(texts.any(1), texts.argmax(1), -1)
    kinds = [
        f"{(first == number).sum():,} in .{name}" for number, name in enumerate(DEFAULT) if (first == number).any()
    ]
    captioned = texts.any(1)
    captions = f"{captioned.sum():,}" + (f", {' and '.join(kinds)}" if kinds else "")
    lines = {"images": f"{image.sum():,}", "captions": captions}
    if missing := int((image & ~captioned).sum()):
        lines["images without a caption"] = f"{missing:,}"
    if missing := int((captioned & ~image).sum()):
        lines["captions without an image"] = f"{missing:,}"
    return lines


def _losses(index: Index, names: list[str]) -> list[str]:
    found = [f"{names[shard]} is truncated or corrupt: {loss}" for shard, loss in index.losses.items()]
    more = [f"and {len(found) - MAX_PROBLEMS} more, see ldm verify"] if len(found) > MAX_PROBLEMS else []
    return found[:MAX_PROBLEMS] + more

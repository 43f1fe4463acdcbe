"""`ldm shards`: writes the images and captions of a folder, in any layout that ldm reads, to WebDataset shards."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ldm.data.sources.captioned_images import CaptionedImages
from ldm.data.sources.captions import Captions
from ldm.data.sources.image import image_extension
from ldm.data.sources.parquet import image_bytes, image_column, parquet_rows, row_count
from ldm.data.sources.tar import tar_of
from ldm.errors import UsageError, warnings_on_stderr
from ldm.ownership import Record, check_outside
from ldm.progress import Progress


class Source(NamedTuple):
    """An image file's path without extension, with its bytes and captions or the `reason` for skipping it."""

    name: str
    data: bytes = b""
    captions: Sequence[str] = ()
    reason: str = ""


def run(args: argparse.Namespace) -> None:
    """Writes the shards. Raises ValueError or OSError on failure, or if no image can be used."""
    with warnings_on_stderr():
        _write_shards(args)


def _write_shards(args: argparse.Namespace) -> None:
    if args.shard_size < 1:
        raise UsageError(f"--shard-size {args.shard_size}: expected 1 or more")
    check_outside(args.out, args.folder, "--out", "folder")
    total, sources = _open(args.folder, args.captions, args.caption)
    left_out: Counter[str] = Counter()
    samples = _samples(sources, Progress(total, "images"), left_out)
    record, written, shards = Record(args.out, "shards"), 0, 0
    while batch := list(islice(samples, args.shard_size)):
        record.write({_name(shards): tar_of(batch)})
        written, shards = written + len(batch), shards + 1
    for reason, images in left_out.most_common():
        print(f"images left out because {reason}: {images:,}")
    if not written:
        raise ValueError(f"no image in {args.folder} can be used, so that no shard was written")
    _refuse_others(args.out, shards)
    print(f"wrote {written:,} images in {shards} shards to {args.out}; train with data=shards data.shards={args.out}")


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.tar"


def _refuse_others(out: Path, shards: int) -> None:
    """Raises ValueError if the folder has other tars, which would be read as part of this data set."""
    others = sorted(path.name for path in out.glob("*.tar") if path.name not in {_name(k) for k in range(shards)})
    if others:
        raise ValueError(f"{out} also has {others[0]} of another run, which would be read too: remove it")


def _open(folder: Path, captions: Sequence[str], caption: str | None) -> tuple[int, Iterator[Source]]:
    """Returns the number of images, and the images."""
    tables = {path: column for path in sorted(folder.rglob("*.parquet")) if (column := image_column(path))}
    if tables:
        return sum(map(row_count, tables)), _in_tables(folder, tables, Captions(tuple(captions)), caption)
    images = CaptionedImages(folder, captions, caption)
    if any(images.repeats(key) > 1 for key in images.keys):
        print(
            "each image is stored once: shards have no repeats, which data=folder data.root=… reads from folder names"
        )
    return len(images.keys), _in_folder(images)


def _in_folder(images: CaptionedImages) -> Iterator[Source]:
    for key in images.keys:
        name = key.rpartition(".")[0]
        try:
            yield Source(name, (images.root / key).read_bytes(), images.captions_of(key))
        except ValueError:
            yield Source(name, reason="its caption cannot be read")


def _in_tables(folder: Path, tables: dict[Path, str], captions: Captions, caption: str | None) -> Iterator[Source]:
    fallback = [] if caption is None else [caption]
    for table, column in tables.items():
        for number, row in enumerate(parquet_rows(table)):
            name = f"{table.relative_to(folder).with_suffix('').as_posix()}_{number:07d}"
            data, found = image_bytes(row.pop(column)), captions.of_row(row) or fallback
            if data is None:
                yield Source(name, reason="its row has no image")
            elif not found:
                reason = f"its row has no caption in the columns {', '.join(row)}, see --captions and --caption"
                yield Source(name, reason=reason)
            else:
                yield Source(name, data, captions.without_blank(found, name))


def _samples(sources: Iterator[Source], progress: Progress, left_out: Counter[str]) -> Iterator[dict[str, bytes]]:
    """Yields the members of each usable sample, and counts the reasons for skipping the others."""
    used: set[str] = set()
    for source in sources:
        if source.reason:
            left_out[source.reason] += 1
        elif (extension := image_extension(source.data)) is None:
            left_out["its file is not an image that Pillow decodes"] += 1
        else:
            key = _key(source.name, used)
            yield {f"{key}.{extension}": source.data, **_texts(key, source.captions)}
        progress.step()


def _key(name: str, used: set[str]) -> str:
    """Returns an unused key without dots in its last component, where WebDataset's keys end."""
    path = PurePosixPath(name)
    key = base = path.with_name(path.name.replace(".", "_")).as_posix()
    for number in count(2):
        if key not in used:
            break
        key = f"{base}_{number}"
    used.add(key)
    return key


def _texts(key: str, captions: Sequence[str]) -> dict[str, bytes]:
    if len(captions) == 1:
        return {f"{key}.txt": captions[0].encode()}
    return {f"{key}.json": json.dumps({"captions": list(captions)}, ensure_ascii=False).encode()}

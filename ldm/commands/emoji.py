"""`ldm emoji`: the npm package emoji-datasource-google as WebDataset shards of captioned pictures."""

import argparse
import gzip
import io
import json
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.files import write_bytes
from ldm.ownership import refuse

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
GET = f"get it with `npm pack {PACKAGE}@{VERSION}`"
PICTURES = "img/google/64/"
NATIVE_SIZE = 64
# What is read of the package; the sheets and every other path are left alone.
_WANTED = re.compile(rf"(emoji\.json|package\.json|LICENSE|{PICTURES}[0-9a-f-]+\.png)")
_MAX_BYTES = 32 << 20  # the largest, emoji.json, has 1.3 MB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"Make the emoji data set from the npm package {PACKAGE} {VERSION}; {GET}."
    parser.add_argument("source", type=Path, help="the package: the .tgz, or the folder it unpacks to")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for emoji-00000.tar, …")
    for name, default, unit in (
        ("--size", NATIVE_SIZE, "pixels a side"),
        ("--shard-size", 480, "samples a tar"),
    ):
        parser.add_argument(name, type=_positive, default=default, metavar="N", help=f"{unit} (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write the shards and the package's licence; ValueError or OSError in one sentence on failure."""
    files = read_package(args.source)
    samples = [sample(entry, files, args.size) for entry in _entries(files)]
    shards = [samples[i : i + args.shard_size] for i in range(0, len(samples), args.shard_size)]
    paths = [args.out / f"emoji-{k:05d}.tar" for k in range(len(shards))]
    others = sorted(set(args.out.glob("emoji-*.tar")) - set(paths))
    if others:
        raise ValueError(f"{args.out} already holds {others[0].name}, which is not of these shards: empty it first")
    contents = {path: tar_of(shard) for path, shard in zip(paths, shards, strict=True)}
    contents[args.out / "LICENSE.emoji-datasource"] = files["LICENSE"]
    foreign = [path for path, data in contents.items() if path.exists() and not _holds(path, data)]
    refuse(foreign, "this command", "empty the folder, or give another --out")
    for path in [path for path in contents if not path.exists()]:
        write_bytes(path, contents[path])
    print(f"wrote {len(samples):,} emoji in {len(shards)} shards to {args.out}")


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def read_package(source: Path) -> dict[str, bytes]:
    """The wanted files of the package, by their path in it, in memory; ValueError if it is not the package."""
    if source.is_dir():
        listed = ((p.relative_to(source).as_posix(), p) for p in sorted(source.rglob("*")) if p.is_file())
        files = {name: path.read_bytes() for name, path in listed if _WANTED.fullmatch(name)}
    elif source.is_file():
        files = _read_tarball(source)
    else:
        raise FileNotFoundError(f"no file or folder at {source}: {GET}")
    missing = {"emoji.json", "package.json", "LICENSE"} - files.keys()
    if missing:
        raise ValueError(f"{source} is not the package {PACKAGE}: it has no {min(missing)}; {GET}")
    package = _json(files, "package.json")
    if (package.get("name"), package.get("version")) != (PACKAGE, VERSION):
        raise ValueError(f"{source} is {package.get('name')} {package.get('version')}, not {PACKAGE} {VERSION}; {GET}")
    return files


def _read_tarball(source: Path) -> dict[str, bytes]:
    """npm puts everything below `package/`."""
    files = {}
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                name = member.name.removeprefix("package/")
                file = tar.extractfile(member) if member.isreg() and _WANTED.fullmatch(name) else None
                if file and member.size <= _MAX_BYTES:
                    files[name] = file.read()
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{source} is no npm tarball, or is cut short; {GET}") from error
    return files


def _json(files: dict[str, bytes], name: str) -> Any:
    try:
        return json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{name} in the package is not JSON ({error}); {GET}") from error


def _entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Every emoji by code point, but the components, which are bare swatches of skin."""
    entries = [entry for entry in _json(files, "emoji.json") if entry["category"] != "Component"]
    return sorted(entries, key=key_of)


def key_of(entry: dict[str, Any]) -> str:
    return str(entry["image"]).removesuffix(".png")


def sample(entry: dict[str, Any], files: dict[str, bytes], size: int) -> dict[str, bytes]:
    """Member name → content: the picture, its caption (the Unicode name in small letters) and what it is."""
    picture = files.get(PICTURES + entry["image"])
    if picture is None:
        raise ValueError(f"the package has no {PICTURES}{entry['image']}; {GET}")
    key, caption = key_of(entry), entry["name"].lower()
    kept = {field: entry[field] for field in ("category", "subcategory", "short_name")}
    about = {"caption": caption, **kept, "width": size, "height": size}
    return {
        f"{key}.png": picture if size == NATIVE_SIZE else resized(picture, size),
        f"{key}.txt": caption.encode(),
        f"{key}.json": json.dumps(about).encode(),
    }


def resized(picture: bytes, size: int) -> bytes:
    """The PNG scaled to `size`, its transparency kept."""
    with Image.open(io.BytesIO(picture), formats=["PNG"]) as image:
        scaled = image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    scaled.save(file, "PNG")
    return file.getvalue()


def tar_of(samples: list[dict[str, bytes]]) -> bytes:
    """An uncompressed tar with no dates or owners, so that the same samples give the same bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in (member for members in samples for member in members.items()):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return file.getvalue()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)

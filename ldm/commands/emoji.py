"""`ldm emoji`: converts the npm package emoji-datasource-google to WebDataset shards of captioned images."""

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

from ldm.data.sources.tar import tar_of
from ldm.files import write_bytes
from ldm.ownership import refuse

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
HOW_TO_GET = f"get it with `npm pack {PACKAGE}@{VERSION}`"
IMAGES = "img/google/64/"
NATIVE_SIZE = 64
# The files to read from the package; sprite sheets and all other paths are ignored.
_WANTED = re.compile(rf"(emoji\.json|package\.json|LICENSE|{IMAGES}[0-9a-f-]+\.png)")
_MAX_BYTES = 32 << 20  # the largest file, emoji.json, has 1.3 MB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"Create the emoji data set from the npm package {PACKAGE} {VERSION}; {HOW_TO_GET}."
    parser.add_argument("source", type=Path, help="the package: the .tgz or its unpacked folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for emoji-00000.tar, …")
    for name, default, unit in (
        ("--size", NATIVE_SIZE, "pixels per side"),
        ("--shard-size", 480, "samples per tar"),
    ):
        parser.add_argument(name, type=_positive, default=default, metavar="N", help=f"{unit} (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Writes the shards and the package's licence. Raises ValueError or OSError on failure."""
    files = read_package(args.source)
    samples = [sample(entry, files, args.size) for entry in _entries(files)]
    shards = [samples[i : i + args.shard_size] for i in range(0, len(samples), args.shard_size)]
    paths = [args.out / f"emoji-{k:05d}.tar" for k in range(len(shards))]
    others = sorted(set(args.out.glob("emoji-*.tar")) - set(paths))
    if others:
        raise ValueError(f"{args.out} already has {others[0].name} of another run: empty the folder first")
    contents = {path: tar_of(shard) for path, shard in zip(paths, shards, strict=True)}
    contents[args.out / "LICENSE.emoji-datasource"] = files["LICENSE"]
    foreign = [path for path, data in contents.items() if path.exists() and not _has_content(path, data)]
    refuse(foreign, "this command", "empty the folder, or give another --out")
    for path in [path for path in contents if not path.exists()]:
        write_bytes(path, contents[path])
    print(f"wrote {len(samples):,} emoji in {len(shards)} shards to {args.out}")


def _has_content(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def read_package(source: Path) -> dict[str, bytes]:
    """Reads the needed files by their path in the package. Raises ValueError if `source` is not the package."""
    if source.is_dir():
        listed = ((p.relative_to(source).as_posix(), p) for p in sorted(source.rglob("*")) if p.is_file())
        files = {name: path.read_bytes() for name, path in listed if _WANTED.fullmatch(name)}
    elif source.is_file():
        files = _read_tarball(source)
    else:
        raise FileNotFoundError(f"no file or folder at {source}: {HOW_TO_GET}")
    missing = {"emoji.json", "package.json", "LICENSE"} - files.keys()
    if missing:
        raise ValueError(f"{source} is not the package {PACKAGE}: it has no {min(missing)}; {HOW_TO_GET}")
    package = _json(files, "package.json")
    if (package.get("name"), package.get("version")) != (PACKAGE, VERSION):
        raise ValueError(
            f"{source} is {package.get('name')} {package.get('version')}, not {PACKAGE} {VERSION}; {HOW_TO_GET}"
        )
    return files


def _read_tarball(source: Path) -> dict[str, bytes]:
    """Reads the needed files of an npm tarball, which has all files in the folder `package`."""
    files = {}
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                name = member.name.removeprefix("package/")
                file = tar.extractfile(member) if member.isreg() and _WANTED.fullmatch(name) else None
                if file and member.size <= _MAX_BYTES:
                    files[name] = file.read()
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{source} is not an npm tarball, or is truncated; {HOW_TO_GET}") from error
    return files


def _json(files: dict[str, bytes], name: str) -> Any:
    try:
        return json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{name} in the package is not JSON ({error}); {HOW_TO_GET}") from error


def _entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Returns all emoji sorted by code point, except components, which are plain samples of skin tones."""
    entries = [entry for entry in _json(files, "emoji.json") if entry["category"] != "Component"]
    return sorted(entries, key=key_of)


def key_of(entry: dict[str, Any]) -> str:
    return str(entry["image"]).removesuffix(".png")


def sample(entry: dict[str, Any], files: dict[str, bytes], size: int) -> dict[str, bytes]:
    """Maps member names to contents: the image, its caption (the lower-case Unicode name) and metadata."""
    image = files.get(IMAGES + entry["image"])
    if image is None:
        raise ValueError(f"the package has no {IMAGES}{entry['image']}; {HOW_TO_GET}")
    key, caption = key_of(entry), entry["name"].lower()
    kept = {field: entry[field] for field in ("category", "subcategory", "short_name")}
    metadata = {"caption": caption, **kept, "width": size, "height": size}
    return {
        f"{key}.png": image if size == NATIVE_SIZE else resize_png(image, size),
        f"{key}.txt": caption.encode(),
        f"{key}.json": json.dumps(metadata).encode(),
    }


def resize_png(data: bytes, size: int) -> bytes:
    """Scales a PNG to `size` and keeps its transparency."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        scaled = image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    scaled.save(file, "PNG")
    return file.getvalue()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)

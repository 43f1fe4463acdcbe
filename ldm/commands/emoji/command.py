"""`ldm emoji`: converts an npm package of the emoji-datasource family to WebDataset shards of captioned images."""

import argparse
import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.commands.emoji.arguments import FAMILY, HOW_TO_GET, NATIVE_SIZE
from ldm.data.sources.tar import tar_of
from ldm.errors import UsageError
from ldm.files import write_bytes
from ldm.ownership import refuse

# The package without images of its own has a sprite sheet of each set, with cells of 32 pixels and a border of 1.
SHEETS = re.compile(r"img/(\w+)/sheets/32\.png")
SHEET_SIZE = 32
# The files to read from the package; other sprite sheets and all other paths are ignored.
_WANTED = re.compile(rf"(emoji\.json|package\.json|LICENSE|img/\w+/64/[0-9a-f-]+\.png|{SHEETS.pattern})")
_MAX_BYTES = 32 << 20  # the largest file is a sheet of 7 MB
_MAX_PIXELS = 4096 * 4096  # of a sheet
_COMPONENTS = ("Component", "Skin Tones")  # categories of plain samples of skin tones

EVERYDAY = {  # everyday names for Unicode names that hardly anybody types, or that contradict the usual images
    "aubergine": "eggplant",
    "black diamond suit": "diamond suit",
    "black heart suit": "heart suit",
    "ear of maize": "corn",
    "extraterrestrial alien": "alien",
    "heavy black heart": "red heart",
    "hocho": "kitchen knife",
    "house building": "house",
    "izakaya lantern": "red paper lantern",
    "lady beetle": "ladybug",
    "snowman without snow": "snowman",
}

_FIELDS = {"category": str, "image": str, "short_name": str, "sheet_x": int, "sheet_y": int}

Entry = dict[str, Any]


@dataclass(frozen=True)
class Package:
    """The needed files of a package by their path in it, and the name of its set of images, such as "google"."""

    files: dict[str, bytes]
    images: str

    def image(self, entry: Entry) -> tuple[bytes, int]:
        """Returns the PNG of an emoji and its number of pixels per side. Raises ValueError if it is missing."""
        path = f"img/{self.images}/64/{entry['image']}"
        if path in self.files:
            return self.files[path], NATIVE_SIZE
        if self._sheet is None:
            raise ValueError(f"the package has no {path}; {HOW_TO_GET}")
        left, top = (entry[axis] * (SHEET_SIZE + 2) + 1 for axis in ("sheet_x", "sheet_y"))
        if max(left + SHEET_SIZE, top + SHEET_SIZE) > min(self._sheet.size) or min(left, top) < 0:
            raise ValueError(f"the sheet of {self.images} has no cell for {entry['image']}; {HOW_TO_GET}")
        return _png(self._sheet.crop((left, top, left + SHEET_SIZE, top + SHEET_SIZE))), SHEET_SIZE

    @cached_property
    def _sheet(self) -> Image.Image | None:
        data = self.files.get(f"img/{self.images}/sheets/32.png")
        if data is None:
            return None
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise ValueError(f"it has {image.width} x {image.height} pixels")
                return image.convert("RGBA")
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"the sheet of {self.images} is not a readable PNG ({error}); {HOW_TO_GET}") from error


def run(args: argparse.Namespace) -> None:
    """Writes the shards and the package's licence. Raises ValueError or OSError on failure."""
    package = read_package(args.source, args.images)
    entries = selected(_entries(package.files), args.include, args.exclude)
    names = {} if args.unicode_names else EVERYDAY
    present = [entry for entry in entries if entry.get(f"has_img_{package.images}", True)]
    samples = [sample(entry, package.image, args.size, names) for entry in present]
    shards = [samples[i : i + args.shard_size] for i in range(0, len(samples), args.shard_size)]
    paths = [args.out / f"emoji-{k:05d}.tar" for k in range(len(shards))]
    others = sorted(set(args.out.glob("emoji-*.tar")) - set(paths))
    if others:
        raise ValueError(f"{args.out} already has {others[0].name} of another run: empty the folder first")
    contents = {path: tar_of(shard) for path, shard in zip(paths, shards, strict=True)}
    contents[args.out / "LICENSE.emoji-datasource"] = package.files["LICENSE"]
    foreign = [path for path, data in contents.items() if path.exists() and not _has_content(path, data)]
    refuse(foreign, "this command", "empty the folder, or give another --out")
    for path in [path for path in contents if not path.exists()]:
        write_bytes(path, contents[path])
    print(f"wrote {len(samples):,} emoji in {len(shards)} shards to {args.out}")
    if len(present) < len(entries):
        print(f"skipped {len(entries) - len(present):,} emoji of which {package.images} has no image")


def _has_content(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def read_package(source: Path, images: str | None = None) -> Package:
    """Reads the needed files. Raises ValueError if `source` is not a package of the family or lacks these `images`."""
    if source.is_dir():
        listed = ((p.relative_to(source).as_posix(), p) for p in sorted(source.rglob("*")) if p.is_file())
        files = {name: path.read_bytes() for name, path in listed if _WANTED.fullmatch(name)}
    elif source.is_file():
        files = _read_tarball(source)
    else:
        raise FileNotFoundError(f"no file or folder at {source}: {HOW_TO_GET}")
    missing = {"emoji.json", "package.json", "LICENSE"} - files.keys()
    if missing:
        raise ValueError(f"{source} is not a package of {FAMILY}: it has no {min(missing)}; {HOW_TO_GET}")
    package = _json(files, "package.json")
    name = package.get("name") if isinstance(package, dict) else None
    match = re.fullmatch(rf"{FAMILY}(?:-(\w+))?", str(name))
    if match is None:
        raise ValueError(f"{source} is the package {name}, not one of {FAMILY}; {HOW_TO_GET}")
    sets = [match[1]] if match[1] else sorted({found[1] for path in files if (found := SHEETS.fullmatch(path))})
    chosen = images or match[1]
    if chosen not in sets:
        given = f"--images {images}" if images else "no --images"
        raise ValueError(f"{given}: {name} has the images of {', '.join(sets) or 'no set'}; choose one of them")
    return Package(files, chosen)


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


def _entries(files: dict[str, bytes]) -> list[Entry]:
    """Returns all emoji sorted by code point, except plain samples of skin tones. Raises ValueError for others."""
    listed = _json(files, "emoji.json")
    for entry in listed if isinstance(listed, list) else [listed]:
        if not (isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in _FIELDS.items())):
            raise ValueError(f"emoji.json in the package is not a list of emoji: {str(entry)[:80]}; {HOW_TO_GET}")
    return sorted((entry for entry in listed if entry["category"] not in _COMPONENTS), key=key_of)


def selected(entries: Sequence[Entry], include: Collection[str], exclude: Collection[str]) -> list[Entry]:
    """Returns the entries of these categories and subcategories. Raises ValueError for an unknown name, or if none."""
    names = [{entry["category"], entry.get("subcategory", "")} for entry in entries]
    known = set().union(*names)
    for name in (*include, *exclude):
        if name not in known:
            raise UsageError(
                f"no category or subcategory is called {name!r}; known are {', '.join(sorted(known - {''}))}"
            )
    kept = [
        entry
        for entry, own in zip(entries, names, strict=True)
        if (not include or own & set(include)) and not own & set(exclude)
    ]
    if not kept:
        raise UsageError("--include and --exclude leave no emoji")
    return kept


def key_of(entry: Entry) -> str:
    return str(entry["image"]).removesuffix(".png")


def caption_of(entry: Entry, names: Mapping[str, str]) -> str:
    """Returns the lower-case Unicode name, or what `names` has for it.

    Old packages lack some Unicode names; their emoji get the short name.
    """
    name = str(entry.get("name") or entry["short_name"].replace("_", " ")).lower()
    return names.get(name, name)


def sample(
    entry: Entry, image_of: Callable[[Entry], tuple[bytes, int]], size: int, names: Mapping[str, str]
) -> dict[str, bytes]:
    """Maps member names to contents: the image, its caption and metadata."""
    key, caption = key_of(entry), caption_of(entry, names)
    image, native = image_of(entry)
    kept: Entry = {field: entry[field] for field in ("category", "subcategory", "short_name") if field in entry}
    metadata = {"caption": caption, **kept, "width": size, "height": size}
    return {
        f"{key}.png": image if size == native else resize_png(image, size),
        f"{key}.txt": caption.encode(),
        f"{key}.json": json.dumps(metadata).encode(),
    }


def resize_png(data: bytes, size: int) -> bytes:
    """Scales a PNG to `size` and keeps its transparency."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return _png(image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()

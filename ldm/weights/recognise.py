"""Recognises the networks at a path, in any supported format, from file names and headers alone."""

import errno
import re
from pathlib import Path

from ldm.weights.compvis.reader import ReadOptions, read_file
from ldm.weights.diffusers.reader import STEMS, networks_of, part_contents, read_folder
from ldm.weights.info import ContentsInfo
from ldm.weights.kinds import ADAPTER, BACKBONES
from ldm.weights.storage.tensors import locate

DEFAULT = "shapes"
READABLE = (
    "a run folder, a .ckpt or .safetensors of ldm or of Stable Diffusion 1.x or 2.x, a diffusers folder, or "
    f"{DEFAULT!r}, the model that ships with ldm"
)


# Errors that settings of the wrong type or shape may raise where they are read.
MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def recognise(path: str | Path, options: ReadOptions = ReadOptions(), variant: str | None = None) -> ContentsInfo:  # noqa: B008 - a constant
    """Describes the networks at `path` without reading tensors; "shapes" is the model that ships with ldm.

    Raises FileNotFoundError or ValueError with a one-sentence message if nothing usable is there.
    """
    if "\0" in str(path):
        raise FileNotFoundError(f"there is no model {str(path)[:60]!r}, which cannot be a path; give {READABLE}")
    try:
        return _recognised(path, options, variant)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise FileNotFoundError(f"there is no model {str(path)[:60]}…; give {READABLE}") from error
    except MALFORMED as error:
        raise ValueError(
            f"{path} holds settings that are not those of a model ({type(error).__name__}: {error}); download or "
            "export it again"
        ) from error


def _recognised(path: str | Path, options: ReadOptions, variant: str | None) -> ContentsInfo:
    if str(path) == DEFAULT:
        return read_file(_default())
    if str(path).startswith("assets:"):
        return read_file(locate(path))
    file = Path(path).expanduser()
    if file.is_dir():
        return _folder(file, options, variant)
    if not file.is_file():
        raise FileNotFoundError(f"there is no model {path}; {_fetching(str(path))}give {READABLE}")
    config = file.parent / "config.json"
    if re.match(rf"({'|'.join(STEMS)})\.", file.name) and config.is_file():
        return part_contents(file, networks_of(config, file))
    return read_file(file, options)


def _fetching(path: str) -> str:
    """Returns how to fetch a repository of Hugging Face, if the path looks like the name of one."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) or Path(path).parent.exists():
        return ""
    if Path(path).suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth"):
        return ""
    name = path.partition("/")[2]
    return (
        "nothing is downloaded by ldm: fetch a repository of Hugging Face with `hf download "
        f"{path} --local-dir {name}` and give {name}; otherwise "
    )


def _default() -> Path:
    try:
        return locate("assets:unet.safetensors")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "this copy of ldm does not include the default model: run `python train.py` and give model=RUN_DIR"
        ) from error


def _folder(folder: Path, options: ReadOptions, variant: str | None) -> ContentsInfo:
    if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
        return read_folder(folder, variant)
    names = [f"{kind}.safetensors" for kind in (*BACKBONES, ADAPTER)]
    found = [
        file for file in (folder / "checkpoints" / "last.ckpt", *(folder / name for name in names)) if file.is_file()
    ]
    for file, others in ((file, found[index + 1 :]) for index, file in enumerate(found)):
        contents = read_file(file, options)
        if not (others and contents.model.get("text_encoder", {}).get("trained")):  # only exported files contain it
            return contents
    raise FileNotFoundError(
        f"the folder {folder} contains none of checkpoints/last.ckpt, {', '.join(names)}, model_index.json and "
        "config.json; give the folder of a run that has saved a checkpoint, or of a diffusers model"
    )

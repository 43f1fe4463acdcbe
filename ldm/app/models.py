"""The models that a page offers: the one that ships, and those inside one folder."""

from collections.abc import Iterator
from pathlib import Path

from ldm.pipeline.settings import Settings, model_settings
from ldm.weights.model import open_model
from ldm.weights.recognise import DEFAULT

SUFFIXES = (".safetensors", ".ckpt")


def offered(folder: str | None) -> tuple[dict[str, str], list[str]]:
    """Names with their paths, and why what looks like a model is left out. Nothing outside of `folder` is offered.

    Raises NotADirectoryError where that is no folder.
    """
    models: dict[str, str] = {DEFAULT: DEFAULT}
    refusals: list[str] = []
    if folder is None:
        return models, refusals
    top = Path(folder).expanduser()
    if not top.is_dir():
        raise NotADirectoryError(f"--models {folder} is no folder; give the one that your models lie in")
    for path, refusal in candidates(top):
        if not path.resolve().is_relative_to(top.resolve()):
            refusals.append(f"{path} leads out of {folder}")
        elif refusal is None:
            models[str(path.relative_to(top))] = str(path)
        else:
            refusals.append(refusal)
    return models, refusals


def candidates(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Every model below the folder, with what is wrong with it; a folder that is one is not looked into."""
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir()
        if path.name.startswith(".") or not (is_folder or path.suffix in SUFFIXES):
            continue
        try:
            settings_of(str(path))
        except FileNotFoundError as error:
            if not is_folder:
                yield path, str(error)
            elif not path.is_symlink():  # which could lead round in a circle
                yield from candidates(path)
        except (ValueError, OSError) as error:
            yield path, str(error)
        else:
            yield path, None


def settings_of(path: str) -> Settings:
    """How the model draws unless it is told otherwise, without reading its tensors."""
    return model_settings(open_model(path).model, path)

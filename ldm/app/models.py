"""Finds the models that a page offers: the built-in one and those inside one folder."""

from collections.abc import Iterator
from pathlib import Path

from ldm.data.sources.shapes import held_out_prompts
from ldm.pipeline.settings import Settings, model_settings
from ldm.weights.model import open_model
from ldm.weights.recognise import DEFAULT

SUFFIXES = (".safetensors", ".ckpt")
INCLUDED = "assets:text_tower.safetensors"
EXAMPLES = 4
PLAIN = ("a red circle", "a cat face", "a slice of pizza")  # what the included model understands, but no other


def find_models(folder: str | None) -> tuple[dict[str, str], list[str]]:
    """Returns paths of models by name, and the reasons why others were skipped. Offers nothing outside `folder`.

    Raises NotADirectoryError if `folder` is not a folder.
    """
    models: dict[str, str] = {DEFAULT: DEFAULT}
    skipped: list[str] = []
    if folder is None:
        return models, skipped
    top = Path(folder).expanduser()
    if not top.is_dir():
        raise NotADirectoryError(f"--models {folder} is not a folder; give the folder that holds your models")
    for path, reason in candidates(top):
        if not path.resolve().is_relative_to(top.resolve()):
            skipped.append(f"{path} links outside {folder}")
        elif reason is None:
            models[str(path.relative_to(top))] = str(path)
        else:
            skipped.append(reason)
    return models, skipped


def candidates(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yields every model below the folder, with an error message if it is unreadable; does not search inside models."""
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir()
        if path.name.startswith(".") or not (is_folder or path.suffix in SUFFIXES):
            continue
        try:
            default_settings(str(path))
        except FileNotFoundError as error:
            if not is_folder:
                yield path, str(error)
            elif not path.is_symlink():  # a link could point to a parent folder
                yield from candidates(path)
        except (ValueError, OSError) as error:
            yield path, str(error)
        else:
            yield path, None


def examples(path: str) -> list[str]:
    """Returns prompts that the model understands, or none if it has another text encoder than the included one.

    Shapes are described by captions that it was not trained on.
    """
    encoder = (open_model(path).model or {}).get("text_encoder", {})
    if encoder.get("weights") != INCLUDED:
        return []
    return [*(PLAIN if path == DEFAULT else ()), *held_out_prompts(EXAMPLES)]


def default_settings(path: str) -> Settings:
    """Returns the default settings of a model, without reading its tensors."""
    return model_settings(open_model(path).model, path)

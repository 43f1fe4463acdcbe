"""Recognises adapters and textual inversions by the names in files, without reading tensors."""

from pathlib import Path

from ldm.weights.about import about_of
from ldm.weights.adapters.layouts import is_adapter
from ldm.weights.kinds import ADAPTER
from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.tensors import PICKLED, Tensors

ADAPTERS = (  # in folders of ldm, of diffusers and of peft
    "adapter.safetensors",
    *("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
    *("adapter_model.safetensors", "adapter_model.bin"),
)
EMBEDDINGS = ("embedding.safetensors", "learned_embeds.safetensors", "learned_embeds.bin")
MODELS = ("model_index.json", "config.json")  # a folder with one of these files is a model, whatever else it contains
LARGEST = 2**25  # bytes of a textual inversion, enough for thousands of vectors


def adapter_at(path: str | Path) -> Path:
    """Returns the adapter file at a path or in a folder. Raises FileNotFoundError if there is none."""
    return _at(path, ADAPTERS, "adapter")


def embedding_at(path: str | Path) -> Path:
    """Returns the textual inversion file at a path or in a folder. Raises FileNotFoundError if there is none."""
    return _at(path, EMBEDDINGS, "textual inversion")


def _at(path: str | Path, names: tuple[str, ...], what: str) -> Path:
    place = Path(path).expanduser()
    if place.is_dir():
        for name in names:
            if (place / name).is_file():
                return place / name
        raise FileNotFoundError(f"the folder {path} holds no {what}: none of {', '.join(names)}")
    if not place.is_file():
        raise FileNotFoundError(f"there is no {what} {path}; give a file, or the folder of a run that trained one")
    return place


def has_adapter(path: str | Path) -> bool:
    """Returns whether a path contains an adapter that `open_adapter` reads, rather than a model."""
    return (found := _opened(path, ADAPTERS)) is not None and is_adapter(found)


def is_run_of_adapter(path: str | Path) -> bool:
    """Returns whether an adapter was trained by ldm, so that its file names its base and how to sample."""
    return (found := _opened(path, ADAPTERS)) is not None and about_of(found).get("kind") == ADAPTER


def has_embedding(path: str | Path) -> bool:
    """Returns whether a path contains a textual inversion, judging by names, shapes and size."""
    found = _opened(path, EMBEDDINGS)
    if found is None or found.nbytes > LARGEST:
        return False
    names = set(found)
    is_one = len(names) == 1 and all(len(header.shape) <= 2 and header.is_float for header in found.values())
    return "string_to_param" in found.metadata or is_one or (bool(names) and names <= {"clip_l", "clip_g"})


def _opened(path: str | Path, names: tuple[str, ...]) -> Tensors | None:
    place = Path(path).expanduser()
    if place.is_dir() and any((place / name).is_file() for name in MODELS):
        return None
    try:
        file = _at(path, names, "file")
        return open_tensors(file) if file.suffix in (".safetensors", *PICKLED) else None
    except (OSError, ValueError):
        return None

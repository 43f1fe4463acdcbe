"""Names the formats in which models are written, and chooses one for a path."""

from pathlib import Path

from ldm.weights.storage.tensors import PICKLED

FORMATS = ("single", "diffusers", "ldm")


def format_of(path: Path) -> str:
    """Returns "single" for a path with the extension of a weights file, "diffusers" for one without an extension.

    Raises ValueError for another extension.
    """
    if path.suffix in (".safetensors", *PICKLED):
        return "single"
    if path.suffix and not path.is_dir():
        raise ValueError(
            f"{path} ends in {path.suffix}, but weights are written to a .safetensors, .ckpt or folder; give one"
        )
    return "diffusers"

"""What `ldm evaluate --data` stands for: prompts to draw, and real pictures to compare with."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ldm.data.latents.cache import MANIFEST, CachedLatents, Decoded
from ldm.data.sources.folder import Folder
from ldm.data.sources.shapes import Shapes, held_out_prompts
from ldm.data.sources.shards import Shards
from ldm.data.sources.split import Split
from ldm.data.sources.tolerant import Tolerant
from ldm.weights.model import frozen_parts, open_model

SHAPES, SHAPES_SEED, SHAPES_SIZE = "shapes", 2, 64  # as conf/metrics/shapes.yaml has them


@dataclass(frozen=True)
class Data:
    """`pictures` are real, with captions; `prompts` is given where other captions than theirs are drawn."""

    pictures: Dataset[dict[str, Any]]
    prompts: list[str] | None = None

    @property
    def most(self) -> int:
        """How many prompts there are."""
        return len(self.pictures) if self.prompts is None else len(self.prompts)  # type: ignore[arg-type]

    def captions(self, ids: range) -> list[str]:
        if self.prompts is not None:
            return self.prompts[ids.start : ids.stop]
        return [self.pictures[i]["caption"] for i in ids]


class WarnsOfReplacements(Dataset[dict[str, Any]]):
    """`dataset`, with a warning where another sample had to take the place of one that cannot be read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {**self.dataset[index]}
        for reason in sample.pop("bad"):
            warnings.warn(f"another picture takes the place of one that cannot be read: {reason}", stacklevel=2)
        return sample


def data_of(name: str, size: tuple[int, int], model: str, held_out: int, prompts: int, count: int) -> Data:
    """`shapes`, a cache of latents, a folder of pictures, or shards; of these one in `held_out`, or all for 0.

    Latents are decoded in float32, in whatever precision the model draws. Raises ValueError or FileNotFoundError for
    what cannot be compared with pictures of this size.
    """
    if name == SHAPES:
        if size != (SHAPES_SIZE, SHAPES_SIZE):
            raise ValueError(
                f"shapes are {SHAPES_SIZE}x{SHAPES_SIZE} pixels, but the model draws {size[0]}x{size[1]}; give --data "
                "a folder or shards of pictures that are like those it was trained on"
            )
        return Data(Shapes(SHAPES_SEED, "held_out", length=count), held_out_prompts(prompts))
    if size[0] != size[1]:
        raise ValueError(f"pictures are read as squares, but the model draws {size[0]}x{size[1]}")
    if (Path(name) / MANIFEST).is_file():
        stage, _ = frozen_parts(open_model(model))
        latents = CachedLatents(name, stage, size)
        chosen: Any = Split(latents, "held_out", held_out) if held_out else latents
        return Data(Decoded(chosen, stage))
    folder = Path(name).is_dir() and not any(Path(name).glob("*.tar"))
    pictures = Folder(name, size[0]) if folder else Shards(name, size[0])
    chosen = Split(pictures, "held_out", held_out) if held_out else pictures
    return Data(WarnsOfReplacements(Tolerant(chosen)))

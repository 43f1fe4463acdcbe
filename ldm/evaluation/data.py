"""Opens the data of `ldm evaluate --data`: prompts, and real images for comparison."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset

from ldm.data.latents.cache import MANIFEST, CachedLatents, Decoded, undecoded
from ldm.data.sources.folder import Folder
from ldm.data.sources.shapes import Shapes, held_out_prompts
from ldm.data.sources.shards import Shards
from ldm.data.sources.split import Split, SplitHash
from ldm.data.sources.tolerant import Tolerant
from ldm.weights.model import load_frozen_parts, open_model

SHAPES, SHAPES_SEED, SHAPES_SIZE = "shapes", 2, 64  # the same as in conf/metrics/shapes.yaml


@dataclass(frozen=True)
class Data:
    """Real images with captions. `prompts`, if given, replace the captions as the prompts."""

    images: Dataset[dict[str, Any]]
    prompts: list[str] | None = None

    @property
    def prompt_count(self) -> int:
        return len(self.images) if self.prompts is None else len(self.prompts)  # type: ignore[arg-type]

    def captions(self, ids: range) -> list[str]:
        if self.prompts is not None:
            return self.prompts[ids.start : ids.stop]
        return [undecoded(self.images)[i]["caption"] for i in ids]


class WarnOnReplacement(Dataset[dict[str, Any]]):
    """Wraps a dataset and warns for every sample that replaces an unreadable one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {**self.dataset[index]}
        for reason in sample.pop("bad"):
            warnings.warn(f"an unreadable image was replaced by another: {reason}", stacklevel=2)
        return sample


def open_data(
    name: str, size: tuple[int, int], model: str, held_out: int, prompts: int, count: int, device: torch.device
) -> Data:
    """Opens `shapes`, a cache of latents, a folder of images, or shards; one in `held_out` samples, or all for 0.

    Latents are decoded on `device` in float32, independent of the model's precision. Raises ValueError or
    FileNotFoundError for data that cannot be read or compared with images of this size.
    """
    if name == SHAPES:
        if size != (SHAPES_SIZE, SHAPES_SIZE):
            raise ValueError(
                f"shapes are {SHAPES_SIZE}x{SHAPES_SIZE} pixels, but the model's are {size[0]}x{size[1]}; give --data "
                "a folder or shards of images similar to its training data"
            )
        return Data(Shapes(SHAPES_SEED, "held_out", length=count), held_out_prompts(prompts))
    if size[0] != size[1]:
        raise ValueError(
            f"images are read as squares, but the model's are {size[0]}x{size[1]}; give a model of square images"
        )
    if (Path(name) / MANIFEST).is_file():
        stage, _ = load_frozen_parts(open_model(model))
        latents = CachedLatents(name, stage, size, purpose="reference")
        chosen: Any = Split(latents, "held_out", held_out, split_hash_of(model)) if held_out else latents
        return Data(Decoded(chosen, stage, device))
    folder = Path(name).is_dir() and not any(Path(name).glob("*.tar"))
    images = Folder(name, size[0]) if folder else Shards(name, size[0])
    chosen = Split(images, "held_out", held_out, split_hash_of(model)) if held_out else images
    return Data(WarnOnReplacement(Tolerant(chosen)))


def split_hash_of(model: str) -> SplitHash:
    """Returns how the run that trained the model split its data, which earlier runs do not record.

    A file outside a run's folder counts as trained with the current split.
    """
    folders = [Path(model), *Path(model).resolve().parents[:2]]  # candidates for the run's folder
    configs = [folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()]
    try:
        config = yaml.safe_load(configs[0].read_text("utf-8")) if configs else {"data": {"split_hash": "mixed"}}
    except yaml.YAMLError as error:
        raise ValueError(f"{configs[0]} cannot be read: {' '.join(str(error).split())}") from error
    recorded = config.get("data") if isinstance(config, dict) else None
    return "mixed" if isinstance(recorded, dict) and recorded.get("split_hash") == "mixed" else "crc32"

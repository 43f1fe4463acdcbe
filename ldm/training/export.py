"""The files that a finished run exports."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ldm.adapters.targets import low_rank_layers
from ldm.adapters.text import TextualInversion
from ldm.training.trained_model import PREFIX, TrainedModel
from ldm.weights.adapters.export import exported
from ldm.weights.native import fingerprint


@dataclass(frozen=True)
class ExportedFile:
    """A file that a run exports: its name, its tensors, and its metadata (at least "kind" and "config")."""

    name: str
    state: dict[str, Tensor]
    about: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)  # for other tools


def model_files(model: TrainedModel, facts: Callable[[], dict[str, str]]) -> list[ExportedFile]:
    """Returns the trained parts of a model as files; `facts` are kohya's metadata of an adapter's training."""
    about, frozen = model.about(), model.frozen()
    if isinstance(model.adapter, TextualInversion):
        (vectors,) = model.adapter.trained(model.text_encoder)
        return [ExportedFile("embedding", {model.adapter.token: vectors}, {**about, "kind": "embedding"})]
    state = {name: tensor for name, tensor in model.backbone.state_dict().items() if PREFIX + name not in frozen}
    if layers := low_rank_layers(model.backbone):
        towers = {tower: low_rank_layers(tower) for tower in model.text_encoder.towers}
        return [ExportedFile(about["kind"], *exported(state, layers, about, facts(), towers))]
    if not model.trains_text:
        return [ExportedFile(about["kind"], state, about)]
    (tower,), (tokenizer,) = model.text_encoder.towers, model.text_encoder.tokenizers
    text = tower.state_dict()
    source = {"weights": "./text_tower.safetensors", "fingerprint": fingerprint(text)}
    text_about = {"kind": "text_tower", "config": tower.config, "pad": tokenizer.pad}
    return [
        ExportedFile("text_tower", text, text_about),
        ExportedFile(about["kind"], state, about | {"model": about["model"] | {"text_encoder": source}}),
    ]

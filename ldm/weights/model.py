"""A whole model: its networks, and as plain data all else that sampling needs.

Nothing in a file is ever run: classes come from a closed list, and checkpoints are read with weights_only=True.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldm.adapters.adapter import from_config
from ldm.nn.backbone import Backbone, trainable
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.weights.compvis.reader import Choices
from ldm.weights.contents import Contents, StoredNetwork
from ldm.weights.find import DEFAULT, find
from ldm.weights.keymaps import NATIVE
from ldm.weights.kinds import ADAPTER, BACKBONES
from ldm.weights.native import save_network
from ldm.weights.parts import Frozen, first_stage_in, text_encoder_in
from ldm.weights.storage.tensors import refuse_misfits
from ldm.weights.storage.values import check_finite, held

NEEDED = {"schedule", "prediction", "time", "size", "sampling"}
PARTS = ("first_stage", "text_encoder")  # which a model of ours names with their fingerprints

State = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """The networks; about["model"] says how to sample."""

    source: str
    about: dict[str, Any]
    backbone: Backbone
    first_stage: Frozen[VAE]
    text_encoder: Frozen[TextEncoder]


def save_model(path: str | Path, state: State, about: dict[str, Any]) -> None:
    """Write a native file of the denoising network's weights. Raises ValueError where `about` is incomplete."""
    check_model(path, about.get("kind"), about.get("model"), native=True)
    save_network(path, about["kind"], about["config"], state, model=about["model"])


def find_model(path: str | Path = DEFAULT, choices: Choices = Choices()) -> Contents:  # noqa: B008 - a constant
    """What `read_model` would read, without its tensors."""
    contents = find(path, choices)
    kind = contents.backbone or next(iter(contents.networks))
    check_model(contents.source, kind, contents.model, native=contents.networks[kind].layout == NATIVE)
    return contents


def read_model(
    path: str | Path = DEFAULT,
    dtype: torch.dtype | None = torch.float32,
    choices: Choices = Choices(),  # noqa: B008 - a constant
    device: str | torch.device = "cpu",
    channels_last: bool = False,
) -> Model:
    """The model at `path`, see `find`; its denoising network in `dtype` (None: the file's), see `StoredNetwork.load`.

    Its frozen parts are in float32 on the CPU, as their fingerprints are taken.
    Raises FileNotFoundError or ValueError, in one sentence, for what is not there or cannot be used.
    """
    contents = find_model(path, choices)
    network = base_of(contents).denoising if ADAPTER in contents.networks else contents.denoising
    backbone = cast(Backbone, network.load(dtype, device, channels_last))
    if ADAPTER in contents.networks:
        adapt(backbone, contents.networks[ADAPTER])
    stage, text = frozen_parts(contents)
    sources = {"first_stage": stage.source, "text_encoder": text.source}
    about = {"kind": backbone.kind, "config": backbone.config, "model": sources | contents.model}
    return Model(str(path), about, backbone, stage, text)


def model_fingerprint(path: str | Path = DEFAULT) -> str:
    """SHA-256 of all that decides what the model at `path` draws: weights, architecture, schedule and prediction."""
    contents = find_model(path)
    adapted = ADAPTER in contents.networks
    network, model = base_of(contents).denoising if adapted else contents.denoising, contents.model
    stage, text = frozen_parts(contents)
    decisive = {
        network.kind: [network.fingerprint, network.full_config],
        **({ADAPTER: _of_adapter(contents.networks[ADAPTER])} if adapted else {}),
        "first_stage": [stage.source["fingerprint"], stage.network.config],
        "text_encoder": [text.source["fingerprint"], *(tower.config for tower in text.network.towers)],
        "diffusion": [model["schedule"], model["prediction"], model["time"]],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _of_adapter(adapter: StoredNetwork) -> list[Any]:
    return [adapter.fingerprint, adapter.config]


def check_model(source: object, kind: str | None, model: Any, native: bool) -> None:
    """Raises ValueError where it is no whole model or does not say how to sample; one of ours names its parts too."""
    if kind not in (*BACKBONES, ADAPTER):
        raise ValueError(f"{source} holds a {kind}, but a model is needed here; give a file of one, or a run")
    missing = (
        sorted((NEEDED | (set(PARTS) if native else set())) - set(model)) if isinstance(model, dict) else ["model"]
    )
    if missing:
        raise ValueError(
            f"{source} does not say how to sample from it (it lacks {', '.join(missing)}); "
            "save it again from its run, or give the whole model"
        )


def base_of(contents: Contents) -> Contents:
    """The model that an adapter was trained on. Raises FileNotFoundError or ValueError where it is another today."""
    base = contents.base
    try:
        found = find(base["weights"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{contents.source} is an adapter of {base['weights']}, which is not there: put the file back"
        ) from error
    if found.denoising.fingerprint != base["fingerprint"]:
        raise ValueError(
            f"{contents.source} is an adapter of another {base['weights']} than that of today: put back the file whose "
            f"fingerprint begins with {base['fingerprint'][:12]}"
        )
    return found


def adapt(backbone: Backbone, stored: StoredNetwork) -> None:
    """Changes the network as the stored adapter says, and fills in what was trained.

    Raises ValueError for tensors that are missing, unexpected, of another shape or not finite.
    """
    adapter = from_config(stored.config)
    adapter.adapt(backbone)
    trained, source = trainable(backbone), stored.tensors.source
    shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
    refuse_misfits(
        source,
        "adapter",
        missing=trained.keys() - shapes.keys(),
        unexpected=shapes.keys() - trained.keys(),
        misshapen=[
            f"{name} {list(shapes[name])} instead of {list(weight.shape)}"
            for name, weight in trained.items()
            if name in shapes and tuple(shapes[name]) != tuple(weight.shape)
        ],
    )
    for name, tensor in stored.tensors.read(shapes).items():
        check_finite(name, tensor, source)
        trained[name].data = torch.empty_like(trained[name]).copy_(tensor)
    adapter.merge(backbone)


def with_trained(path: str | Path, trained: State) -> State:
    """The weights of a run's network with others in place of those that it trained, such as an average of them.

    Of an adapter's run `trained` holds what the adapter trains, and the result is the whole network, merged.
    """
    contents = find_model(path)
    if ADAPTER not in contents.networks:
        return trained
    backbone = cast(Backbone, base_of(contents).denoising.load())
    adapt(backbone, replace(contents.networks[ADAPTER], tensors=held(contents.source, trained)))
    return backbone.state_dict()


def references(model: dict[str, Any]) -> bool:
    """Whether it only names its frozen parts, as a model of ours does, instead of holding them."""
    return "first_stage" in model


def frozen_parts(contents: Contents) -> tuple[Frozen[VAE], Frozen[TextEncoder]]:
    """The frozen parts beside a denoising network, or those that a model of ours was trained with, and no others."""
    if not references(contents.model):
        return first_stage_in(contents), text_encoder_in(contents)
    stage_at, text_at = (referenced(contents, name) for name in PARTS)
    stage, text = first_stage_in(*stage_at), text_encoder_in(*text_at)
    for name, source in zip(PARTS, (stage.source, text.source), strict=True):
        check_same(contents, name, source["fingerprint"])
    return stage, text


def referenced(contents: Contents, name: str) -> tuple[Contents, str]:
    """The file of a part that a model of ours was trained with, and where it lies."""
    weights = contents.model[name]["weights"]
    if weights.startswith("./"):  # beside the model, wherever that has been moved to
        weights = str(contents.source.parent / weights)
    try:
        return find(weights), weights
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{contents.source} was trained with the {name.replace('_', ' ')} {weights}, which is not there: "
            "put the file back"
        ) from error


def check_same(contents: Contents, name: str, found: str) -> None:
    """Raises ValueError where a part has another fingerprint than the one that the model was trained with."""
    expected = contents.model[name]
    if found != expected["fingerprint"]:
        raise ValueError(
            f"{contents.source} was trained with another {name.replace('_', ' ')} than the {expected['weights']} of "
            f"today: put back the file whose fingerprint begins with {expected['fingerprint'][:12]}"
        )

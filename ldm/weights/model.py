"""Loads and saves complete models: their networks, and everything else that sampling needs, as plain data.

Nothing in a file is ever run: classes come from a closed list, and checkpoints are read with weights_only=True.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldm.adapters.adapter import from_config
from ldm.adapters.change import Change
from ldm.adapters.merging import merge
from ldm.nn.backbone import Backbone, trainable
from ldm.nn.clip import TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.weights.adapters.names import TEXT
from ldm.weights.adapters.own import TEXT_PREFIX
from ldm.weights.adapters.reader import open_adapter
from ldm.weights.adapters.recognise import has_adapter
from ldm.weights.compvis.reader import ReadOptions
from ldm.weights.contents import Contents, StoredNetwork, open_contents
from ldm.weights.keymaps import NATIVE
from ldm.weights.kinds import ADAPTER, BACKBONES
from ldm.weights.native import fingerprint, save_network
from ldm.weights.parts import Frozen, first_stage_in, text_encoder_in
from ldm.weights.recognise import DEFAULT
from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.tensors import refuse_mismatch
from ldm.weights.storage.values import check_finite, in_memory

NEEDED = {"schedule", "prediction", "time", "size", "sampling"}
PARTS = ("first_stage", "text_encoder")  # a file in ldm's own format stores their paths and fingerprints

State = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """The networks of a model; about["model"] says how to sample from them."""

    source: str
    about: dict[str, Any]
    backbone: Backbone
    first_stage: Frozen[VAE]
    text_encoder: Frozen[TextEncoder]


def save_model(path: str | Path, state: State, about: dict[str, Any]) -> None:
    """Writes the denoising network to a file in ldm's own format. Raises ValueError if `about` is incomplete."""
    check_model(path, about.get("kind"), about.get("model"), native=True)
    save_network(path, about["kind"], about["config"], state, model=about["model"])


def open_model(path: str | Path = DEFAULT, options: ReadOptions = ReadOptions()) -> Contents:  # noqa: B008 - a constant
    """Opens the model that `read_model` would load, without reading its tensors."""
    contents = open_contents(path, options)
    kind = contents.backbone or next(iter(contents.networks))
    check_model(contents.source, kind, contents.model, native=contents.networks[kind].layout == NATIVE)
    return contents


def read_model(
    path: str | Path = DEFAULT,
    dtype: torch.dtype | None = torch.float32,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - a constant
    device: str | torch.device = "cpu",
    channels_last: bool = False,
) -> Model:
    """Loads the model at `path` (see `recognise`), its denoising network as `StoredNetwork.load` does.

    The frozen parts are loaded in float32 on the CPU, in which their fingerprints are computed.
    Raises FileNotFoundError or ValueError with a one-sentence message if the model is missing or unusable.
    """
    contents = open_model(path, options)
    for guess in contents.guesses:
        warnings.warn(f"{contents.source}: {guess}", stacklevel=2)
    network = open_base(contents).denoising if ADAPTER in contents.networks else contents.denoising
    backbone = cast(Backbone, network.load(dtype, device, channels_last))
    if ADAPTER in contents.networks:
        apply_adapter(backbone, contents.networks[ADAPTER])
    stage, text = load_frozen_parts(contents)
    if ADAPTER in contents.networks and (changes := text_changes(contents, text.network.towers[0])):
        merge(text.network.towers[0], {layer: [(change, 1.0)] for layer, change in changes.items()})
    sources = {"first_stage": stage.source, "text_encoder": text.source}
    about = {"kind": backbone.kind, "config": backbone.config, "model": sources | contents.model}
    return Model(str(path), about, backbone, stage, text)


def model_fingerprint(path: str | Path = DEFAULT) -> str:
    """Returns the SHA-256 of everything that determines samples: weights, architecture, schedule and prediction."""
    contents = open_model(path)
    adapted = ADAPTER in contents.networks
    network, model = open_base(contents).denoising if adapted else contents.denoising, contents.model
    stage, text = load_frozen_parts(contents)
    decisive = {
        network.kind: [network.fingerprint, network.full_config],
        **({ADAPTER: _identity(contents)} if adapted else {}),
        "first_stage": [stage.source["fingerprint"], stage.network.config],
        "text_encoder": [text.source["fingerprint"], *(tower.config for tower in text.network.towers)],
        "diffusion": [model["schedule"], model["prediction"], model["time"]],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _identity(contents: Contents) -> list[Any]:
    adapter = contents.networks[ADAPTER]
    if contents.source.suffix == ".ckpt":
        return [adapter.fingerprint, adapter.config]
    tensors = open_tensors(contents.source)
    text = tensors.read([name for name in tensors if name.startswith(TEXT_PREFIX)])
    return [adapter.fingerprint, adapter.config, *([fingerprint(dict(text))] if text else [])]


def check_model(source: object, kind: str | None, model: Any, native: bool) -> None:
    """Raises ValueError if the model is incomplete or lacks sampling settings.

    A `native` file must also name its frozen parts.
    """
    if kind not in (*BACKBONES, ADAPTER):
        raise ValueError(f"{source} holds a {kind}, but a model is needed here; give the file of a model, or a run")
    missing = (
        sorted((NEEDED | (set(PARTS) if native else set())) - set(model)) if isinstance(model, dict) else ["model"]
    )
    if missing:
        raise ValueError(
            f"{source} does not say how to sample from it (it lacks {', '.join(missing)}); "
            "save it again from its run, or give the complete model"
        )


def open_base(contents: Contents) -> Contents:
    """Opens the model that an adapter was trained on.

    Raises FileNotFoundError if it is missing, ValueError if it has changed since.
    """
    base = contents.base
    try:
        opened = open_contents(base["weights"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{contents.source} is an adapter of {base['weights']}, which does not exist: restore the file"
        ) from error
    if opened.denoising.fingerprint != base["fingerprint"]:
        raise ValueError(
            f"{contents.source} is an adapter of {base['weights']}, which has changed since: restore the file whose "
            f"fingerprint begins with {base['fingerprint'][:12]}"
        )
    return opened


def apply_adapter(backbone: Backbone, stored: StoredNetwork) -> None:
    """Adapts the network as the stored adapter's config says, and loads the trained tensors into it.

    Raises ValueError for tensors that are missing, unexpected, of the wrong shape or not finite.
    """
    adapter = from_config(stored.config)
    adapter.adapt(backbone)
    trained, source = trainable(backbone), stored.tensors.source
    shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
    refuse_mismatch(
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


def text_changes(contents: Contents, tower: TextTower) -> dict[str, Change]:
    """Returns the changes of the text encoder's layers in an adapter that was trained with it; none in a checkpoint."""
    if contents.source.suffix == ".ckpt" or not has_adapter(contents.source):
        return {}
    return open_adapter(contents.source).changes_for(TEXT, tower)


def with_trained(path: str | Path, trained: State) -> State:
    """Returns the weights of a run's network with its trained weights replaced by `trained`, such as an average.

    For an adapter's run, `trained` holds the adapter's weights, and the result is the full network, merged.
    """
    contents = open_model(path)
    if ADAPTER not in contents.networks:
        return trained
    backbone = cast(Backbone, open_base(contents).denoising.load())
    apply_adapter(backbone, replace(contents.networks[ADAPTER], tensors=in_memory(contents.source, trained)))
    return backbone.state_dict()


def names_frozen_parts(model: dict[str, Any]) -> bool:
    """Returns whether a model names its frozen parts, as in ldm's own format, instead of containing them."""
    return "first_stage" in model


def load_frozen_parts(contents: Contents) -> tuple[Frozen[VAE], Frozen[TextEncoder]]:
    """Loads the frozen parts of a model, from its file or from the paths that it names, which must be unchanged."""
    if not names_frozen_parts(contents.model):
        return first_stage_in(contents), text_encoder_in(contents)
    stage_at, text_at = (open_frozen_part(contents, name) for name in PARTS)
    stage, text = first_stage_in(*stage_at), text_encoder_in(*text_at)
    for name, source in zip(PARTS, (stage.source, text.source), strict=True):
        check_fingerprint(contents, name, source["fingerprint"])
    return stage, text


def open_frozen_part(contents: Contents, name: str) -> tuple[Contents, str]:
    """Opens a frozen part that a model names, and returns it with its path."""
    weights = contents.model[name]["weights"]
    if contents.model[name].get("trained"):
        raise ValueError(
            f"{contents.source} is a checkpoint of a run that also trains the {name.replace('_', ' ')}: give the "
            "file that the run exports at its end or, if it trains a new token, the base model and embedding=RUN"
        )
    if weights.startswith("./"):  # relative to the model's file, so that their folder can be moved
        weights = str(contents.source.parent / weights)
    try:
        return open_contents(weights), weights
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{contents.source} was trained with the {name.replace('_', ' ')} {weights}, which does not exist: "
            "restore the file"
        ) from error


def check_fingerprint(contents: Contents, name: str, fingerprint: str) -> None:
    """Raises ValueError if the `fingerprint` of a part differs from that of the part the model was trained with."""
    expected = contents.model[name]
    if fingerprint != expected["fingerprint"]:
        included = str(expected["weights"]).startswith("assets:")
        remedy = "use the version of ldm that included" if included else "restore"
        raise ValueError(
            f"{contents.source} was trained with the {name.replace('_', ' ')} {expected['weights']}, which has changed "
            f"since: {remedy} the file whose fingerprint begins with {expected['fingerprint'][:12]}"
        )

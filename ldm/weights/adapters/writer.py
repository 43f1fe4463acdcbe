"""Writes adapters in the layouts of kohya, which A1111 and ComfyUI read, and of diffusers and peft."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.change import Change, LowRankChange
from ldm.weights.adapters.layouts import KOHYA
from ldm.weights.adapters.names import MODEL, TEXT, TEXT_2, UNET, dotted, underscored
from ldm.weights.adapters.peft_settings import METADATA
from ldm.weights.storage.values import in_memory, write_safetensors

OURS, MARK = "ldm", json.dumps({"kind": "lora"})  # marks files written by ldm
Changes = Mapping[str, Mapping[str, Change]]  # network → layer name in diffusers or transformers → change
State = dict[str, Tensor]


def write_adapter(path: Path, changes: Changes, layout: str, metadata: Mapping[str, Any]) -> None:
    """Writes a safetensors file. `metadata` is kept except for entries that only the other layout needs.

    Raises ValueError if the layout cannot store a change.
    """
    layout_only = {METADATA, *(() if layout == KOHYA else (OURS,))}
    kept = {name: value for name, value in metadata.items() if isinstance(value, str) and name not in layout_only}
    low_rank = {network: _factors(path, layers) for network, layers in changes.items()}
    state, own = (kohya if layout == KOHYA else diffusers)(low_rank)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    write_safetensors(path, in_memory(path, state), {OURS: MARK} | own | kept)


def _factors(path: Path, layers: Mapping[str, Change]) -> dict[str, LowRankChange]:
    for name, change in layers.items():
        if not isinstance(change, LowRankChange):
            raise ValueError(
                f"{path} cannot hold the change of {name}, which has no pair of factors (as those of LoHa and LoKr): "
                "merge it into a model with ldm merge, from which ldm extract makes a LoRA"
            )
    return dict(layers)  # type: ignore[arg-type]


def kohya(changes: Mapping[str, Mapping[str, LowRankChange]]) -> tuple[State, dict[str, str]]:
    """Returns the tensors in kohya's layout and their metadata."""
    state: State = {}
    prefixes = {UNET: "lora_unet_", TEXT: "lora_te1_" if TEXT_2 in changes else "lora_te_", TEXT_2: "lora_te2_"}
    for network, layers in changes.items():
        for name, change in layers.items():
            label = prefixes[network] + underscored(name)
            state[f"{label}.lora_down.weight"], state[f"{label}.lora_up.weight"] = change.down, change.up
            state[f"{label}.alpha"] = torch.tensor(change.alpha)
            if change.magnitude is not None:
                state[f"{label}.dora_scale"] = change.magnitude
    every = [change for layers in changes.values() for change in layers.values()]
    rank, alpha = _most_common(change.rank for change in every), _most_common(change.alpha for change in every)
    return state, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
    }


def diffusers(changes: Mapping[str, Mapping[str, LowRankChange]]) -> tuple[State, dict[str, str]]:
    """Returns the tensors in the layout of diffusers and peft, and their metadata.

    Raises ValueError for DoRA with magnitudes of inputs, or in only some layers of a network.
    """
    state: State = {}
    settings: dict[str, Any] = {}
    for network, layers in changes.items():
        with_magnitude = [name for name, change in layers.items() if change.magnitude is not None]
        if len(with_magnitude) not in (0, len(layers)):
            raise ValueError(
                f"{len(with_magnitude)} of the {len(layers)} layers of the {network} are changed as by DoRA, but "
                "peft's layout holds it for all layers or none: give --to kohya"
            )
        for name, change in layers.items():
            if dotted(network, underscored(name)) is None:
                raise ValueError(
                    f"the layer {name} has no name in diffusers, whose layout cannot hold it: give --to kohya"
                )
            label = f"{network}.{name}"
            state[f"{label}.lora_A.weight"], state[f"{label}.lora_B.weight"] = change.down, change.up
            if change.magnitude is not None:
                state[f"{label}.lora_magnitude_vector"] = _vector(name, change.magnitude)
        settings |= {f"{network}.{key}": value for key, value in _settings(layers, bool(with_magnitude)).items()}
    return state, {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}


def _vector(name: str, magnitude: Tensor) -> Tensor:
    """Returns a magnitude in peft's shape, (out,), or (1, out, 1, 1) for a convolution."""
    if magnitude.shape[1] != 1:
        raise ValueError(
            f"the magnitude of {name} is one of its inputs, which peft's layout cannot hold: give --to kohya"
        )
    return magnitude[:, 0] if magnitude.ndim == 2 else magnitude.transpose(0, 1)


def _settings(layers: Mapping[str, LowRankChange], decomposed: bool) -> dict[str, Any]:
    """Returns the arguments of peft's LoraConfig. Names match as suffixes, so the prefix "text_model." is omitted."""
    named = {name.removeprefix(MODEL): change for name, change in layers.items()}
    rank, alpha = (
        _most_common(values) for values in zip(*((one.rank, one.alpha) for one in named.values()), strict=True)
    )
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: change.rank for name, change in named.items() if change.rank != rank},
        "alpha_pattern": {name: _plain(change.alpha) for name, change in named.items() if change.alpha != alpha},
        "target_modules": list(named),
        "use_dora": decomposed,
    }


def _most_common(values: Any) -> int | float:
    return _plain(Counter(values).most_common(1)[0][0])


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number

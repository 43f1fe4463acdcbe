"""Reads the alphas of an adapter from peft's metadata, because its tensors do not contain them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

METADATA = "lora_adapter_metadata"  # key in safetensors files of diffusers: JSON whose names start with the network
BESIDE = "adapter_config.json"  # file next to an adapter file of peft


@dataclass(frozen=True)
class PeftSettings:
    """Settings of one network. `alphas` maps patterns to the alphas of layers whose names end in a match."""

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False

    def alpha_of(self, layer: str, rank: int) -> float | None:
        """Returns the alpha for which alpha / rank is the layer's scale, or None if it is unknown."""
        pattern = next((one for one in self.alphas if re.match(rf"(.*\.)?({one})$", layer)), None)
        alpha = self.alpha if pattern is None else self.alphas[pattern]
        return alpha if alpha is None or not self.stabilised else alpha * rank**0.5


def settings_in(source: Path, metadata: Mapping[str, Any], network: str, prefix: str) -> PeftSettings:
    """Returns the settings of a network in an adapter file. Raises ValueError if they are corrupt.

    In the metadata their names start with `prefix`, with which the names of the layers in the file start: "unet.",
    "transformer." or, if the file has one network only, "". Otherwise they start with `network`, or with nothing.
    """
    config = source.with_name(BESIDE)
    try:
        if METADATA in metadata:
            stored = dict(json.loads(metadata[METADATA]).items())
            return _settings(_of(stored, prefix) or _of(stored, f"{network}.") or _of(stored, ""))
        if source.name.startswith("adapter_model") and config.is_file():
            return _settings(json.loads(config.read_text()))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        where = f"its metadata {METADATA}" if METADATA in metadata else str(config)
        raise ValueError(f"has corrupt LoRA settings in {where} ({error}): fetch or export it again") from error
    return PeftSettings()


def _of(stored: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the settings whose names consist of this prefix and a name without dots."""
    found = {name[len(prefix) :]: value for name, value in stored.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if "." not in name}


def _settings(stored: Mapping[str, Any]) -> PeftSettings:
    alphas = {str(pattern): float(alpha) for pattern, alpha in (stored.get("alpha_pattern") or {}).items()}
    for pattern in alphas:
        re.compile(pattern)
    alpha = stored.get("lora_alpha")
    for number in (*alphas.values(), 0.0 if alpha is None else float(alpha)):
        if not isfinite(number):
            raise ValueError(f"an alpha is {number}")
    return PeftSettings(None if alpha is None else float(alpha), alphas, bool(stored.get("use_rslora")))

"""Reads the alphas of an adapter from peft's metadata, because its tensors do not contain them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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


def settings_in(source: Path, metadata: Mapping[str, Any], network: str) -> PeftSettings:
    """Returns the settings of a network in an adapter file. Raises ValueError if they are corrupt."""
    try:
        if METADATA in metadata:
            stored = json.loads(metadata[METADATA])
            return _settings(
                {name[len(network) + 1 :]: stored[name] for name in stored if name.startswith(f"{network}.")}
            )
        if source.name.startswith("adapter_model") and (config := source.with_name(BESIDE)).is_file():
            return _settings(json.loads(config.read_text()))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"what {source} says of its LoRA's settings is damaged; fetch or export it again") from error
    return PeftSettings()


def _settings(stored: Mapping[str, Any]) -> PeftSettings:
    alphas = {str(pattern): float(alpha) for pattern, alpha in (stored.get("alpha_pattern") or {}).items()}
    for pattern in alphas:
        re.compile(pattern)
    alpha = stored.get("lora_alpha")
    return PeftSettings(None if alpha is None else float(alpha), alphas, bool(stored.get("use_rslora")))

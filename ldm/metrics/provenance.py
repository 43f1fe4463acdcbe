"""Where a number comes from, and whether two numbers may stand side by side."""

import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
WORDS = 2**256

# By the first part of a metric's name: which entries of its provenance are the ruler, rather than what is measured.
PICTURES = ("feature_network", "reference.sha256", "reference.count", "prompts.sha256", "prompts.count", "size")
CAPTIONS = ("prompts.sha256", "prompts.count", "size")
MACHINE = ("device", "torch", "dtype")
RULERS: dict[str, tuple[str, ...]] = {
    "fid": PICTURES,
    "kid": PICTURES,
    "precision": PICTURES,
    "recall": PICTURES,
    "inception": ("feature_network", *CAPTIONS),
    "clip": ("clip", *CAPTIONS),
    "accuracy": CAPTIONS,
    "noise": ("validation",),
    "images": MACHINE,
    "training": MACHINE,
    "sampling": (*MACHINE, "prompts.count", "size"),
    "nfe": (),
}
NAMES = {
    "feature_network": "feature networks",
    "reference.sha256": "reference pictures",
    "reference.count": "numbers of reference pictures",
    "prompts.sha256": "prompts",
    "prompts.count": "numbers of generated pictures",
    "size": "picture sizes",
    "clip": "CLIP networks",
    "validation": "validation data",
    "device": "devices",
    "torch": "versions of torch",
    "dtype": "number types",
}


@dataclass(frozen=True)
class Provenance:
    """All that it takes to measure again, as plain data; it is stored beside the metrics in metrics.json.

    Without generated images the first five are None, and so is `sets` without a validation during training.
    """

    ema: dict[str, Any] | None
    steps: int | None  # of training; None where a model does not tell
    seed: int | None  # of training
    ranks: int | None  # that trained
    dtype: str
    device: str
    finished: str
    feature_network: dict[str, Any] | None = None  # Features.about: fingerprint, resize filter, size, normalisation
    reference: dict[str, Any] | None = None  # {"data", "count", "sha256"}
    prompts: dict[str, Any] | None = None  # {"from", "count", "sha256", "seeds"}; the noise has the seeds from … to
    sampling: dict[str, Any] | None = None  # sampler, spacing, steps, guidance, size
    size: list[int] | None = None  # of the pictures, height and width
    clip: str | None = None  # fingerprint of what measured the CLIP score
    validation: dict[str, Any] | None = None  # of the loss by noise level
    validated: int | None = None  # the step of the last validation during training
    sets: dict[str, dict[str, Any]] | None = None  # by set of that validation: {"count", "sha256", …what a loss means}
    model: dict[str, Any] | None = None  # of `ldm evaluate`: {"weights", "fingerprint", "notes"}
    identity: str | None = None  # of `ldm evaluate`: hash of all that decides the numbers
    torch: str = torch.__version__
    commit: str | None = field(default_factory=lambda: commit())

    def plain(self) -> dict[str, Any]:
        """With "features", the fingerprint alone, as runs before this one wrote it."""
        network = self.feature_network
        return {**asdict(self), "features": None if network is None else network["fingerprint"]}


def incomparable(metric: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Why two values of a metric, each with its provenance, do not measure the same thing; [] where they do.

    What was sampled (steps, guidance, sampler, weights) may differ, being what is compared; the ruler may not.
    """
    if metric.startswith("val/"):  # val/SET/NAME, measured during training
        return _of_validation(metric.split("/")[1], a, b)
    keys = RULERS.get(metric.partition("_")[0], (*PICTURES, "clip", "validation"))
    return [
        f"{NAMES[key]} differ ({_short(x)} and {_short(y)})"
        for key in keys
        if (x := _entry(a, key)) != (y := _entry(b, key))
    ]


def _of_validation(name: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    x, y = ((one.get("sets") or {}).get(name, {}) for one in (a, b))
    if bool(x) != bool(y):
        return [f"what the validation on {name} measured is recorded of one only"]
    return [
        f"validations on {name} differ in {key} ({_short(x.get(key))} and {_short(y.get(key))})"
        for key in dict.fromkeys([*x, *y])
        if x.get(key) != y.get(key)
    ]


def _entry(provenance: dict[str, Any], key: str) -> Any:
    """None where it is not recorded; runs of older code recorded a network's fingerprint and the size elsewhere."""
    if key == "feature_network" and key not in provenance and "features" in provenance:
        return {"fingerprint": provenance["features"]}
    if key == "size" and key not in provenance:
        key = "sampling.size"
    value: Any = provenance
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _short(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, dict):
        return " ".join(_short(item) for item in value.values())
    text = str(value)
    return text[:12] if len(text) == 64 else text


def image_hash(images: Tensor, captions: Sequence[str] = ()) -> int:
    """Of pictures uint8 (b, 3, h, w), or their moments, perhaps with captions, in any order: the sum of their SHA-256,
    so that ranks' hashes add up.
    """
    rows = images.cpu().contiguous().numpy()
    head = f"{images.dtype} {list(images.shape[1:])}".encode()
    texts = [caption.encode() for caption in captions] or [b""] * len(rows)
    samples = (head + row.tobytes() + text for row, text in zip(rows, texts, strict=True))
    return sum(int.from_bytes(hashlib.sha256(sample).digest()) for sample in samples) % WORDS


def add_hashes(*hashes: int) -> int:
    return sum(hashes) % WORDS


def text_hash(texts: Sequence[str]) -> str:
    """Of captions in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def commit() -> str | None:
    """The commit that this code runs from, with "-dirty" where files differ; None outside a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None

"""Records how metrics were measured, and decides whether two values of a metric are comparable."""

import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
HASHES = 2**256  # number of SHA-256 values

# The provenance entries that define the measurement, and must agree for two values to be comparable, by the first
# part of a metric's name. The other entries describe what is measured.
IMAGES = ("feature_network", "reference.sha256", "reference.count", "prompts.sha256", "prompts.count", "size")
CAPTIONS = ("prompts.sha256", "prompts.count", "size")
MACHINE = ("device", "torch", "dtype")
MUST_AGREE: dict[str, tuple[str, ...]] = {
    "fid": IMAGES,
    "kid": IMAGES,
    "precision": IMAGES,
    "recall": IMAGES,
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
    "reference.sha256": "reference images",
    "reference.count": "numbers of reference images",
    "prompts.sha256": "prompts",
    "prompts.count": "numbers of generated images",
    "size": "image sizes",
    "clip": "CLIP networks",
    "validation": "validation data",
    "device": "devices",
    "torch": "versions of torch",
    "dtype": "data types",
}


@dataclass(frozen=True)
class Provenance:
    """Everything needed to repeat a measurement, as plain data; it is stored beside the metrics in metrics.json.

    Without generated images the entries from `feature_network` to `clip` are None, and so is `sets` without a
    validation during training.
    """

    ema: dict[str, Any] | None
    steps: int | None  # of training; None if the model does not record them
    seed: int | None  # of training
    ranks: int | None  # of training
    dtype: str
    device: str
    finished: str
    feature_network: dict[str, Any] | None = None  # Features.about: fingerprint, resize filter, size, normalisation
    feature_width: int | None = None  # number of features of an image
    reference: dict[str, Any] | None = None  # {"data", "count", "sha256"}
    prompts: dict[str, Any] | None = None  # {"from", "count", "sha256", "seeds": [first, last] of the noise}
    sampling: dict[str, Any] | None = None  # sampler, spacing, steps, guidance, size
    size: list[int] | None = None  # height and width of the images
    clip: str | None = None  # fingerprint of the network of the CLIP score
    validation: dict[str, Any] | None = None  # data of the loss by noise level
    validated: int | None = None  # step of the last validation during training
    sets: dict[str, dict[str, Any]] | None = None  # its sets by name: {"count", "sha256", loss settings}
    model: dict[str, Any] | None = None  # of `ldm evaluate`: {"weights", "fingerprint", "notes", "settings"}
    identity: str | None = None  # of `ldm evaluate`: hash of everything that determines the numbers
    torch: str = torch.__version__
    commit: str | None = field(default_factory=lambda: commit())

    def plain(self) -> dict[str, Any]:
        """Returns a dictionary that also has "features", the network's fingerprint, for readers of older runs."""
        network = self.feature_network
        return {**asdict(self), "features": None if network is None else network["fingerprint"]}


def must_agree(metric: str) -> tuple[str, ...]:
    """Returns the provenance entries that define the measurement of a metric."""
    return MUST_AGREE.get(metric.partition("_")[0], (*IMAGES, "clip", "validation"))


def incomparable(metric: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Returns why two values of a metric, each with its provenance, are not comparable; [] if they are.

    The settings under comparison (steps, guidance, sampler, weights) may differ; how they were measured may not.
    """
    if metric.startswith("val/"):  # val/SET/NAME, measured during training
        return _of_validation(metric.split("/")[1], a, b)
    return [
        f"{NAMES[key]} differ ({_short(x)} and {_short(y)})"
        for key in must_agree(metric)
        if (x := _entry(a, key)) != (y := _entry(b, key))
    ]


def measured_alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Returns whether two provenances agree in all entries that define measurements and that both have."""
    pairs = ((_entry(a, key), _entry(b, key)) for key in (*IMAGES, "clip", "validation"))
    return all(x == y or x is None or y is None for x, y in pairs)


def depends_on_noise(metric: str) -> bool:
    """Returns whether a metric varies with the noise that images are sampled from, besides the weights."""
    return not metric.startswith("val/") and "prompts.count" in must_agree(metric)


def _of_validation(name: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    x, y = ((about.get("sets") or {}).get(name, {}) for about in (a, b))
    if bool(x) != bool(y):
        return [f"only one of them records what the validation on {name} measured"]
    return [
        f"validations on {name} differ in {key} ({_short(x.get(key))} and {_short(y.get(key))})"
        for key in dict.fromkeys([*x, *y])
        if x.get(key) != y.get(key)
    ]


def _entry(provenance: dict[str, Any], key: str) -> Any:
    """Returns an entry, or None if it is not recorded. Older runs stored the fingerprint and the size elsewhere."""
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
    """Returns the sum of the SHA-256 of images uint8 (b, 3, h, w), or of their moments, with or without captions.

    It does not depend on the order, and the hashes of several ranks add up by `add_hashes`.
    """
    rows = images.cpu().contiguous().numpy()
    head = f"{images.dtype} {list(images.shape[1:])}".encode()
    texts = [caption.encode() for caption in captions] or [b""] * len(rows)
    samples = (head + row.tobytes() + text for row, text in zip(rows, texts, strict=True))
    return sum(int.from_bytes(hashlib.sha256(sample).digest()) for sample in samples) % HASHES


def add_hashes(*hashes: int) -> int:
    return sum(hashes) % HASHES


def text_hash(texts: Sequence[str]) -> str:
    """Returns the SHA-256 of captions, in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def commit() -> str | None:
    """Returns the commit that this code runs from, with "-dirty" if files differ; None outside a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None

"""Describes the contents of adapter and textual inversion files."""

from collections import Counter
from collections.abc import Iterable

from ldm.adapters.change import LowRankChange
from ldm.weights.adapters.reader import AdapterFile, open_adapter
from ldm.weights.adapters.textual_inversion import read_embedding

LABELS = {  # metadata keys of other tools, and their labels
    "ss_sd_model_name": "base",
    "ss_base_model_version": "base's version",
    "modelspec.architecture": "architecture",
    "modelspec.title": "title",
    "modelspec.license": "licence",
    "ss_steps": "steps",
    "ss_num_train_images": "images",
    "ss_learning_rate": "learning rate",
    "ss_resolution": "resolution",
}


def describe_adapter(path: str) -> dict[str, str]:
    """Returns a human-readable description as names and values."""
    file = open_adapter(path)
    parameters = sum(header.size for name, header in file.tensors.items() if not name.endswith(".alpha"))
    lines = {
        "file": f"{file.source} ({file.source.stat().st_size / 2**20:,.1f} MiB)",
        "kind": f"a {_algorithms(file)} in the layout of {file.layout}",
        "parameters": f"{parameters:,}",
    }
    for network in file.networks:
        lines[network.replace("_", " ")] = _layers(file, network)
    facts = {label: str(file.metadata[name]) for name, label in LABELS.items() if name in file.metadata}
    return lines | facts


def describe_embedding(path: str) -> dict[str, str]:
    found = read_embedding(path)
    lines = {
        "file": f"{found.source} ({found.source.stat().st_size / 2**10:,.1f} KiB)",
        "kind": f"a textual inversion in the layout of {found.layout}",
        "token": found.token,
    }
    for network, vectors in found.vectors.items():
        lines[network.replace("_", " ")] = f"{len(vectors)} vectors of width {vectors.shape[1]}"
    labels = {**{name: name for name in ("sd_checkpoint_name", "step")}, **LABELS}
    return lines | {
        label.replace("_", " "): str(found.metadata[name]) for name, label in labels.items() if name in found.metadata
    }


def _algorithms(file: AdapterFile) -> str:
    names = Counter(_algorithm({*layer.parts}) for layer in file.layers)
    return " and ".join(name for name, _ in names.most_common())


def _algorithm(parts: set[str]) -> str:
    kind = "LoHa" if "hada_w1_a" in parts else "LoRA" if "down" in parts else "LoKr"
    core = " with Tucker's cores" if parts & {"mid", "hada_t1", "lokr_t2"} else ""
    return f"{kind}{core}" + (" with magnitudes (DoRA)" if parts & {"magnitude", "output magnitude"} else "")


def _layers(file: AdapterFile, network: str) -> str:
    """Returns the number of layers, and the ranks and alphas of those with a low-rank change."""
    layers = [layer for layer in file.layers if layer.network == network]
    changes = [change for layer in layers if isinstance(change := file.change(layer), LowRankChange)]
    text = f"{len(layers)} layers"
    if changes:
        text += (
            f", rank {_range(change.rank for change in changes)}, alpha {_range(change.alpha for change in changes)}"
        )
    return text


def _range(values: Iterable[float]) -> str:
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"

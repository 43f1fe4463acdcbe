"""Features of the real pictures, which many evaluations share: measured once, kept in a file with their provenance."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from ldm.files import atomic_write
from ldm.metrics.features import Features
from ldm.metrics.provenance import add_hashes, commit, image_hash


@dataclass(frozen=True)
class Reference:
    """Features (n, d), ids (n,), and as plain data what was measured with what."""

    features: Tensor
    ids: Tensor
    about: dict[str, Any]


def data_about(dataset: Dataset[dict[str, Any]], count: int) -> dict[str, Any]:
    """Plain data that names the first `count` samples; their first pictures tell data sets of one kind apart."""
    first = torch.stack([dataset[i]["image"] for i in range(min(4, count))])
    return {"data": type(dataset).__name__, "count": count, "begins": f"{image_hash(first):064x}"}


def image_batches(dataset: Dataset[dict[str, Any]], count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` pictures in batches, with their ids."""
    for start in range(0, count, batch_size):
        ids = range(start, min(start + batch_size, count))
        yield torch.stack([dataset[i]["image"] for i in ids]), torch.tensor(ids)


def reference(
    path: str | Path | None, network: Features, batches: Iterable[tuple[Tensor, Tensor]], data: dict[str, Any]
) -> Reference:
    """From the file at `path` if it is there, else measured, and written to `path` if one is given.

    `batches` are pictures uint8 (b, 3, h, w) with ids (b,), and are not looked at where the file is there; `data`
    is plain data that names them. Raises ValueError for a file of other data or another network.
    """
    identity = json.loads(json.dumps({"features": network.about, "data": data}))
    if path is not None and Path(path).is_file():
        return _read(Path(path), identity)
    found = _measure(network, batches, identity)
    if path is not None:
        tensors = {"features": found.features.contiguous(), "ids": found.ids}
        content = save(tensors, {"reference": json.dumps(found.about)})
        atomic_write(path, lambda file: file.write(content))
    return found


@torch.no_grad()
def _measure(network: Features, batches: Iterable[tuple[Tensor, Tensor]], identity: dict[str, Any]) -> Reference:
    features, ids, digest, sizes = [], [], 0, set()
    for images, batch_ids in batches:
        features.append(network(images.to(network.mean.device)).cpu())
        ids.append(batch_ids.cpu())
        digest = add_hashes(digest, image_hash(images))
        sizes.add(tuple(images.shape[2:]))
    if not features:
        raise ValueError("there are no real pictures to compare with; the reference data are empty")
    if len(sizes) > 1:
        raise ValueError(f"the real pictures have several sizes ({sorted(sizes)}); resize and crop them to one")
    about = {
        **identity,
        "count": sum(map(len, ids)),
        "sha256": f"{digest:064x}",
        "size": list(sizes.pop()),
        "commit": commit(),
        "torch": torch.__version__,
    }
    return Reference(torch.cat(features), torch.cat(ids), about)


def _read(path: Path, identity: dict[str, Any]) -> Reference:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("reference", "null"))
            features, ids = file.get_tensor("features"), file.get_tensor("ids")
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable file of reference features ({error}); delete it") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} does not say what its features are of; delete it, or give another path")
    for part, wanted in identity.items():
        if about.get(part) != wanted:
            raise ValueError(
                f"{path} holds reference features of other {part} than asked for ({about.get(part)} and not {wanted}); "
                "delete it, or give another path"
            )
    return Reference(features, ids, about)

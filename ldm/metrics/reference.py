"""Features of the real images, computed once for many evaluations and stored in a file with their provenance."""

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
    """Features (n, d) and ids (n,) of the real images; `about` describes the images and the network as plain data."""

    features: Tensor
    ids: Tensor
    about: dict[str, Any]


def data_about(dataset: Dataset[dict[str, Any]], count: int) -> dict[str, Any]:
    """Describes the first `count` samples as plain data; a hash of the first images distinguishes similar data sets."""
    first = torch.stack([dataset[i]["image"] for i in range(min(4, count))])
    return {"data": type(dataset).__name__, "count": count, "begins": f"{image_hash(first):064x}"}


def image_batches(dataset: Dataset[dict[str, Any]], count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the first `count` images in batches, with their ids."""
    for start in range(0, count, batch_size):
        ids = range(start, min(start + batch_size, count))
        several = getattr(dataset, "__getitems__", None)  # faster where it exists
        samples = several(ids) if several else [dataset[i] for i in ids]
        yield torch.stack([sample["image"] for sample in samples]), torch.tensor(ids)


def reference(
    path: str | Path | None, network: Features, batches: Iterable[tuple[Tensor, Tensor]], data: dict[str, Any]
) -> Reference:
    """Reads the features from the file at `path`, or computes them and writes that file; without a path only computes.

    `batches` are images uint8 (b, 3, h, w) with ids (b,), which are not read if the file exists; `data` describes
    them as plain data. Raises ValueError for a file of other data or another network.
    """
    identity = json.loads(json.dumps({"features": network.about, "data": data}))
    if path is not None and Path(path).is_file():
        return _read(Path(path), identity)
    computed = _compute(network, batches, identity)
    if path is not None:
        tensors = {"features": computed.features.contiguous(), "ids": computed.ids}
        content = save(tensors, {"reference": json.dumps(computed.about)})
        atomic_write(path, lambda file: file.write(content))
    return computed


@torch.no_grad()
def _compute(network: Features, batches: Iterable[tuple[Tensor, Tensor]], identity: dict[str, Any]) -> Reference:
    features, ids, digest, sizes = [], [], 0, set()
    for images, batch_ids in batches:
        features.append(network(images.to(network.mean.device)).cpu())
        ids.append(batch_ids.cpu())
        digest = add_hashes(digest, image_hash(images))
        sizes.add(tuple(images.shape[2:]))
    if not features:
        raise ValueError("there are no real images to compare with: the reference data are empty; give other data")
    if len(sizes) > 1:
        raise ValueError(f"the real images have several sizes ({sorted(sizes)}); resize and crop them to one")
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
        raise ValueError(f"{path} is not a readable file of reference features ({error}); delete it") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} has no metadata that describes its features; delete it, or give another path")
    for part, other in (("features", "another network"), ("data", "other data")):
        if about.get(part) != identity[part]:
            raise ValueError(
                f"{path} contains reference features of {other} than requested ({about.get(part)} instead of "
                f"{identity[part]}); delete it, or give another path"
            )
    return Reference(features, ids, about)

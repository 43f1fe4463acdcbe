"""Improved precision and recall of generated images: fidelity and coverage (Kynkäänniemi et al. 2019)."""

import torch
from torch import Tensor


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3, block: int = 2048) -> dict[str, float]:
    """Returns the shares of fake (m, d) within real's manifold (precision) and of real (n, d) within fake's (recall).

    A manifold is the union of balls around a set's points, each with the distance to the point's k-th nearest
    neighbour in the set as its radius.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need at least {neighbours + 1} images on each side, "
            f"not {len(real)} real and {len(fake)} generated"
        )
    real, fake = real.double(), fake.double()
    return {
        "precision": _share_within(fake, real, _radii(real, neighbours, block), block),
        "recall": _share_within(real, fake, _radii(fake, neighbours, block), block),
    }


def _radii(points: Tensor, neighbours: int, block: int) -> Tensor:
    """Returns the distance (n,) of each point to its k-th nearest neighbour; the nearest is itself, at distance 0."""
    return torch.cat([torch.cdist(rows, points).kthvalue(neighbours + 1).values for rows in points.split(block)])


def _share_within(queries: Tensor, points: Tensor, radii: Tensor, block: int) -> float:
    inside = sum(int((torch.cdist(rows, points) <= radii).any(dim=1).sum()) for rows in queries.split(block))
    return inside / len(queries)

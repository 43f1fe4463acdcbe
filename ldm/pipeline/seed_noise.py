"""The noise that a seed stands for: where a walk begins, and what it adds on the way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.pipeline.inputs import Between, ends
from ldm.random import normal
from ldm.sampling.grid import Noise

START = -1  # the draw that a walk begins with; its steps count from 0
Shape = tuple[int, ...]


def noise_of(kind: str, seeds: Sequence[int | Between[int]], shape: Shape, device: torch.device) -> Noise:
    """draw → standard normal numbers (b, *shape), of a kind in KINDS; between two seeds along the great circle."""
    if kind not in KINDS:
        raise ValueError(f"noise is {kind!r}, but must be one of {', '.join(KINDS)}")
    firsts, seconds, shares = ends(seeds)
    noise = KINDS[kind](firsts, shape, device)
    if not any(shares):
        return noise
    other, share = KINDS[kind](seconds, shape, device), torch.tensor(shares, device=device)
    return lambda draw: slerp(noise(draw), other(draw), share)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """The share (b,) of the angle from a to b (b, …), which keeps the length that noise must have (Shoemake 1985)."""
    cosine = torch.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1 + 1e-6, 1 - 1e-6)
    angle, share = (one.view(-1, *[1] * (a.ndim - 1)) for one in (cosine.acos(), share))
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def _keyed(seeds: list[int], shape: Shape, device: torch.device) -> Noise:
    """Depends on seed and size alone, and is the same on every device."""
    ids = torch.tensor(seeds, device=device)

    def noise(draw: int) -> Tensor:
        return normal(0, *(("initial noise", ids, 0) if draw == START else ("step noise", ids, draw)), shape)

    return noise


def _generated(seeds: list[int], shape: Shape, device: torch.device) -> Noise:
    """What diffusers draws with a generator a picture on the CPU, in float32; the draws must come in order."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda draw: torch.stack([torch.randn(shape, generator=one) for one in generators]).to(device)


KINDS: dict[str, Callable[[list[int], Shape, torch.device], Noise]] = {"ldm": _keyed, "diffusers": _generated}

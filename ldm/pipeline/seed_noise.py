"""Turns seeds into the initial noise of sampling and the noise that stochastic samplers add at each step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.pipeline.inputs import Between, endpoints
from ldm.random import normal
from ldm.sampling.grid import Noise

INITIAL = -1  # the draw of the initial noise; the draws of steps count from 0
Shape = tuple[int, ...]


def seed_noise(kind: str, seeds: Sequence[int | Between[int]], shape: Shape, device: torch.device) -> Noise:
    """Returns draw → standard normal noise (b, *shape), of a kind in GENERATORS.

    Noise between two seeds is interpolated along the great circle. Raises ValueError for an unknown kind.
    """
    if kind not in GENERATORS:
        raise ValueError(f"noise is {kind!r}, but must be one of {', '.join(GENERATORS)}")
    firsts, seconds, shares = endpoints(seeds)
    noise = GENERATORS[kind](firsts, shape, device)
    if not any(shares):
        return noise
    other, share = GENERATORS[kind](seconds, shape, device), torch.tensor(shares, device=device)
    return lambda draw: slerp(noise(draw), other(draw), share)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Interpolates from a to b (b, …) by the share (b,) of the angle between them (Shoemake 1985).

    Unlike linear interpolation this keeps the norm, and so the standard deviation, of noise.
    """
    cosine = torch.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1 + 1e-6, 1 - 1e-6)
    angle, share = (value.view(-1, *[1] * (a.ndim - 1)) for value in (cosine.acos(), share))
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def _keyed(seeds: list[int], shape: Shape, device: torch.device) -> Noise:
    """Depends on seed and size alone, and is the same on every device."""
    ids = torch.tensor(seeds, device=device)

    def noise(draw: int) -> Tensor:
        return normal(0, *(("initial noise", ids, 0) if draw == INITIAL else ("step noise", ids, draw)), shape)

    return noise


def _diffusers(seeds: list[int], shape: Shape, device: torch.device) -> Noise:
    """The noise of diffusers with one CPU generator per image, in float32; draws must be requested in order."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda draw: torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


GENERATORS: dict[str, Callable[[list[int], Shape, torch.device], Noise]] = {"ldm": _keyed, "diffusers": _diffusers}

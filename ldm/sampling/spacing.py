"""At which times a sampler calls the denoiser: float64 (steps,), falling (Lin et al. 2024, table 2)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule

Spacing = Callable[[Schedule, int], Tensor]


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """Equal strides back from the last time."""
    _check(schedule, steps)
    index = torch.arange(steps, dtype=torch.float64)
    if not schedule.discrete:
        return schedule.t_max - index * ((schedule.t_max - schedule.t_min) / steps)
    size = schedule.t_max + 1
    return (size - index * (size / steps)).round() - 1


def leading(schedule: Schedule, steps: int, offset: int = 1) -> Tensor:
    """Whole strides up from index `offset` (SD's steps_offset), so that the last time is left out.

    A continuous schedule is cut into a thousand.
    """
    _check(schedule, steps)
    size = schedule.t_max + 1 if schedule.discrete else 1000
    index = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (size // steps) + offset
    if index[0] > size - 1:
        raise ValueError(
            f"leading spacing of {steps} steps from offset {offset} reaches index {index[0]:.0f} of "
            f"{size - 1:.0f}: take fewer steps or spacing=trailing"
        )
    if schedule.discrete:
        return index
    return schedule.t_min + index / size * (schedule.t_max - schedule.t_min)


def linspace(schedule: Schedule, steps: int) -> Tensor:
    """From the last index to the first, both included; on a continuous schedule, without the clean end."""
    if not schedule.discrete:
        return trailing(schedule, steps)
    _check(schedule, steps)
    return torch.linspace(schedule.t_max, schedule.t_min, steps, dtype=torch.float64).round()


SPACINGS: dict[str, Spacing] = {"trailing": trailing, "leading": leading, "linspace": linspace}


def _check(schedule: Schedule, steps: int) -> None:
    most = schedule.t_max + 1 if schedule.discrete else 1000
    if not 1 <= steps <= most:
        raise ValueError(f"steps is {steps}, but must lie between 1 and {most:.0f}")

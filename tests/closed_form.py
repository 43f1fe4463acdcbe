"""Data whose optimal denoiser is known in closed form, with schedules and grids to sample them on."""

import torch
from torch import Tensor

from ldm.diffusion.schedule import (
    EDM,
    Flow,
    Schedule,
    cosine,
    linear,
    scaled_linear,
    sigmoid,
    snr_shift,
    table,
    zero_terminal_snr,
)
from ldm.sampling.grid import Denoise, Grid

SCHEDULES: list[Schedule] = [scaled_linear(), linear(), cosine(), Flow(), Flow(shift=3.0)]
EVERY_SCHEDULE = [
    *SCHEDULES,
    sigmoid(),
    EDM(),
    snr_shift(cosine(), 2.0),
    snr_shift(Flow(), 0.5),
    zero_terminal_snr(scaled_linear()),
    zero_terminal_snr(EDM()),
    snr_shift(zero_terminal_snr(linear()), 3.0),
    table(torch.linspace(0.02, 0.15, 500).square()),
    zero_terminal_snr(table(torch.linspace(0.02, 0.15, 500).square())),
]


def schedule_name(schedule: Schedule) -> str:
    """A test id: the name, the shift if there is one, and the name of the inner schedule if it has one."""
    config = schedule.config
    inner = f" of {config['schedule']['name']}" if "schedule" in config else ""
    return f"{schedule.name}{config.get('shift', '')}{inner}"


def levels(schedule: Schedule, t: float) -> tuple[Tensor, Tensor]:
    time = torch.tensor(t, dtype=torch.float64)
    return schedule.alpha(time), schedule.sigma(time)


def gaussian(schedule: Schedule, mean: float, std: float) -> Denoise:
    """E[x0 | x_t] for x0 ~ N(mean, std²)."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = levels(schedule, t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return denoise


def mixture(schedule: Schedule, means: tuple[float, float] = (-1.0, 1.5), std: float = 0.4) -> Denoise:
    """E[x0 | x_t] for two equally likely Gaussians."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = levels(schedule, t)
        variance = alpha**2 * std**2 + sigma**2
        logits = torch.stack([-((x - alpha * mean) ** 2) / (2 * variance) for mean in means])
        each = torch.stack([mean + alpha * std**2 / variance * (x - alpha * mean) for mean in means])
        return (logits.softmax(0) * each).sum(0)

    return denoise


def log_snr_grid(schedule: Schedule, steps: int) -> Grid:
    """Equal steps in log-SNR from -4 to 3, without a clean end."""
    return Grid.of(schedule, schedule.time(torch.linspace(-4, 3, steps + 1, dtype=torch.float64)), clean=False)


def states(count: int = 64) -> Tensor:
    """Reproducible standard normal numbers, float64 (count, 1, 2, 2)."""
    return torch.randn(count, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

"""How much signal alpha(t) and noise sigma(t) is left at time t: x_t = alpha·x0 + sigma·eps."""

from collections.abc import Callable
from math import pi
from typing import Any, Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """Float64 functions of any float tensor t; log_snr = ln(alpha² / sigma²) falls as t grows.

    Times of a discrete schedule are the indices t_min = 0 … t_max, and fractions lie between two entries.
    """

    name: str
    t_min: float
    t_max: float
    discrete: bool
    config: dict[str, Any]  # plain data from which `from_config` makes the same schedule

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def log_snr(self, t: Tensor) -> Tensor: ...

    def time(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`."""
        ...


class Discrete:
    """A variance-preserving table of betas (n,), its log-SNR interpolated linearly between the entries."""

    t_min = 0.0
    discrete = True

    def __init__(self, name: str, betas: Tensor, **settings: float) -> None:
        alpha_bar = torch.cumprod(1 - betas.double(), dim=0)
        self.name = name
        self.config = {"name": name, **settings}
        self.t_max = float(len(betas) - 1)
        self.table = alpha_bar.log() - (-alpha_bar).log1p()

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.log_snr(t)).sigmoid().sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        t, table = t.double(), self.table.to(t.device)
        left = t.long().clamp(0, len(table) - 2)
        return table[left].lerp(table[left + 1], t - left)

    def time(self, log_snr: Tensor) -> Tensor:
        log_snr, table = log_snr.double(), self.table.to(log_snr.device)
        left = torch.searchsorted(-table, -log_snr).sub(1).clamp(0, len(table) - 2)
        return left + (table[left] - log_snr) / (table[left] - table[left + 1])


def linear(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> Discrete:
    """Betas on a line (Ho et al. 2020, section 4)."""
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    return Discrete("linear", betas, beta_start=beta_start, beta_end=beta_end, steps=steps)


def scaled_linear(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Discrete:
    """Square roots of the betas on a line; the defaults are Stable Diffusion's (Rombach et al. 2022)."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return Discrete("scaled_linear", roots.square(), beta_start=beta_start, beta_end=beta_end, steps=steps)


def cosine(offset: float = 0.008, beta_max: float = 0.999, steps: int = 1000) -> Discrete:
    """Alpha-bar along a squared cosine (Nichol & Dhariwal 2021, equation 17)."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t + offset) / (1 + offset) * pi / 2).square()
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max)
    return Discrete("cosine", betas, offset=offset, beta_max=beta_max, steps=steps)


class Flow:
    """Rectified flow on t in [0, 1]: alpha = 1 - sigma, and sigma = t where `shift` is 1.

    A shift multiplies sigma/alpha (Esser et al. 2024, equation 23): sigma = shift·t / (1 + (shift - 1)·t).
    """

    name = "flow"
    t_min = 0.0
    t_max = 1.0
    discrete = False

    def __init__(self, shift: float = 1.0) -> None:
        if shift <= 0:
            raise ValueError(f"the flow schedule's shift is {shift}, but must be positive")
        self.shift = shift
        self.config = {"name": "flow", "shift": shift}

    def alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        t = t.double()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time(self, log_snr: Tensor) -> Tensor:
        sigma = (-log_snr.double() / 2).sigmoid()
        return sigma / (self.shift - (self.shift - 1) * sigma)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "flow": Flow,
}


def from_config(config: dict[str, Any]) -> Schedule:
    """The schedule that a `config` describes. Raises ValueError for an unknown name or settings."""
    settings = dict(config)
    name = settings.pop("name", None)
    if name not in SCHEDULES:
        raise ValueError(f"the schedule is {name!r}, but must be one of {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](**settings)
    except TypeError as error:
        raise ValueError(f"the schedule {name!r} cannot be made with {settings}: {error}") from error

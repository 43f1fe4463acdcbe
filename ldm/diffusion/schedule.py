"""How much signal alpha(t) and noise sigma(t) is left at time t: x_t = alpha·x0 + sigma·eps."""

from collections.abc import Callable
from math import inf, log, pi, sqrt
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
        if len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"the {name} schedule needs 2 betas or more, each above 0 and below 1, which {settings} do not give"
            )
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


def sigmoid(
    start: float = -3.0, end: float = 3.0, tau: float = 1.0, least: float = 1e-9, steps: int = 1000
) -> Discrete:
    """Alpha-bar along a sigmoid of slope 1 / tau, at least `least` (Jabri et al. 2022; Chen 2023, algorithm 1)."""
    if not (start < end and tau > 0):
        raise ValueError(f"the sigmoid schedule needs start < end and tau > 0, not {start}, {end} and {tau}")
    curve = torch.linspace(start, end, steps + 1, dtype=torch.float64).div(tau).sigmoid()
    alpha_bar = ((curve[-1] - curve) / (curve[-1] - curve[0])).clamp(min=least)
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    return Discrete("sigmoid", betas, start=start, end=end, tau=tau, least=least, steps=steps)


class Flow:
    """Rectified flow on t in [0, 1]: alpha = 1 - sigma, and sigma = t where `shift` is 1.

    A shift multiplies sigma/alpha (Esser et al. 2024, equation 23): sigma = shift·t / (1 + (shift - 1)·t).
    """

    name = "flow"
    t_min = 0.0
    t_max = 1.0
    discrete = False

    def __init__(self, shift: float = 1.0) -> None:
        if not 0 < shift < inf:
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


class EDM:
    """sigma/alpha from sigma_min to sigma_max, equal times being equal factors, on t in [0, 1] (Karras et al. 2022).

    The path preserves variance, so that x is c_in(sigma)·x of the paper for data of deviation sigma_data = 1, and
    its network with its c_skip and c_out is v-prediction (up to a sign).
    """

    name = "edm"
    t_min = 0.0
    t_max = 1.0
    discrete = False

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < inf:
            raise ValueError(f"the edm schedule needs 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
        self.most, self.fall = -2 * log(sigma_min), 2 * log(sigma_max / sigma_min)
        self.config = {"name": "edm", "sigma_min": sigma_min, "sigma_max": sigma_max}

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.log_snr(t)).sigmoid().sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        return self.most - self.fall * t.double()

    def time(self, log_snr: Tensor) -> Tensor:
        return (self.most - log_snr.double()) / self.fall


class Shifted:
    """See `snr_shift`."""

    name = "snr_shift"

    def __init__(self, schedule: Schedule, shift: float) -> None:
        if not 0 < shift < inf:
            raise ValueError(f"the shift of snr_shift is {shift}, but must be positive")
        self.schedule, self.fall = schedule, 2 * log(shift)
        self.t_min, self.t_max, self.discrete = schedule.t_min, schedule.t_max, schedule.discrete
        self.config: dict[str, Any] = {"name": self.name, "schedule": schedule.config, "shift": shift}

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(self.schedule.time(self.log_snr(t)))

    def sigma(self, t: Tensor) -> Tensor:
        return self.schedule.sigma(self.schedule.time(self.log_snr(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        return self.schedule.log_snr(t) - self.fall

    def time(self, log_snr: Tensor) -> Tensor:
        return self.schedule.time(log_snr.double() + self.fall)


class ZeroTerminal:
    """See `zero_terminal_snr`."""

    name = "zero_terminal_snr"

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.t_min, self.t_max, self.discrete = schedule.t_min, schedule.t_max, schedule.discrete
        self.config: dict[str, Any] = {"name": self.name, "schedule": schedule.config}
        ends = schedule.alpha(torch.tensor([self.t_min, self.t_max], dtype=torch.float64))
        first, self.last = ends.tolist()
        self.stretch = first / (first - self.last)

    def alpha(self, t: Tensor) -> Tensor:
        alpha = (self.schedule.alpha(t) - self.last) * self.stretch
        return alpha.masked_fill(t >= self.t_max, 0)  # exactly, however the difference was rounded

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t).square()).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time(self, log_snr: Tensor) -> Tensor:
        alpha = log_snr.double().sigmoid().sqrt() / self.stretch + self.last
        t = self.schedule.time(alpha.square().logit())
        return t.masked_fill(log_snr == -inf, self.t_max)


def snr_shift(schedule: Schedule, shift: float) -> Shifted:
    """The schedule with sigma/alpha times `shift` at each time, so with SNR / shift², on its own path.

    For pictures of more pixels (Hoogeboom et al. 2023, equation 3); Flow(shift) is snr_shift(Flow(), shift).
    """
    return Shifted(schedule, shift)


def resolution_shift(positions: int, trained: int) -> float:
    """The shift that gives `positions` latent positions (h·w) the uncertainty of `trained` ones, sqrt(m/n).

    Esser et al. 2024, equation 23.
    """
    if min(positions, trained) < 1:
        raise ValueError(f"the numbers of latent positions are {positions} and {trained}, but must be 1 or more")
    return sqrt(positions / trained)


def flow_at_resolution(positions: int, trained: int) -> Flow:
    """Rectified flow for `positions` latent positions (h·w), where it would be unshifted for `trained` ones."""
    return Flow(resolution_shift(positions, trained))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """A variance-preserving schedule with alpha moved and stretched to be 0 at t_max and as before at t_min.

    Lin et al. 2024, algorithm 1, which does so to the table of alphas; here it holds between entries and on a
    continuous schedule too. One that ends in pure noise already, such as Flow, is returned as it is.
    """
    end = schedule.alpha(torch.tensor([schedule.t_max], dtype=torch.float64))
    return schedule if float(end) == 0 else ZeroTerminal(schedule)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "flow": Flow,
    "edm": EDM,
    "snr_shift": snr_shift,
    "zero_terminal_snr": zero_terminal_snr,
}


def from_config(config: dict[str, Any]) -> Schedule:
    """The schedule that a `config` describes. Raises ValueError for an unknown name or settings."""
    if not isinstance(config, dict):
        raise ValueError(f"a schedule is described by its name and settings, not by {config!r}")
    settings = dict(config)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"the schedule is {name!r}, but must be one of {', '.join(SCHEDULES)}")
    if "schedule" in settings:
        settings["schedule"] = from_config(settings["schedule"])
    try:
        return SCHEDULES[name](**settings)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the schedule {name!r} cannot be made with {settings}: {error}") from error
